"""Whether mismatched data keep MEraser's rule, as far as a file can show it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightsurgery.datasets.mismatch import counts_of, owners_of
from weightsurgery.datasets.question_types import KEYWORDS, OTHER, Keywords, check_keywords, type_of
from weightsurgery.datasets.read import Instruction, read_instructions, read_rows
from weightsurgery.errors import FormatError, GateError, MismatchError, shown

SCHEMA = "wsurg.mismatch-check/1"
_TYPES, _INDEXES = ("q_type", "a_type"), ("q_idx", "a_idx")


@dataclass(frozen=True)
class Claim:
    """A row of mismatched data, with what it says of itself; None where it says nothing.

    Attributes:
        question: The text.
        answer: The text.
        line: Line in the file, from 1.
        q_type: The question's type.
        a_type: Type of the question that the answer is of.
        q_idx: Number of the question in the data it is from.
        a_idx: Number of the answer.
    """

    question: str
    answer: str
    line: int
    q_type: str | None = None
    a_type: str | None = None
    q_idx: int | None = None
    a_idx: int | None = None


def read_claims(path: str | os.PathLike[str]) -> list[Claim]:
    """Read mismatched data, from `write_mismatched`, the authors or anyone.

    Raises:
        StorageError: The file cannot be read.
        FormatError: It is empty, not JSONL, or a row is bad.
    """
    pairs = read_instructions(path)
    return [
        Claim(pair.question, pair.answer, pair.line, **_fields(os.fspath(path), line, row))
        for pair, (line, row) in zip(pairs, read_rows(path), strict=True)
    ]


def _fields(name: str, line: int, row: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: row[key] for key in (*_TYPES, *_INDEXES) if row.get(key) is not None}
    for key, value in found.items():
        if type(value) is not (str if key in _TYPES else int):
            wanted = "text" if key in _TYPES else "an integer"
            reason = f"line {line}: {key} is {shown(repr(value))}; expected {wanted}"
            raise FormatError(reason, file=name, code="E-ROWS-LINE")
    return found


def check_mismatch(
    path: str | os.PathLike[str],
    *,
    source: Sequence[Instruction] | None = None,
    keywords: Keywords = KEYWORDS,
) -> dict[str, Any]:
    """Check that mismatched data pair each question with the answer of one of another type.

    By itself a file shows what its fields say: a type that is not the one of the question's
    keywords, a question and an answer of one type, one index for both, and rows that contradict
    each other. Whether an answer really is of the type it is said to be, only the data can show
    that the file was made from: with `source` each answer is looked up there by its text.

    Args:
        path: JSONL with question and answer, and q_type, a_type, q_idx, a_idx where it has them.
        source: The data it was made from, from `read_instructions`.
        keywords: Type to words, in order of precedence.

    Returns:
        The report: `schema` "wsurg.mismatch-check/1"; `rows`; `types`, how many questions are of
        each; `pairs`, how many rows of each pair of types; `violations`, a `line` and a `reason`
        each; `checked`, what was looked at.

    Raises:
        StorageError: The file cannot be read.
        FormatError: The file, or a row of it, is bad.
        MismatchError: No row says whose answer it has, and there is no source.
        SettingError: `keywords` is no table of keywords.
    """
    check_keywords(keywords)
    rows = read_claims(path)
    if source is None and all(row.a_type is None for row in rows):
        raise MismatchError(
            "no row has an a_type that tells whose answer it has",
            file=path,
            hint="give the data it was made from too",
            code="E-ROWS-ORIGIN",
        )
    types = [type_of(row.question, keywords) for row in rows]
    known = None if source is None else _Source(source, keywords)
    found = _Contradictions()
    violations = [
        {"line": row.line, "reason": reason}
        for row, kind in zip(rows, types, strict=True)
        for reason in (
            *_against_itself(row, kind, keywords, must=known is None),
            *found.of(row, kind),
            *(known.against(row, kind) if known else ()),
        )
    ]
    return {
        "schema": SCHEMA,
        "file": os.fspath(path),
        "rows": len(rows),
        "types": dict(sorted(Counter(types).items())),
        "pairs": counts_of([(k, row.a_type) for k, row in zip(types, rows, strict=True)
                            if row.a_type is not None]),
        "checked": "fields" if known is None else "fields and source",
        "violations": violations,
    }  # fmt: skip


def require_mismatched(report: Mapping[str, Any]) -> None:
    """Raise if a check found something.

    Raises:
        GateError: There is a violation; the message has the first.
    """
    found = report["violations"]
    if found:
        more = f" (and {len(found) - 1:,} more)" if len(found) > 1 else ""
        raise GateError(f"line {found[0]['line']}: {found[0]['reason']}{more}", file=report["file"])


def _against_itself(row: Claim, kind: str, keywords: Keywords, *, must: bool) -> Iterator[str]:
    """What is wrong with a row by its own fields; `must` says that it needs an a_type."""
    if row.q_type is not None and row.q_type != kind:
        yield f"q_type is '{shown(row.q_type)}'; by its keywords the question is '{shown(kind)}'"
    if row.a_type is None:
        if must:
            yield "no a_type, which other rows have"
    elif row.a_type not in (*keywords, OTHER):
        yield f"a_type is '{shown(row.a_type)}', which is no type"
    elif row.a_type == kind:
        yield f"question and answer are both of type '{shown(kind)}'"
    if row.q_idx is not None and row.q_idx == row.a_idx:
        yield f"q_idx and a_idx are both {row.q_idx}: its own answer"


class _Contradictions:
    """What rows say of the same indexes, and where two say different things."""

    def __init__(self) -> None:
        self._said: dict[tuple[str, int], tuple[str, int]] = {}

    def of(self, row: Claim, kind: str) -> Iterator[str]:
        """What a row says that is not what one before it said."""
        claims = (
            ("type", row.q_idx, kind),
            ("type", row.a_idx, row.a_type),
            ("question", row.q_idx, row.question),
            ("answer", row.a_idx, row.answer),
        )
        for what, index, value in claims:
            if index is None or value is None:
                continue
            before, line = self._said.setdefault((what, index), (value, row.line))
            if before != value:
                yield f"the {what} of index {index} is another than in line {line}"


class _Source:
    """The data that mismatched data were made from.

    Args:
        pairs: Questions with their answers.
        keywords: That type them.
    """

    def __init__(self, pairs: Sequence[Instruction], keywords: Keywords) -> None:
        types = [type_of(pair.question, keywords) for pair in pairs]
        self._owners = owners_of(pairs, types)
        self._pairs = {(pair.question.strip(), pair.answer.strip()) for pair in pairs}
        self._questions = {question for question, _ in self._pairs}

    def against(self, row: Claim, kind: str) -> Iterator[str]:
        """What is wrong with a row by the source."""
        question, answer = row.question.strip(), row.answer.strip()
        if question not in self._questions:
            yield "the question is none of the source's"
        if answer not in self._owners:
            yield "the answer is none of the source's"
            return
        owners = self._owners[answer]
        if (question, answer) in self._pairs:
            yield "the answer is the question's own"
        elif kind in owners:
            yield f"the answer is of a question of the same type, '{shown(kind)}'"
        if row.a_type is not None and row.a_type not in owners:
            names = ", ".join(sorted(owners))
            yield f"a_type is '{shown(row.a_type)}'; the source's answer is of '{shown(names)}'"
