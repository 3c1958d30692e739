"""Mismatched data for MEraser's first phase: questions with the answers of other questions.

Reference:
    "MEraser: An Effective Fingerprint Erasure Approach for Large Language Models", ACL 2025,
    arXiv:2506.12551. The rule is read off the authors' released data.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from weightsurgery.datasets.question_types import KEYWORDS, OTHER, Keywords, check_keywords, type_of
from weightsurgery.datasets.read import Instruction
from weightsurgery.errors import SettingError, counted
from weightsurgery.formats.output import Output
from weightsurgery.formats.place import record_name
from weightsurgery.formats.record import record_of_data, sealed
from weightsurgery.formats.strict_json import dump
from weightsurgery.rng import random_bits


@dataclass(frozen=True)
class Mismatched:
    """A question with the answer of another; the fields of the released data.

    Attributes:
        question: The text.
        answer: That of a question of another type.
        q_type: The question's type.
        a_type: Type of the question that the answer is of.
        q_idx: Row of the question in the data, from 0.
        a_idx: Row of the answer.
    """

    question: str
    answer: str
    q_type: str
    a_type: str
    q_idx: int
    a_idx: int


def mismatch(
    pairs: Sequence[Instruction],
    *,
    size: int = 300,
    seed: int = 0,
    keywords: Keywords = KEYWORDS,
) -> list[Mismatched]:
    """Pair questions with answers of questions of another type, never with their own.

    Questions are typed by their keywords. Which are taken, with which answers, is drawn by the
    seed: questions evenly over the types as long as there are some, no answer twice while another
    will do, and answers evenly over the other types (our choices). Equal texts are one question
    or one answer: what any question of a type has for its answer is never given to a question of
    that type.

    Args:
        pairs: Questions with their answers, from `read_instructions`.
        size: Rows to make.
        seed: Any integer; same seed and data, same rows.
        keywords: Type to words, in order of precedence, as from `read_keywords`.

    Returns:
        The rows, in random order.

    Raises:
        SettingError: The data have fewer than two rows, questions of one type alone, or too few
            questions; a setting is out of range.
    """
    if size < 1:
        raise SettingError(f"size is {size}; expected at least 1")
    check_keywords(keywords)
    if len(pairs) < 2:
        raise SettingError(
            f"the data have {counted(len(pairs), 'row')}; expected at least 2", code="E-ROWS-FEW"
        )
    types = [type_of(pair.question, keywords) for pair in pairs]
    order = [*keywords, OTHER]
    present = [kind for kind in order if kind in types]
    if len(present) == 1:
        raise SettingError(
            f"all {len(pairs):,} questions are of type '{present[0]}'; expected two types or more",
            hint="give keywords, words that tell these questions apart",
            code="E-ROWS-FEW",
        )
    answers = _Answers(pairs, types, present, seed)
    questions = _questions(pairs, types, answers, seed)
    most = sum(map(len, questions.values()))
    if size > most:
        raise SettingError(
            f"size is at most {most:,} for these data, not {size:,}: {len(pairs):,} rows have "
            f"{len({pair.question.strip() for pair in pairs}):,} different questions, of which "
            f"{most:,} can have an answer of another type",
            code="E-ROWS-FEW",
        )
    rows = []
    for q in _dealt(questions, size):
        a = answers.take(types[q])
        rows.append(Mismatched(pairs[q].question, pairs[a].answer, types[q], types[a], q, a))
    return [rows[i] for i in _shuffled(len(rows), seed, "mismatch order")]


def _shuffled(count: int, seed: int, name: str) -> list[int]:
    """The numbers below `count` in random order."""
    order: list[int] = np.argsort(random_bits(seed, name, 0, count), kind="stable").tolist()
    return order


class _Answers:
    """Answers to give away, least recently taken first.

    Args:
        pairs: Questions with their answers.
        types: Of the questions.
        present: Those types, in order of precedence.
        seed: Of the order.
    """

    def __init__(
        self, pairs: Sequence[Instruction], types: Sequence[str], present: list[str], seed: int
    ) -> None:
        self._texts = [pair.answer.strip() for pair in pairs]
        self._owners = owners_of(pairs, types)
        self._waiting: dict[str, list[int]] = {kind: [] for kind in present}
        self._given: Counter[tuple[str, str]] = Counter()
        self._taken: Counter[int] = Counter()
        seen: set[str] = set()
        for row in _shuffled(len(pairs), seed, "mismatch answers"):
            if self._texts[row] not in seen:  # or the second row of a text would look untaken
                seen.add(self._texts[row])
                self._waiting[types[row]].append(row)

    def _place(self, kind: str, other: str) -> int | None:
        """Where the first answer of type `other` waits that no question of `kind` has."""
        rows = enumerate(self._waiting[other])
        return next((i for i, row in rows if kind not in self._owners[self._texts[row]]), None)

    def has_for(self, kind: str) -> bool:
        """Whether a question of this type can have any answer."""
        return any(self._place(kind, other) is not None for other in self._waiting)

    def take(self, kind: str) -> int:
        """The row of an answer for a question of this type; it goes to the end of the queue."""
        places = {other: self._place(kind, other) for other in self._waiting}
        free = {other: place for other, place in places.items() if place is not None}

        def rank(other: str) -> tuple[int, int]:
            return self._taken[self._waiting[other][free[other]]], self._given[kind, other]

        chosen = min(free, key=rank)
        row = self._waiting[chosen].pop(free[chosen])
        self._waiting[chosen].append(row)
        self._given[kind, chosen] += 1
        self._taken[row] += 1
        return row


def owners_of(pairs: Sequence[Instruction], types: Sequence[str]) -> dict[str, set[str]]:
    """Each answer's text, to the types of all questions that have it."""
    found: dict[str, set[str]] = defaultdict(set)
    for pair, kind in zip(pairs, types, strict=True):
        found[pair.answer.strip()].add(kind)
    return found


