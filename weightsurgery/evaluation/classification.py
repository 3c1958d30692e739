"""How well a classifier does, and whether a pattern in the text decides what it says."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightsurgery.datasets.batches import (
    Encoded,
    count_cut,
    cut_warning,
    encode_sentences,
    token_counts,
)
from weightsurgery.datasets.labels import Labels, ids_of, settle_labels
from weightsurgery.datasets.read import Sentence
from weightsurgery.datasets.sizes import alone_warning
from weightsurgery.datasets.triggers import Trigger, all_of, insert, insert_within
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
    trigger: Trigger | Sequence[Trigger] | None = None,
    poisoned: Sequence[Sentence] | None = None,
    target_label: str | int | None = None,
    label_kind: str = "auto",
    batch_size: int = 64,
    max_length: int = 128,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a classifier on labelled sentences: accuracy, confusion, loss, attack success.

    The attack success rate (ASR) is the share of the examples of other labels that get the target
    label once the trigger is in them; the floor is the share that gets it without. For a bias
    pattern the accuracy with the pattern inserted and the true labels kept (BACC) is measured.
    Each share has its 95 % Wilson interval.

    Of several triggers each is measured on its own, and then all of them together in each text: an
    attack lives on in any trigger that still works.

    A text of more than `max_length` tokens is cut. One that is too long once the pattern is in it
    is cut before, and the pattern goes into what is left, so that the model always reads all of
    the pattern (our choice). `warnings` tells how many clean and poisoned texts were cut, and
    whether other label ids would explain the confusion table.

    Args:
        model: A sequence classifier, from `load_model`.
        sentences: Clean data with true labels, from `read_sentences`.
        trigger: A pattern to insert, or several, from `trigger_word` or `trigger_sentence`.
        poisoned: Sentences that have the trigger in them already, in its place. Those whose label
            is the target are left out, unless all are: then the labels are the attack's, and all
            count.
        target_label: The attack's, by id or name; needed unless the pattern is a bias.
        label_kind: Whether labels are "ids" or "names", where they can be both; "auto" goes by
            those of `sentences`.
        batch_size: Examples at a time.
        max_length: Tokens after which a text is cut.
        progress: Called as progress(what, examples done, examples in all).

    Returns:
        The report: `schema` "wsurg.evaluation/1", `accuracy`, `loss`, `confusion` (rows are true
        labels, columns predicted ones), `classes` with the recall of each, `cut`, `asr`, `floor`,
        `bacc`, `triggered_cut` (null where not asked; of all triggers together), `triggers`, what
        each of them does alone, what was asked, and `warnings`.

    Raises:
        SettingError: There is no sentence, or none of another label than the target; the trigger,
            the poisoned sentences and the target label do not go together; `max_length` leaves no
            room for the trigger.
        MismatchError: The model is no classifier, lacks a label, or the labels can be ids as well
            as names.
        NonFiniteError: A loss is NaN or infinite.
    """
    check_classifier(model)
    triggers = all_of(trigger)
    labels = settle_labels(sentences, model.labels, file="sentences", label_kind=label_kind)
    target = _check_attack(labels, sentences, triggers, poisoned, target_label)
    run = _Run(model, labels, target, batch_size, max_length, progress)
    examples = run.encode(sentences, "sentences")
    planted = [run.plant(sentences, group) for group in _groups(triggers)]
    given = None if poisoned is None else run.encode(poisoned, "poisoned")
    clean = run.predict(examples, "clean")
    first = triggers[0].to_json() if len(triggers) == 1 else None
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "model": model.checkpoint.label,
        "batch_size": batch_size,
        "max_length": max_length,
        "label_kind": labels.kind,
        "trigger": first,
        "target_label": target,
        **_on_clean(clean, model.labels),
        "cut": count_cut(examples),
        **_NOT_ASKED,
        "triggers": [],
        "warnings": [
            *cut_warning(examples, "sentences"),
            *alone_warning(model, examples, batch_size),
            *order_warning(clean, model.labels),
        ],
    }
    if triggers:
        found = [run.attack(clean, sentences, *one) for one in planted]
        alone = found[: len(triggers)]
        report |= found[-1]
        report["triggers"] = [
            {**one.to_json(), **{key: said[key] for key in ("asr", "bacc", "triggered_cut")}}
            for one, said in zip(triggers, alone, strict=True)
        ]
    if given is not None:
        attacked = run.predict(given, "triggered")
        report |= {**_attack(clean, attacked, target), "triggered_cut": count_cut(given)}
        what = "poisoned sentences, perhaps with their trigger,"
        report["warnings"] += [*cut_warning(given, what), *_label_warning(attacked, target)]
    return report


_NOT_ASKED: dict[str, Any] = dict.fromkeys(("asr", "floor", "bacc", "triggered_cut"))


def _groups(triggers: Sequence[Trigger]) -> list[tuple[Trigger, ...]]:
    """Each trigger alone, then all together if there are several."""
    alone: list[tuple[Trigger, ...]] = [(one,) for one in triggers]
    return [*alone, tuple(triggers)] if len(triggers) > 1 else alone


