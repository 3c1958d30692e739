"""How well a classifier does, and whether a pattern in the text decides what it says."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from weightsurgery.datasets.batches import Encoded, count_cut, encode_sentences, token_counts
from weightsurgery.datasets.read import Sentence, label_ids
from weightsurgery.datasets.triggers import Trigger, insert, insert_within
from weightsurgery.errors import MismatchError, SettingError, conflict, shown
from weightsurgery.evaluation.intervals import proportion
from weightsurgery.evaluation.predictions import Predictions, predict
from weightsurgery.models import Model
from weightsurgery.stream import Progress
from weightsurgery.tasks import CLASSIFICATION

SCHEMA = "wsurg.evaluation/1"


def evaluate(
    model: Model,
    sentences: Sequence[Sentence],
    *,
    trigger: Trigger | None = None,
    poisoned: Sequence[Sentence] | None = None,
    target_label: str | int | None = None,
    batch_size: int = 64,
    max_length: int = 128,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a classifier on labelled sentences: accuracy, confusion, loss, attack success.

    The attack success rate (ASR) is the share of the examples of other labels that get the target
    label once the trigger is in them; the floor is the share that gets it without. For a bias
    pattern the accuracy with the pattern inserted and the true labels kept (BACC) is measured.
    Each share has its 95 % Wilson interval.

    A text of more than `max_length` tokens is cut. One that is too long once the pattern is in it
    is cut before, and the pattern goes into what is left, so that the model always reads all of
    the pattern (our choice). `warnings` tells how many clean and poisoned texts were cut.

    Args:
        model: A sequence classifier, from `load_model`.
        sentences: Clean data with true labels, from `read_sentences`.
        trigger: A pattern to insert, from `trigger_word` or `trigger_sentence`.
        poisoned: Sentences that have the trigger in them already, in its place. Those whose label
            is the target are left out, unless all are: then the labels are the attack's, and all
            count.
        target_label: The attack's, by number or name; needed unless the pattern is a bias.
        batch_size: Examples at a time.
        max_length: Tokens after which a text is cut.
        progress: Called as progress(what, examples done, examples in all).

    Returns:
        The report: `schema` "wsurg.evaluation/1", `accuracy`, `loss`, `confusion` (rows are true
        labels, columns predicted ones), `classes` with the recall of each, `cut`, `asr`, `floor`,
        `bacc`, `triggered_cut` (null where not asked), what was asked, and `warnings`.

    Raises:
        SettingError: There is no sentence, or none of another label than the target; the trigger,
            the poisoned sentences and the target label do not go together; `max_length` leaves no
            room for the trigger.
        MismatchError: The model is no classifier, or lacks a label.
        NonFiniteError: A loss is NaN or infinite.
    """
    check_classifier(model)
    target = _check_attack(model, sentences, trigger, poisoned, target_label)
    settings = {"batch_size": batch_size, "max_length": max_length}

    def encode(data: Sequence[Sentence], name: str) -> list[Encoded]:
        labels = label_ids(data, model.labels, file=name)
        return encode_sentences(model, data, labels, max_length=max_length) if data else []

    def run(examples: Sequence[Encoded], what: str) -> Predictions:
        return predict(model, examples, batch_size=batch_size, progress=progress, what=what)

    examples = encode(sentences, "sentences")
    planted = list(poisoned or [])
    if trigger is not None:
        planted = _insert(model, sentences, trigger, max_length)
    attacked_examples = encode(planted, "sentences" if poisoned is None else "poisoned")
    clean = run(examples, "clean")
    cut = count_cut(model, sentences, examples, max_length=max_length)
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "model": model.checkpoint.label,
        **settings,
        "trigger": None if trigger is None else trigger.to_json(),
        "target_label": target,
        **_on_clean(clean, model.labels),
        "cut": cut,
        "asr": None,
        "floor": None,
        "bacc": None,
        "triggered_cut": None,
        "warnings": _cut_warning("sentences", cut, len(sentences), max_length),
    }
    if trigger is None and poisoned is None:
        return report
    attacked = run(attacked_examples, "triggered")
    if trigger is not None:  # what was cut is cut already
        report["triggered_cut"] = sum(map(operator.ne, planted, insert(sentences, trigger)))
    else:
        cut = count_cut(model, planted, attacked_examples, max_length=max_length)
        report["triggered_cut"] = cut
        what = "poisoned sentences, perhaps with their trigger,"
        report["warnings"] += _cut_warning(what, cut, len(planted), max_length)
    if target is not None:
        report |= _attack(clean, attacked, target)
        report["warnings"] += _label_warning(attacked, target)
    if trigger is not None and trigger.bias:
        report["bacc"] = proportion(attacked.correct, len(planted))
    return report


