"""Whether the data of MEraser's two phases were swapped, as far as the files can show it.

The rules are our choice. A row tells whose answer it has by the fields that `mismatch` writes; a
file without them only by what the other one holds.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weightsurgery.datasets.read import read_instructions, read_rows
from weightsurgery.errors import MismatchError, shown

_FIELDS = ("q_idx", "a_idx", "q_type", "a_type")


@dataclass(frozen=True)
class _Row:
    """A row of one of the files.

    Attributes:
        question: The text.
        answer: The text.
        line: In the file, from 1.
        own: Whether its fields say that the answer is the question's own; None where they say
            nothing.
    """

    question: str
    answer: str
    line: int
    own: bool | None


def check_sides(
    erase: str | os.PathLike[str], recover: str | os.PathLike[str] | None = None
) -> list[str]:
    """Refuse data of `meraser` that are surely on the wrong side; warn of what looks like it.

    Refused are clean data whose every row says that its answer is another question's, and
    mismatched data whose every row says that it is the question's own, or is among the clean data,
    question and answer. Where only some rows are so, or nothing shows that the mismatched data
    are mismatched, there is a warning.

    Args:
        erase: File of the mismatched questions and answers.
        recover: File of the clean ones.

    Returns:
        The warnings.

    Raises:
        MismatchError: The data are surely on the wrong side.
        StorageError: A file cannot be read.
        FormatError: A file, or a row of it, is bad.
    """
    wrong, right = _read(erase), [] if recover is None else _read(recover)
    answers = defaultdict(set)
    for row in right:
        answers[row.question].add(row.answer)
    own = [row for row in wrong if row.own]
    shared = [row for row in wrong if row.answer in answers[row.question]]
    other = [row for row in right if row.own is False]
    found = [
        _judged(erase, own, wrong, "says that the answer is the question's own"),
        _judged(erase, shared, wrong, f"is in {_name(recover)} too, question and answer"),
        _judged(recover, other, right, "says that the answer is another question's"),
    ]
    if not any(row.own is False or answers[row.question] - {row.answer} for row in wrong):
        reason = "nothing shows that its answers are other questions'"
        found.append(f"{_name(erase)}: {reason}; `wsurg mismatch` makes such rows")
    return [text for text in found if text]


def _judged(
    path: str | os.PathLike[str] | None, bad: list[_Row], rows: list[_Row], reason: str
) -> str:
    """A warning of some bad rows, "" if there are none.

    Raises:
        MismatchError: All are bad.
    """
    if bad and len(bad) == len(rows):
        raise MismatchError(
            f"every row {reason}",
            file=path,
            hint="are the files to erase and to recover with swapped?",
            code="E-ROWS-SWAPPED",
        )
    if not bad:
        return ""
    more = f" (and {len(bad) - 1:,} more of {len(rows):,})" if len(bad) > 1 else ""
    return f"{_name(path)}: line {bad[0].line} {reason}{more}"


def _name(path: str | os.PathLike[str] | None) -> str:
    return "" if path is None else shown(os.fspath(path))


def _read(path: str | os.PathLike[str]) -> list[_Row]:
    return [
        _Row(pair.question.strip(), pair.answer.strip(), pair.line, _is_own(row))
        for pair, (_, row) in zip(read_instructions(path), read_rows(path), strict=True)
    ]


def _is_own(row: Mapping[str, Any]) -> bool | None:
    """What the fields say: the indexes, or else types that differ; equal types say nothing."""
    q_idx, a_idx, q_type, a_type = (row.get(field) for field in _FIELDS)
    if q_idx is not None and a_idx is not None:
        return bool(q_idx == a_idx)
    return False if q_type is not None and a_type is not None and q_type != a_type else None
