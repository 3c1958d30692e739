"""Fisher information: how much the loss of clean examples depends on each weight.

Reference:
    Fine-purifying weighs drift by it: Zhang et al., "Diffusion Theory as a Scalpel: Detecting and
    Purifying Poisonous Dimensions in Pre-trained Language Models Caused by Backdoor or Bias",
    Findings of ACL 2023, arXiv:2305.04547.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from weightsurgery.checkpoint import Checkpoint, Step
from weightsurgery.curvature.factors import Sums
from weightsurgery.curvature.losses import Objective
from weightsurgery.curvature.paths import find_paths
from weightsurgery.curvature.per_example import (
    Paths,
    add_squares,
    frozen,
    zeros,
)
from weightsurgery.curvature.points import between
from weightsurgery.curvature.result import HOOKS, lengths_of, make_result
from weightsurgery.datasets.batches import (
    Encoded,
    check_examples,
    cut_warning,
    digest_of,
)
from weightsurgery.datasets.prompts import template_record
from weightsurgery.datasets.sizes import alone_warning, bounded_batch_size
from weightsurgery.errors import SettingError, conflict, shown
from weightsurgery.models import Model
from weightsurgery.stream import Progress
from weightsurgery.tasks import CLASSIFICATION


def fisher(
    model: Model,
    examples: Sequence[Encoded],
    *,
    labels: str = "true",
    points: int = 1,
    base: Checkpoint | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
) -> Checkpoint:
    """Diagonal Fisher information: mean over examples of the squared gradient of each one's loss.

    For weight i it is 1/N Σ_n (∂ loss_n/∂w_i)², where loss_n is the cross-entropy of example n
    alone; for a causal model the mean over the tokens of its answer (our choice). Gradients are
    squared one example at a time; the square of a batch's gradient would be another number, and
    near zero at a minimum. The model computes in evaluation mode and is left as it was.

    Args:
        model: From `load_model`.
        examples: From `read_examples`.
        labels: "true" for the labels that the examples have (empirical Fisher), "sampled" to draw
            them from the model's own prediction (true Fisher).
        points: Average over the weights base + (2t - 1)/(2n)·(tuned - base) for t = 1 to n, as
            recalled from the paper; 1 takes the tuned weights themselves.
        base: The weights that fine-tuning began with; only needed for more than one point.
        batch_size: Examples computed at a time; it changes the result by rounding alone.
        seed: Of sampled labels.
        progress: Called as progress(what, examples done, examples in all).

    Returns:
        A float32 tensor for every trainable parameter, under its name on disk; tied weights once,
        with their gradients summed. `notes["paths"]` tells how each was computed: "hooks" in
        batches, "split" in batches but for its own module, which ran one example at a time,
        "loop" by running the whole model one example at a time.

    Raises:
        SettingError: There are no examples, or a setting is out of range.
        MismatchError: The head has no cross-entropy, or `base` does not fit the model.
        NonFiniteError: The result has a NaN or infinity.
    """
    run = _Run(model, examples, labels, points, base, batch_size, seed, progress)
    return _mean(run, *_sums(run, fourths=False))


def fisher_with_error(
    model: Model,
    examples: Sequence[Encoded],
    *,
    labels: str = "true",
    points: int = 1,
    base: Checkpoint | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Checkpoint, Checkpoint]:
    """Fisher information, and how far it may be off for the number of examples being finite.

    The standard error of the mean of g² over N examples is sqrt((mean g⁴ - (mean g²)²)/N). With
    more than one point all points' gradients are pooled, which can only make it larger.

    Args:
        model: As for `fisher`.
        examples: As for `fisher`, two at least.
        labels: As for `fisher`.
        points: As for `fisher`.
        base: As for `fisher`.
        batch_size: As for `fisher`.
        seed: As for `fisher`.
        progress: As for `fisher`.

    Returns:
        The Fisher information, and its standard error.

    Raises:
        SettingError: There are fewer than two examples, or a setting is out of range.
        MismatchError: The head has no cross-entropy, or `base` does not fit the model.
        NonFiniteError: A result has a NaN or infinity.
    """
    if len(examples) == 1:
        raise SettingError(
            "one example has no standard error; expected at least two", code="E-ROWS-FEW"
        )
    run = _Run(model, examples, labels, points, base, batch_size, seed, progress)
    sums, paths = _sums(run, fourths=True)
    error = {}
    for name, one in sums.items():
        if one.fourths is None:
            raise ValueError(f"{name}: no fourth powers")
        mean = one.squares / run.count
        variance = one.fourths.div_(run.count).addcmul_(mean, mean, value=-1).clamp_(min=0)
        error[name] = variance.div_(len(examples)).sqrt_()
        one.fourths = None
    second = make_result(
        error,
        model=run.model,
        paths=paths,
        step=Step("fisher-standard-error", run.settings, run.inputs),
        content="standard error of the diagonal Fisher information",
        warnings=run.warnings,
    )
    return _mean(run, sums, paths), second


@dataclass(frozen=True)
class _Run:
    """What `fisher` was called with, checked.

    Attributes:
        model: The model.
        examples: The examples.
        labels: "true" or "sampled".
        points: How many points between `base` and the model's weights.
        base: Where they begin.
        batch_size: Examples at a time.
        seed: Of sampled labels.
        progress: Called with what, examples done, examples in all.

    Raises:
        SettingError: A setting is out of range.
    """

    model: Model
    examples: Sequence[Encoded]
    labels: str
    points: int
    base: Checkpoint | None
    batch_size: int
    seed: int
    progress: Progress | None

    def __post_init__(self) -> None:
        check_examples(self.model, self.examples)
        if self.labels not in ("true", "sampled"):
            raise SettingError(f"labels is '{shown(self.labels)}'; expected true or sampled")
        for name, value in (("points", self.points), ("batch_size", self.batch_size)):
            if value < 1:
                raise SettingError(f"{name} is {value}; expected at least 1")
        if self.points > 1 and self.base is None:
            raise conflict(
                f"points is {self.points}, but there is no base to go between",
                "give the pre-trained weights as base",
            )

    @property
    def count(self) -> int:
        """How many gradients are averaged."""
        return len(self.examples) * self.points

    @property
    def batch(self) -> int:
        """Examples computed at a time: 1 where a batch would change the answers."""
        return bounded_batch_size(self.model, self.examples, self.batch_size)

    @property
    def shares(self) -> list[float]:
        """How far from BASE to TUNED each point is."""
        n = self.points
        return [1.0] if n == 1 else [(2 * t - 1) / (2 * n) for t in range(1, n + 1)]

    @property
    def settings(self) -> Mapping[str, Any]:
        """For the record."""
        return {
            "labels": self.labels,
            "points": self.points,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "examples": len(self.examples),
            "examples_sha256": digest_of(self.examples),
            **lengths_of(self.examples),
            **template_record(self.model),
        }

    @property
    def warnings(self) -> list[str]:
        """What was odd about the examples."""
        return [
            *cut_warning(self.examples, causal=self.model.task != CLASSIFICATION),
            *alone_warning(self.model, self.examples, self.batch_size),
        ]

    @property
    def inputs(self) -> dict[str, Checkpoint]:
        """What the estimate is of."""
        between = {"base": self.base} if self.points > 1 and self.base is not None else {}
        return {**between, "model": self.model.checkpoint}


def _sums(run: _Run, *, fourths: bool) -> tuple[dict[str, Sums], dict[str, str]]:
    """Sums over all examples and points, and which way each parameter went."""
    model = run.model
    objective = Objective(model, sampled=run.labels == "sampled", seed=run.seed)
    with ExitStack() as stack:
        stack.enter_context(frozen(model.module))
        move = None
        if run.points > 1 and run.base is not None:
            move = stack.enter_context(between(model, run.base))
        paths = find_paths(objective, run.examples, batch_size=run.batch)
        sums = zeros(model.names, list(model.names), fourths=fourths)
        while unfit := _add_points(run, objective, move, sums, paths):
            # A layer was called otherwise than on the first examples. Begin again.
            paths.give_up(unfit)
            for one in sums.values():
                one.zero()
    return sums, paths.ways


def _add_points(
    run: _Run,
    objective: Objective,
    move: Callable[[float], None] | None,
    sums: Mapping[str, Sums],
    paths: Paths,
) -> set[str]:
    for number, share in enumerate(run.shares):
        if move is not None:
            move(share)

        def report(path: str, done: int, number: int = number) -> None:
            if run.progress is not None:
                what = "fisher" if path == HOOKS else "fisher (one at a time)"
                run.progress(what, number * len(run.examples) + done, run.count)

        unfit = add_squares(
            objective, run.examples, sums, paths, batch_size=run.batch, report=report
        )
        if unfit:
            return unfit
    return set()


def _mean(run: _Run, sums: Mapping[str, Sums], paths: Mapping[str, str]) -> Checkpoint:
    which = "the examples' labels" if run.labels == "true" else "labels drawn from the model"
    return make_result(
        {name: one.squares.div_(run.count) for name, one in sums.items()},
        model=run.model,
        paths=paths,
        step=Step("fisher", run.settings, run.inputs),
        content="diagonal Fisher information: mean over examples of the squared gradient of each "
        f"one's loss, under {which}",
        warnings=run.warnings,
    )
