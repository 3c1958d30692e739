"""The sweep over ratios: what each reset costs in accuracy, and which ratio to take.

As in the papers, methods are compared at like accuracy: the largest reset is taken that, after
fine-tuning on the clean examples, stays within a tolerance of the tuned model's accuracy on
held-out clean data. The tolerance of 2 points, and reporting the whole curve, are our choice.

Reference:
    Zhang et al., "Fine-mixing: Mitigating Backdoors in Fine-tuned Language Models",
    Findings of EMNLP 2022, arXiv:2210.09545.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from weightsurgery.checkpoint import Checkpoint
from weightsurgery.datasets.batches import Encoded, encode_sentences
from weightsurgery.datasets.read import Sentence
from weightsurgery.datasets.triggers import Trigger
from weightsurgery.errors import SettingError, shown
from weightsurgery.evaluation.classification import evaluate
from weightsurgery.models import Model, with_weights
from weightsurgery.stream import Progress
from weightsurgery.training.finetune import finetune

SCHEMA = "wsurg.sweep/1"


def sweep(
    edit: Callable[[float], Checkpoint],
    model: Model,
    examples: Sequence[Encoded] | None,
    held_out: Sequence[Sentence],
    *,
    ratios: Sequence[float],
    tolerance: float = 0.02,
    training: Mapping[str, Any] | None = None,
    trigger: Trigger | Sequence[Trigger] | None = None,
    poisoned: Sequence[Sentence] | None = None,
    target_label: str | int | None = None,
    label_kind: str = "auto",
    batch_size: int = 64,
    max_length: int = 128,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a model at each ratio, before and after fine-tuning, and choose a ratio.

    Args:
        edit: Ratio to an edited checkpoint, such as `purify` with everything else given.
        model: The tuned model; its weights are put back at the end.
        examples: Clean ones to fine-tune on; None leaves fine-tuning out.
        held_out: Other clean sentences, on which accuracy is measured and the ratio chosen.
        ratios: Shares to reset, in any order.
        tolerance: How much accuracy may be lost against the tuned model.
        training: Settings of `finetune`.
        trigger: A backdoor's pattern, or several, to measure the attack too.
        poisoned: Sentences with the trigger in them already, in its place.
        target_label: The attack's.
        label_kind: As for `evaluate`.
        batch_size: Sentences measured at a time.
        max_length: Tokens after which a text is cut.
        progress: Called as progress(what, done, in all).

    Returns:
        The report: `schema` "wsurg.sweep/1", `reference` (the tuned model's numbers), `rows` (one
        for each ratio: `before` and `after` with accuracy, loss, asr, floor), `tolerance`,
        `chosen`, the largest ratio within it (null if none is), and `warnings`: those of
        `evaluate`, each once, and what speaks against the choice.

    Raises:
        SettingError: There is no ratio, one is outside 0 to 1, or `tolerance` is.
    """
    _check(ratios, tolerance)
    sizes: Any = {"batch_size": batch_size, "max_length": max_length}
    tuned, tell = model.checkpoint, progress or (lambda *_: None)
    attack: Any = {"trigger": trigger, "poisoned": poisoned, "target_label": target_label}
    # In the order in which they come.
    warnings = dict.fromkeys(overlap_warning(model, examples or (), held_out, max_length))

    def measure(measured: Model, where: str, done: int) -> dict[str, Any]:
        tell(f"{where}: measuring", done, len(ordered))
        report = evaluate(measured, held_out, **attack, label_kind=label_kind, **sizes)
        warnings.update(dict.fromkeys(report["warnings"]))
        found = {name: report[name] for name in ("accuracy", "loss", "asr", "floor", "bacc")}
        return {**found, "triggers": report["triggers"]}

    ordered, rows = sorted(set(map(float, ratios))), []
    try:
        reference = measure(model, "sweeping, tuned", 0)
        warnings.update(dict.fromkeys(_guessing(reference, held_out)))
        for done, ratio in enumerate(ordered):
            where = f"sweeping, ratio {ratio:g}"
            tell(f"{where}: resetting", done, len(ordered))
            edited = with_weights(model, edit(ratio))
            row = {"ratio": ratio, "before": measure(edited, where, done), "after": None}
            if examples is not None:
                tell(f"{where}: fine-tuning", done, len(ordered))
                trained = finetune(edited, examples, **(training or {}))
                row["after"] = measure(edited, where, done)
                row["training"] = trained.notes["training"]
                warnings.update(dict.fromkeys(trained.notes["training"]["warnings"]))
            rows.append(row)
            tell(where, done + 1, len(ordered))
    finally:
        with_weights(model, tuned)
    return {
        "schema": SCHEMA,
        "tuned": tuned.label,
        "tolerance": tolerance,
        "reference": reference,
        "rows": rows,
        "chosen": choose_ratio(rows, reference, tolerance),
        "warnings": list(warnings),
    }


def _check(ratios: Sequence[float], tolerance: float) -> None:
    if not ratios or any(not 0 <= ratio <= 1 for ratio in ratios):
        raise SettingError("ratios are shares from 0 to 1, at least one of them")
    if not 0 <= tolerance <= 1:
        raise SettingError(f"tolerance is {tolerance}; expected a share from 0 to 1")


def overlap_warning(
    model: Model, examples: Sequence[Encoded], held_out: Sequence[Sentence], max_length: int = 128
) -> list[str]:
    """A warning if sentences that the ratio is chosen on are among the clean examples.

    Args:
        model: From `load_model`.
        examples: Clean ones, that the model is trained on or the Fisher is made from.
        held_out: Sentences to measure on.
        max_length: Tokens after which a text is cut.
    """
    known = {one.ids for one in examples}
    labels = [0] * len(held_out)
    seen = encode_sentences(model, held_out, labels, max_length=max_length) if known else []
    count = sum(one.ids in known for one in seen)
    text = "of the held-out sentences are among the clean examples: the choice favours them"
    return [f"{count:,} {text}"] if count else []


def _guessing(reference: Mapping[str, Any], held_out: Sequence[Sentence]) -> list[str]:
    """A warning if the tuned model is no better than one that always says the same."""
    ((label, count),) = Counter(one.label for one in held_out).most_common(1)
    if reference["accuracy"]["count"] > count:
        return []
    text = f"tuned is no better than always saying '{shown(label)}'; a choice says nothing here"
    return [text]


def choose_ratio(
    rows: Sequence[Mapping[str, Any]], reference: Mapping[str, Any], tolerance: float
) -> float | None:
    """The largest ratio whose last measurement is within the tolerance; None if none is.

    Args:
        rows: Of a sweep.
        reference: The tuned model's numbers.
        tolerance: How much accuracy may be lost.
    """
    least = reference["accuracy"]["share"] - tolerance
    fits = [
        float(row["ratio"])
        for row in rows
        # Shares of a few hundred sentences: a difference of rounding is none.
        if (row["after"] or row["before"])["accuracy"]["share"] >= least - 1e-12
    ]
    return max(fits, default=None)
