"""Fine-tuning on a few clean examples: the second step of Fine-mixing and Fine-purifying.

Reference:
    Zhang et al., "Fine-mixing: Mitigating Backdoors in Fine-tuned Language Models", Findings of
    EMNLP 2022, arXiv:2210.09545. The optimiser's settings are our choice.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from weightsurgery.alignment import check_glob
from weightsurgery.checkpoint import Checkpoint, Step
from weightsurgery.datasets.batches import (
    Encoded,
    check_examples,
    cut_warning,
    describe_files,
    digest_of,
)
from weightsurgery.datasets.labels import imbalance
from weightsurgery.datasets.prompts import template_record
from weightsurgery.datasets.sizes import alone_warning
from weightsurgery.errors import SettingError, conflict
from weightsurgery.evaluation.intervals import proportion
from weightsurgery.evaluation.predictions import predict
from weightsurgery.models import Model
from weightsurgery.rng import random_bits
from weightsurgery.stream import Progress
from weightsurgery.tasks import CLASSIFICATION
from weightsurgery.training.result import frozen_names, trained_checkpoint
from weightsurgery.training.run import Watch, train
from weightsurgery.training.settings import Hyperparameters

_MEASURED = 64  # sentences measured at a time
_MOST = 1024  # training examples measured
_NAMES = {"train": "training", "held_out": "held-out"}


def finetune(
    model: Model,
    examples: Sequence[Encoded],
    *,
    held_out: Sequence[Encoded] | float | None = None,
    epochs: int = Hyperparameters.epochs,
    learning_rate: float = Hyperparameters.learning_rate,
    batch_size: int = Hyperparameters.batch_size,
    accumulation: int = Hyperparameters.accumulation,
    scheduler: str = Hyperparameters.scheduler,
    warmup: float = Hyperparameters.warmup,
    weight_decay: float = Hyperparameters.weight_decay,
    max_grad_norm: float = Hyperparameters.max_grad_norm,
    label_smoothing: float = Hyperparameters.label_smoothing,
    patience: int | None = Hyperparameters.patience,
    class_weights: str = Hyperparameters.class_weights,
    freeze: Sequence[str] = Hyperparameters.freeze,
    seed: int = Hyperparameters.seed,
    files: Sequence[str | os.PathLike[str]] = (),
    progress: Progress | None = None,
) -> Checkpoint:
    """Train a model on a few examples with AdamW, by transformers' Trainer.

    The defaults are for tens of examples. The model computes in float32 and is trained in place;
    the checkpoint has its new weights in the dtypes, names and shards of the old ones. On one
    machine's processor the same seed gives the same bytes.

    Args:
        model: From `load_model`.
        examples: Clean ones, from `read_examples`.
        held_out: Other clean examples, whose loss is measured after each epoch, or the share of
            `examples` to hold out (drawn by the seed).
        epochs: Passes over the examples, at most.
        learning_rate: Of the first step after the warm-up.
        batch_size: Examples in a batch.
        accumulation: Batches in a step.
        scheduler: How the learning rate goes on: "linear" or "cosine" to 0, or "constant".
        warmup: Share of the steps in which the learning rate rises from 0.
        weight_decay: AdamW's, not on biases and norms.
        max_grad_norm: Longer gradients are scaled to this norm; 0 leaves them.
        label_smoothing: Share of the label that is spread over all labels.
        patience: Stop after so many epochs without a smaller held-out loss, and take the weights
            of the epoch where it was smallest; None runs all epochs and takes the last weights.
        class_weights: "balanced" multiplies the loss of each example by N/(K·n), with N examples,
            K classes among them and n examples of its class, so that every class counts the same;
            "none" counts every example the same.
        freeze: Globs over names on disk: what is not trained.
        seed: Of the order of the examples, of dropout, and of what is held out.
        files: Where the examples come from; the record tells their SHA-256.
        progress: Called as progress(what, done, in all), for steps and for examples measured.

    Returns:
        The trained checkpoint. `notes["training"]` has the epochs run, the epoch whose weights
        these are, losses (and a classifier's accuracies) before and after (on the first 1,024 of
        more training examples), the examples of each class, the history, and the `warnings`: texts
        that were cut, classes that are not balanced, held-out examples that are trained on.

    Raises:
        SettingError: A setting is out of range, or leaves nothing to train or to train on.
        MismatchError: The head has no cross-entropy, or an example has no answer.
        NonFiniteError: The loss or a weight became NaN or infinite.
    """
    chosen = Hyperparameters(
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        accumulation=accumulation,
        scheduler=scheduler,
        warmup=warmup,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        label_smoothing=label_smoothing,
        patience=patience,
        class_weights=class_weights,
        freeze=tuple(freeze),
        seed=seed,
    )
    parts = split(model, examples, held_out, chosen)
    step = Step(
        "finetune",
        {**chosen.to_json(), **template_record(model), **_describe(parts, held_out, files)},
        {"tuned": model.checkpoint},
    )
    with _thawed(model, chosen.freeze):
        before = _measure(model, parts, batch_size, progress)
        watch = Watch(model, _held_out(model, parts, batch_size), patience, progress)
        weights = _class_weights(model, parts["train"], class_weights)
        arguments = chosen.arguments(len(parts["train"]))
        train(model, parts["train"], watch, class_weights=weights, **arguments)
        result = trained_checkpoint(model, step=step)
    report = {
        "examples": {part: len(given) for part, given in parts.items()},
        "steps": watch.steps,
        "epochs": len(watch.history),
        "best_epoch": watch.best_epoch,
        "before": before,
        "after": _measure(model, parts, batch_size, progress),
        "classes": _classes(model, parts["train"]),
        "history": watch.history,
    }
    return _noted(model, result, report, warnings_of(model, parts, batch_size))


def _noted(
    model: Model, result: Checkpoint, report: dict[str, Any], warnings: Sequence[str]
) -> Checkpoint:
    """The result with its report and its warnings."""
    report["warnings"] = list(warnings)
    return replace(
        result,
        notes={**model.checkpoint.notes, "training": report},
        warnings=tuple(dict.fromkeys((*result.warnings, *warnings))),
    )


def warnings_of(
    model: Model, parts: Mapping[str, Sequence[Encoded]], batch_size: int = 1
) -> list[str]:
    """What was odd about the examples: some cut, classes not balanced, held-out ones trained on.

    Args:
        model: What is trained.
        parts: From `split`.
        batch_size: Examples at a time.
    """
    causal = model.task != CLASSIFICATION
    found = [
        warning
        for part, examples in parts.items()
        for warning in cut_warning(examples, f"{_NAMES[part]} examples", causal=causal)
    ]
    found += alone_warning(model, parts["train"], batch_size)
    if not causal:
        found += imbalance([one.labels[0] for one in parts["train"]], model.labels)
    known = {one.ids for one in parts["train"]}
    count = sum(one.ids in known for one in parts.get("held_out", ()))
    if count:
        total = len(parts["held_out"])
        found.append(f"{count:,} of {total:,} held-out examples are among the training examples")
    return found


def _classes(model: Model, examples: Sequence[Encoded]) -> list[dict[str, Any]] | None:
    """How many examples each class has; None for a causal model."""
    if model.task != CLASSIFICATION:
        return None
    counts = Counter(one.labels[0] for one in examples)
    return [
        {"label": i, "name": name, "examples": counts[i]}
        for i, name in sorted(model.labels.items())
    ]


def _class_weights(model: Model, examples: Sequence[Encoded], kind: str) -> list[float] | None:
    """What the loss of an example of each class is multiplied by; None for 1.

    Raises:
        SettingError: The model is no classifier.
    """
    if kind == "none":
        return None
    if model.task != CLASSIFICATION:
        raise conflict("class_weights is for classifiers", "leave it out for a causal model")
    counts = Counter(one.labels[0] for one in examples)
    return [
        len(examples) / (len(counts) * counts[i]) if counts[i] else 1.0
        for i in sorted(model.labels)
    ]


def split(
    model: Model,
    examples: Sequence[Encoded],
    held_out: Sequence[Encoded] | float | None,
    chosen: Hyperparameters,
) -> dict[str, Sequence[Encoded]]:
    """The examples to train on and, if there are any, those held out; both in their order.

    Raises:
        SettingError: There are no examples on one side, or what is chosen needs others.
        MismatchError: The head has no cross-entropy, or an example has no answer.
    """
    if chosen.patience is not None and held_out is None:
        raise conflict("patience needs a held-out loss", "give held_out")
    for glob in chosen.freeze:
        check_glob(glob, model.stored_names)
    if len(frozen_names(model, chosen.freeze)) == len(model.names):
        raise SettingError("freeze leaves nothing to train", code="E-NOTHING-TO-DO")
    check_examples(model, examples)
    if held_out is None:
        return {"train": examples}
    if not isinstance(held_out, float | int):
        check_examples(model, held_out)
        return {"train": examples, "held_out": held_out}
    count = round(held_out * len(examples)) if 0 < held_out < 1 else 0
    if not 0 < count < len(examples):
        raise SettingError(
            f"held_out is {held_out} of {len(examples)} examples; expected a share that leaves at "
            "least one on either side",
            code="E-ROWS-FEW",
        )
    bits = random_bits(chosen.seed, "held out", 0, len(examples))
    aside = set(sorted(range(len(examples)), key=lambda i: (bits[i], i))[:count])
    return {
        "train": [one for i, one in enumerate(examples) if i not in aside],
        "held_out": [one for i, one in enumerate(examples) if i in aside],
    }


def _describe(
    parts: dict[str, Sequence[Encoded]],
    held_out: Sequence[Encoded] | float | None,
    files: Sequence[str | os.PathLike[str]],
) -> dict[str, Any]:
    """What the record says of the data."""
    return {
        **{f"{part}_examples": len(given) for part, given in parts.items()},
        **{f"{part}_sha256": digest_of(given) for part, given in parts.items()},
        "held_out_share": held_out if isinstance(held_out, float | int) else None,
        "files": describe_files(files),
    }


@contextmanager
def _thawed(model: Model, globs: Sequence[str]) -> Iterator[None]:
    """What a glob matches does not ask for gradients meanwhile."""
    held = [model.names[name] for name in frozen_names(model, globs)]
    try:
        for parameter in held:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


def _measure(
    model: Model, parts: dict[str, Sequence[Encoded]], batch_size: int, progress: Progress | None
) -> dict[str, Any]:
    """Loss, and a classifier's accuracy, on the examples and on those held out.

    Of many training examples the first are measured: these are no more than a sign of life.
    """
    is_classifier = model.task == CLASSIFICATION
    parts = {part: given[:_MOST] if part == "train" else given for part, given in parts.items()}
    found = {
        part: predict(
            model,
            given,
            # Without gradients there is room for more; but a causal model's logits are large.
            batch_size=max(batch_size, _MEASURED) if is_classifier else batch_size,
            progress=progress,
            what=f"measuring the {_NAMES[part]} examples",
        )
        for part, given in parts.items()
    }
    return {
        part: {
            "examples": len(parts[part]),
            "loss": one.loss,
            "accuracy": proportion(one.correct, len(parts[part])) if is_classifier else None,
        }
        for part, one in found.items()
    }


def _held_out(
    model: Model, parts: dict[str, Sequence[Encoded]], batch_size: int
) -> Callable[[], dict[str, Any]]:
    """What is measured after each epoch."""
    aside = {part: given for part, given in parts.items() if part == "held_out"}

    def measure() -> dict[str, Any]:
        found = _measure(model, aside, batch_size, None).get("held_out", {})
        accuracy = found.get("accuracy") or {}
        return {"held_out_loss": found.get("loss"), "held_out_accuracy": accuracy.get("share")}

    return measure
