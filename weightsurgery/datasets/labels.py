"""Map the labels of data files to the model's label ids, where names may be numbers too."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from weightsurgery.datasets.read import Sentence
from weightsurgery.datasets.rows import Note
from weightsurgery.errors import MismatchError, SettingError, shown

LabelKind = Literal["auto", "ids", "names"]
LABEL_KINDS: tuple[LabelKind, ...] = get_args(LabelKind)
# pandas writes ids as 1.0 where a row has none
_WHOLE = re.compile(r"\+?(-?[0-9]+)(?:\.0+)?")
_RARE = 3  # times fewer examples than the largest class has


@dataclass(frozen=True)
class Labels:
    """How the labels of a file are read.

    Attributes:
        table: Text in the file to label id.
        kind: "ids" or "names" where label names are numbers and the two differ; else "both".
        names: The model's labels, id to name.
        by_class: Whether the names that the file gives its numbers decide.
    """

    table: Mapping[str, int]
    kind: str
    names: Mapping[int, str]
    by_class: bool = False

    def find(self, text: str) -> int | None:
        """The id of a label; None if the model has no such label.

        A whole number may be written as 1.0, and upper and lower case of names do not count where
        they make no difference.

        Args:
            text: The label as a file or a user writes it.
        """
        text = text.strip()
        if text in self.table:
            return self.table[text]
        whole = _WHOLE.fullmatch(text)
        if whole:
            return self.table.get(whole[1])
        alike = {i for name, i in self.table.items() if name.casefold() == text.casefold()}
        return alike.pop() if len(alike) == 1 else None

    def id_of(self, sentence: Sentence) -> int | None:
        """The id of a sentence's label; None if the model has no such label."""
        if not (self.by_class and sentence.class_name):
            return self.find(sentence.label)
        return _folded(self.names).get(sentence.class_name.casefold())

    @property
    def known(self) -> str:
        """The model's labels, for messages."""
        return shown(", ".join(f"{i} ({name})" for i, name in sorted(self.names.items())))


def settle_labels(
    sentences: Iterable[Sentence],
    names: Mapping[int, str],
    *,
    file: str | os.PathLike[str],
    label_kind: str = "auto",
    note: Note | None = None,
) -> Labels:
    """Decide whether the labels of a file are the model's ids or its label names.

    Usually both may be used. Where the names are numbers themselves and are not their own ids, as
    "1" to "5" for the ids 0 to 4, the whole file decides: if its labels can only be ids, or only
    be names, they are; if they can be both, they are ambiguous.

    A file of Hugging Face datasets may name the classes that its numbers stand for. If the model
    has one of these names, they decide, unless `label_kind` is "ids".

    Args:
        sentences: Of the file, from `read_sentences`.
        names: The model's labels, id to name (`id2label` of its configuration).
        file: For messages.
        label_kind: "ids" or "names" decides it, "auto" goes by the labels.
        note: Called with a sentence if the labels decided it.

    Raises:
        MismatchError: The labels can be ids as well as names.
        SettingError: The kind is unknown.
    """
    if label_kind not in LABEL_KINDS:
        known = ", ".join(LABEL_KINDS)
        raise SettingError(f"label_kind is '{shown(label_kind)}'; expected {known}")
    sentences = list(sentences)
    if label_kind != "ids" and _shares_names(sentences, names):
        return _by_class(sentences, names, os.fspath(file), note)
    ids = {str(i): i for i in names}
    by_name = {name.strip(): i for i, name in names.items()}
    whole = {name: match[1] for name in by_name if (match := _WHOLE.fullmatch(name))}
    own = {number: by_name[name] for name, number in whole.items()}
    both = Labels({**ids, **by_name}, "both", names)
    if all(ids.get(number, i) == i for number, i in own.items()):
        return both
    as_ids = Labels({**{n: i for n, i in by_name.items() if n not in whole}, **ids}, "ids", names)
    as_names = Labels({**by_name, **own}, "names", names)
    if label_kind != "auto":
        return as_ids if label_kind == "ids" else as_names
    given = {one.label for one in sentences}
    found = [{text: one.find(text) for text in given} for one in (as_ids, as_names)]
    fits = [None not in one.values() for one in found]
    if all(fits) and found[0] != found[1]:
        raise MismatchError(
            f"its labels may be label ids or label names: the model has {as_ids.known}",
            file=file,
            hint="choose label_kind=ids or label_kind=names",
            code="E-ROWS-LABEL-KIND",
        )
    chosen = as_names if fits == [False, True] else as_ids
    if note is not None and any(fits):
        other = "names" if chosen is as_ids else "ids"
        text = f"{os.fspath(file)}: its labels are read as label {chosen.kind}, not {other}"
        note(f"{text}; the model has {chosen.known}")
    return chosen