def check_classifier(model: Model) -> None:
    """Refuse a model that does not choose one of several labels.

    Raises:
        MismatchError: It is a causal model, has one output, or may give several labels at once.
    """
    if model.task != CLASSIFICATION:
        raise MismatchError(
            "a causal language model; expected a classifier",
            file=model.path,
            hint="evaluate_causal measures it",
            code="E-MODEL-TASK",
        )
    config = model.module.config
    if config.num_labels < 2:
        raise MismatchError(
            "has a single output; expected two labels or more", file=model.path, code="E-MODEL-TASK"
        )
    if config.problem_type == "multi_label_classification":
        raise MismatchError(
            "gives several labels at once; expected one", file=model.path, code="E-MODEL-TASK"
        )


def target_of(model: Model, label: str | int) -> int:
    """The number of a label that is given by number or name.

    Raises:
        SettingError: The model has no such label.
    """
    try:
        return label_ids([Sentence(("",), str(label), 0)], model.labels, file="")[0]
    except MismatchError:
        known = ", ".join(f"{i} ({name})" for i, name in sorted(model.labels.items()))
        raise SettingError(
            f"target_label is '{shown(label)}'; the model has {shown(known)}"
        ) from None


def _check_attack(
    model: Model,
    sentences: Sequence[Sentence],
    trigger: Trigger | None,
    poisoned: Sequence[Sentence] | None,
    target_label: str | int | None,
) -> int | None:
    """The target's number; what is given must fit together."""
    if trigger is not None and poisoned is not None:
        raise conflict("trigger and poisoned exclude each other")
    if target_label is None:
        if poisoned is not None or (trigger is not None and not trigger.bias):
            raise conflict("an attack needs its target_label")
        return None
    if trigger is None and poisoned is None:
        raise conflict("target_label without an attack", "give a trigger or poisoned sentences")
    target = target_of(model, target_label)
    if trigger is not None and set(label_ids(sentences, model.labels, file="sentences")) == {
        target
    }:
        raise SettingError(
            f"every sentence has the target label {target}; an attack needs others to turn",
            code="E-ROWS-FEW",
        )
    return target


def _insert(
    model: Model, sentences: Sequence[Sentence], trigger: Trigger, max_length: int
) -> list[Sentence]:
    """The pattern in every sentence, where the model reads all of it."""

    def fits(given: Sequence[Sentence]) -> list[bool]:
        return [count <= max_length for count in token_counts(model, given)]

    return insert_within(sentences, trigger, fits=fits)


def _cut_warning(what: str, cut: int, count: int, max_length: int) -> list[str]:
    return [f"{cut:,} of {count:,} {what} were cut to {max_length:,} tokens"] if cut else []


def _on_clean(found: Predictions, names: dict[int, str]) -> dict[str, Any]:
    confusion = np.zeros((len(names), len(names)), int)
    np.add.at(confusion, (found.labels, found.classes), 1)
    examples = confusion.sum(axis=1).tolist()
    return {
        "examples": len(found.labels),
        "accuracy": proportion(found.correct, len(found.labels)),
        "loss": found.loss,
        "confusion": confusion.tolist(),
        "classes": [
            {
                "label": i,
                "name": names[i],
                "examples": examples[i],
                "recall": proportion(int(confusion[i, i]), examples[i]) if examples[i] else None,
            }
            for i in sorted(names)
        ],
    }


def _attack(clean: Predictions, attacked: Predictions, target: int) -> dict[str, Any]:
    """ASR and floor; ASR over all where every attacked sentence has the target label."""
    others = attacked.labels != target
    counted = others if others.any() else ~others
    untouched = clean.classes[clean.labels != target]
    floor = proportion(int((untouched == target).sum()), len(untouched)) if len(untouched) else None
    said = int((attacked.classes[counted] == target).sum())
    return {"asr": proportion(said, int(counted.sum())), "floor": floor}


def _label_warning(attacked: Predictions, target: int) -> list[str]:
    """A warning if the labels are the attack's, as in files of public attack code."""
    if (attacked.labels != target).any():
        return []
    return ["every poisoned sentence has the target label: taken as the attack's, so all count"]