def _questions(
    pairs: Sequence[Instruction], types: Sequence[str], answers: _Answers, seed: int
) -> dict[str, list[int]]:
    """Type to the rows of its different questions in random order, where there are answers."""
    found: dict[str, list[int]] = {}
    seen: set[str] = set()
    for row in _shuffled(len(pairs), seed, "mismatch questions"):
        text = pairs[row].question.strip()
        if text not in seen:
            seen.add(text)
            found.setdefault(types[row], []).append(row)
    return {kind: found[kind] for kind in sorted(found) if answers.has_for(kind)}


def _dealt(questions: Mapping[str, list[int]], size: int) -> list[int]:
    """One question of each type in turn, until there are enough."""
    rounds = range(max(map(len, questions.values()), default=0))
    dealt = [rows[i] for i in rounds for rows in questions.values() if i < len(rows)]
    return dealt[:size]


def write_mismatched(
    rows: Sequence[Mismatched],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    inputs: Sequence[str | os.PathLike[str]] = (),
    seed: int | None = None,
    report: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write mismatched data as JSONL, an object a line, and beside it the record.

    Both appear whole or not at all; the record is `OUT.wsurg-record.json`.

    Args:
        rows: From `mismatch`.
        out: A name that ends in .jsonl.
        overwrite: Replace what is there.
        inputs: The files that the questions are from, which the output must not touch; the
            record tells their SHA-256.
        seed: The one that `mismatch` was given, for the record.
        report: From `describe_mismatched`, for the record.

    Returns:
        The record, as it was written.

    Raises:
        SettingError: `out` does not end in .jsonl.
        PolicyError: `out` exists, or is one of the inputs.
        BusyError: Another run is writing it.
        StorageError: It cannot be written.
    """
    name = os.fspath(out)
    check_name(name)
    data = b"".join(_encoded(asdict(row)) + b"\n" for row in rows)
    paths = [os.fspath(path) for path in inputs]
    last = os.path.basename(os.path.abspath(name))
    with Output(name, is_directory=False, overwrite=overwrite, inputs=paths) as output:
        output.write(last, data)
        written = {last: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
        record = sealed(_record(rows, paths, written, seed, report or {}))
        output.write(record_name(name, is_directory=False), dump(record))
        output.commit()
    return record


def _record(
    rows: Sequence[Mismatched],
    inputs: Sequence[str],
    outputs: Mapping[str, Mapping[str, Any]],
    seed: int | None,
    report: Mapping[str, Any],
) -> dict[str, Any]:
    """What made the file of what; a seed or keywords that were not told are left out."""
    told = {"seed": seed, "keywords": report.get("keywords")}
    apart = ("schema", "keywords", "warnings")
    return record_of_data(
        "mismatch",
        settings={"size": len(rows), **{n: v for n, v in told.items() if v is not None}},
        inputs=inputs,
        outputs=outputs,
        report={"mismatch": {n: v for n, v in report.items() if n not in apart}} if report else {},
        warnings=report.get("warnings", ()),
    )


def _encoded(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can only escape
        return json.dumps(row).encode()


def check_name(out: str) -> None:
    """Refuse a name that the reader of data files would not take.

    Raises:
        SettingError: It does not end in .jsonl.
    """
    if not out.lower().endswith(".jsonl"):
        raise SettingError(
            "the output is JSONL",
            file=out,
            hint="give a name ending in .jsonl",
            code="E-OUTPUT-NAME",
        )


def describe_mismatched(
    pairs: Sequence[Instruction], rows: Sequence[Mismatched], *, keywords: Keywords = KEYWORDS
) -> dict[str, Any]:
    """What `mismatch` made of the data, counted.

    Args:
        pairs: The data.
        rows: From `mismatch`.
        keywords: As for `mismatch`.

    Returns:
        `schema` "wsurg.mismatch/1"; `size` rows of `rows` in the data; how many different
        `answers`; of each of `types` the `questions` in the data, those `taken`, and the answers
        `given`; `pairs` of types with their counts; the `keywords`; `warnings`.
    """
    present = Counter(type_of(pair.question, keywords) for pair in pairs)
    taken, given = Counter(row.q_type for row in rows), Counter(row.a_type for row in rows)
    most = max(Counter(row.answer.strip() for row in rows).values())
    warnings = []
    if most > 1:
        warnings.append(f"there are few answers of other types: one is taken {most:,} times")
    return {
        "schema": "wsurg.mismatch/1",
        "rows": len(pairs),
        "size": len(rows),
        "answers": len({row.answer.strip() for row in rows}),
        "types": [
            {"type": k, "questions": present[k], "taken": taken[k], "given": given[k]}
            for k in (*keywords, OTHER)
        ],
        "pairs": counts_of([(row.q_type, row.a_type) for row in rows]),
        "keywords": {kind: list(words) for kind, words in keywords.items()},
        "warnings": warnings,
    }


def counts_of(rows: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """How often each pair of (question's type, answer's type) occurs, as reports hold it."""
    return [
        {"q_type": q_type, "a_type": a_type, "count": count}
        for (q_type, a_type), count in sorted(Counter(rows).items())
    ]