def _folded(names: Mapping[int, str]) -> dict[str, int]:
    return {name.strip().casefold(): i for i, name in names.items()}


def _shares_names(sentences: Iterable[Sentence], names: Mapping[int, str]) -> bool:
    """True if the file names a class as the model does."""
    return not _folded(names).keys().isdisjoint(one.class_name.casefold() for one in sentences)


def _by_class(
    sentences: Sequence[Sentence], names: Mapping[int, str], file: str, note: Note | None
) -> Labels:
    """Labels of a file that names its classes; with a note if the model numbers them otherwise."""
    table = {str(i): i for i in names} | {name.strip(): i for i, name in names.items()}
    labels = Labels(table, "both", names, by_class=True)
    for one in sentences:
        i = labels.id_of(one)
        if note is not None and i is not None and one.class_name and one.label != str(i):
            text = f"{file}: its labels are read by the names of its classes"
            note(f"{text}: {one.label} is '{shown(one.class_name)}', the model's label {i}")
            break
    return labels


def label_ids(
    sentences: Sequence[Sentence],
    names: Mapping[int, str],
    *,
    file: str | os.PathLike[str],
    label_kind: str = "auto",
    note: Note | None = None,
) -> list[int]:
    """The model's id of every sentence's label.

    Args:
        sentences: From `read_sentences`.
        names: The model's labels, id to name (`id2label` of its configuration).
        file: For messages.
        label_kind: As for `settle_labels`.
        note: As for `settle_labels`.

    Raises:
        MismatchError: The model has no such label, or the labels can be ids as well as names.
        SettingError: The kind is unknown.
    """
    labels = settle_labels(sentences, names, file=file, label_kind=label_kind, note=note)
    return ids_of(sentences, labels, file=file)


def ids_of(
    sentences: Sequence[Sentence], labels: Labels, *, file: str | os.PathLike[str]
) -> list[int]:
    """The model's id of every sentence's label, read as it was settled.

    Args:
        sentences: From `read_sentences`.
        labels: From `settle_labels`.
        file: For messages.

    Raises:
        MismatchError: The model has no such label.
    """
    found = []
    for sentence in sentences:
        i = labels.id_of(sentence)
        if i is None:
            hint = "use these ids or names, or a model that has the file's labels"
            if sentence.label == "-1":
                hint = "-1 stands for a hidden label: use a file with the true labels"
            label = (labels.by_class and sentence.class_name) or sentence.label
            raise MismatchError(
                f"line {sentence.line}: label '{shown(label)}'; the model has {labels.known}",
                file=file,
                hint=hint,
                code="E-ROWS-LABEL",
            )
        found.append(i)
    return found


def imbalance(ids: Sequence[int], names: Mapping[int, str]) -> list[str]:
    """A warning if a class has few of the examples, or none.

    Few are less than a third of those that the largest class has (our choice).

    Args:
        ids: The label id of every example.
        names: The model's labels, id to name.
    """
    counts = Counter(ids)
    largest = max(counts.values(), default=0)
    if all(counts[i] * _RARE >= largest for i in names):
        return []
    each = ", ".join(f"{shown(name)} {counts[i]:,}" for i, name in sorted(names.items()))
    return [f"the classes are not balanced; examples: {each}"]