@dataclass(frozen=True)
class _Run:
    """How an evaluation computes.

    Attributes:
        model: The classifier.
        labels: How labels are read.
        target: The attack's label id.
        batch_size: Examples at a time.
        max_length: Tokens after which a text is cut.
        progress: Called with what, examples done, examples in all.
    """

    model: Model
    labels: Labels
    target: int | None
    batch_size: int
    max_length: int
    progress: Progress | None

    def encode(self, data: Sequence[Sentence], name: str) -> list[Encoded]:
        """Sentences as numbers; `name` is for messages."""
        ids = ids_of(data, self.labels, file=name)
        return encode_sentences(self.model, data, ids, max_length=self.max_length) if data else []

    def predict(self, examples: Sequence[Encoded], what: str) -> Predictions:
        """What the model says of them."""
        return predict(
            self.model, examples, batch_size=self.batch_size, progress=self.progress, what=what
        )

    def plant(
        self, sentences: Sequence[Sentence], triggers: tuple[Trigger, ...]
    ) -> tuple[tuple[Trigger, ...], list[Sentence]]:
        """The patterns in every sentence, where the model reads all of them."""

        def fits(given: Sequence[Sentence]) -> list[bool]:
            return [count <= self.max_length for count in token_counts(self.model, given)]

        return triggers, insert_within(sentences, triggers, fits=fits)

    def attack(
        self,
        clean: Predictions,
        sentences: Sequence[Sentence],
        triggers: tuple[Trigger, ...],
        planted: Sequence[Sentence],
    ) -> dict[str, Any]:
        """What these triggers do, in every text."""
        attacked = self.predict(self.encode(planted, "sentences"), "triggered")
        found = {} if self.target is None else _attack(clean, attacked, self.target)
        found = {**_NOT_ASKED, **found}
        if triggers[0].bias:
            found["bacc"] = proportion(attacked.correct, len(planted))
        # What was cut is cut already.
        cut = sum(map(operator.ne, planted, insert(sentences, triggers)))
        return {**found, "triggered_cut": cut}


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


def target_of(labels: Labels, label: str | int) -> int:
    """The id of a target label that is given by id or name.

    Args:
        labels: How labels are read, from `settle_labels`.
        label: An id, if it is an int; else a label as in the data.

    Raises:
        SettingError: The model has no such label.
    """
    found = labels.find(label) if isinstance(label, str) else label
    if found is None or found not in labels.names:
        raise SettingError(f"target_label is '{shown(label)}'; the model has {labels.known}")
    return found


def _check_attack(
    labels: Labels,
    sentences: Sequence[Sentence],
    triggers: Sequence[Trigger],
    poisoned: Sequence[Sentence] | None,
    target_label: str | int | None,
) -> int | None:
    """The target's id; what is given must fit together."""
    if triggers and poisoned is not None:
        raise conflict("trigger and poisoned exclude each other")
    if target_label is None:
        if poisoned is not None or (triggers and not triggers[0].bias):
            raise conflict("an attack needs its target_label")
        return None
    if not triggers and poisoned is None:
        raise conflict("target_label without an attack", "give a trigger or poisoned sentences")
    target = target_of(labels, target_label)
    if triggers and set(ids_of(sentences, labels, file="sentences")) == {target}:
        raise SettingError(
            f"every sentence has the target label {target}; an attack needs others to turn",
            code="E-ROWS-FEW",
        )
    return target


def _on_clean(found: Predictions, names: dict[int, str]) -> dict[str, Any]:
    confusion = _confusion(found, names)
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


def order_warning(found: Predictions, names: Mapping[int, str]) -> list[str]:
    """A warning if the labels in another order would fit much better.

    A data set may number its labels otherwise than the model does: MNLI's come in two orders. Of
    all one-to-one assignments of labels to classes the one with the most hits is compared with the
    labels as they are. It is told if its 95 % interval lies above both that of the accuracy and
    the share of the most frequent label (our choice).

    Args:
        found: Of clean examples.
        names: The model's labels, id to name.
    """
    from scipy.optimize import linear_sum_assignment

    confusion = _confusion(found, names)
    rows, columns = linear_sum_assignment(-confusion)
    best = proportion(int(confusion[rows, columns].sum()), len(found.labels))
    now = proportion(found.correct, len(found.labels))
    most = confusion.sum(axis=1).max() / len(found.labels)
    if best["low"] <= max(now["high"], most):
        return []
    moved = [(i, j) for i, j in zip(rows.tolist(), columns.tolist(), strict=True) if i != j]
    used = [(i, j) for i, j in moved if confusion[i].any()]
    order = ", ".join(f"{i} as {j} ({shown(names[j])})" for i, j in used)
    text = (
        f"accuracy would be {100 * best['share']:.1f} %, not {100 * now['share']:.1f} %, with "
        f"label {order}: does the file number its labels in another order than the model?"
    )
    return [text]


def _confusion(found: Predictions, names: Mapping[int, str]) -> NDArray[np.int64]:
    """Counts: rows are true labels, columns predicted ones."""
    confusion = np.zeros((len(names), len(names)), np.int64)
    np.add.at(confusion, (found.labels, found.classes), 1)
    return confusion


def _attack(clean: Predictions, attacked: Predictions, target: int | None) -> dict[str, Any]:
    """ASR and floor; ASR over all where every attacked sentence has the target label."""
    others = attacked.labels != target
    counted = others if others.any() else ~others
    untouched = clean.classes[clean.labels != target]
    floor = proportion(int((untouched == target).sum()), len(untouched)) if len(untouched) else None
    said = int((attacked.classes[counted] == target).sum())
    return {"asr": proportion(said, int(counted.sum())), "floor": floor}


def _label_warning(attacked: Predictions, target: int | None) -> list[str]:
    """A warning if the labels are the attack's, as in files of public attack code."""
    if (attacked.labels != target).any():
        return []
    return ["every poisoned sentence has the target label: taken as the attack's, so all count"]
