"""Data files: TSV, CSV or JSONL, in UTF-8; every bad row is told with file, line and reason.

Classification has a text column `sentence` (or `sentence1` and `sentence2`) and a column `label`.
Instruction data are JSONL with `question` and `answer`, or `instruction` (and `input`) with
`output`, or `messages`; fingerprints may have `prompt` and `target` in place of these.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightsurgery.errors import FormatError, MismatchError, counted, shown
from weightsurgery.formats.files import InputFile
from weightsurgery.formats.json_cost import MEMORY, parsing_cost

MAX_BYTES = 1 << 30  # of a data file
_LONG_LINE = 1 << 20  # characters; what is shorter can cost little
_LINES = (".jsonl", ".json")  # an object a line
_TABLES = (".tsv", ".csv", *_LINES)
_SENTENCES = (("sentence",), ("sentence1", "sentence2"))
_QUESTIONS = (("question", "answer"), ("instruction", "output"))
_FINGERPRINTS = (("prompt", "target"), *_QUESTIONS)


@dataclass(frozen=True)
class Sentence:
    """A labelled sentence, or a labelled pair of sentences.

    Attributes:
        texts: One text, or the two of a pair.
        label: As the file says it: a number or a name.
        line: Line in the file, from 1.
    """

    texts: tuple[str, ...]
    label: str
    line: int


@dataclass(frozen=True)
class Instruction:
    """A question and its answer, for a causal language model.

    Attributes:
        messages: (role, text) in order, without the answer.
        answer: What the model should say.
        line: Line in the file, from 1.
    """

    messages: tuple[tuple[str, str], ...]
    answer: str
    line: int

    @property
    def question(self) -> str:
        """The texts of the messages, a line feed between them."""
        return "\n".join(text for _, text in self.messages)


def read_sentences(path: str | os.PathLike[str]) -> list[Sentence]:
    """Read labelled sentences from a .tsv, .csv or .jsonl file.

    A TSV file has no quoting: a tab ends a field and a line feed ends a row. Blank lines at the
    end of a file are no rows.

    Args:
        path: A file with the columns sentence (or sentence1 and sentence2) and label.

    Returns:
        The rows in their order, with labels as the file says them.

    Raises:
        StorageError: The file cannot be read.
        FormatError: It is empty, not UTF-8, lacks a column, or a row is bad.
    """
    name = os.fspath(path)
    rows = _rows(name, _TABLES, "labelled sentences")
    first = next(rows, None)
    if first is None:
        raise FormatError(
            "no rows", file=name, hint="it needs a header and at least one row", code="E-FILE-EMPTY"
        )
    columns = next((c for c in _SENTENCES if set(c) <= first[1].keys()), None)
    if columns is None or "label" not in first[1]:
        raise FormatError(
            f"columns {shown(', '.join(map(str, first[1])))}; expected sentence and label, "
            "or sentence1, sentence2 and label",
            file=name,
            hint="call the fields so in every line"
            if name.lower().endswith((".jsonl", ".json"))
            else "name the columns in the first line",
            code="E-ROWS-COLUMNS",
        )
    found = []
    for line, row in _chain(first, rows):
        lacking = [column for column in (*columns, "label") if column not in row]
        if lacking:
            there = shown(", ".join(row))
            reason = f"no field {lacking[0]}; the line has {there or 'none'}"
            raise _bad(name, line, reason, code="E-ROWS-COLUMNS")
        texts = tuple(_text(name, line, row, column) for column in columns)
        label = row.get("label")
        if isinstance(label, bool) or not isinstance(label, str | int) or not str(label).strip():
            raise _bad(name, line, f"label {shown(repr(label))}; expected a number or a name")
        found.append(Sentence(texts, str(label).strip(), line))
    return found


def read_instructions(path: str | os.PathLike[str]) -> list[Instruction]:
    """Read question and answer pairs from a .jsonl file.

    Args:
        path: A .jsonl file, one object a line, with the fields question and answer, instruction
            (and input) with output, or messages that end with the assistant's.

    Returns:
        The pairs in their order.

    Raises:
        StorageError: The file cannot be read.
        FormatError: It is empty, not UTF-8, not JSON, or a row is bad.
    """
    return _read_pairs(path, _QUESTIONS)


def read_fingerprints(path: str | os.PathLike[str]) -> list[Instruction]:
    """Read pairs of a prompt and what a fingerprinted model says to it, from a .jsonl file.

    A row has the fields prompt and target, or those of `read_instructions`: question and answer,
    instruction (and input) with output, or messages that end with the assistant's.

    Args:
        path: A .jsonl file, one object a line.

    Returns:
        The pairs in their order; the target is the `answer`.

    Raises:
        StorageError: The file cannot be read.
        FormatError: It is empty, not UTF-8, not JSON, or a row is bad.
    """
    return _read_pairs(path, _FINGERPRINTS)


def read_rows(path: str | os.PathLike[str]) -> list[tuple[int, dict[str, Any]]]:
    """Read the objects of a .jsonl file, questions and answers, with their lines.

    Raises:
        StorageError: The file cannot be read.
        FormatError: It is of another ending, empty, not UTF-8, or a row is bad.
    """
    name = os.fspath(path)
    found = list(_rows(name, _LINES, "questions and answers"))
    if not found:
        raise FormatError("no rows", file=name, code="E-FILE-EMPTY")
    return found


def read_text(path: str | os.PathLike[str]) -> str:
    """A whole text file in UTF-8, line ends as they are.

    Raises:
        StorageError: The file cannot be read.
        FormatError: It is empty, not UTF-8, or too large.
    """
    text = _decoded(os.fspath(path))
    if not text.strip():
        raise FormatError("holds no text", file=path, code="E-FILE-EMPTY")
    return text


def label_ids(
    sentences: Sequence[Sentence], names: Mapping[int, str], *, file: str | os.PathLike[str]
) -> list[int]:
    """The model's number of every sentence's label.

    Args:
        sentences: From `read_sentences`.
        names: The model's labels, number to name (`id2label` of its configuration).
        file: For messages.

    Raises:
        MismatchError: The model has no such label.
    """
    numbers = {**{str(i): i for i in names}, **{name: i for i, name in names.items()}}
    found = []
    for sentence in sentences:
        if sentence.label not in numbers:
            known = ", ".join(f"{i} ({name})" for i, name in sorted(names.items()))
            raise MismatchError(
                f"line {sentence.line}: label '{shown(sentence.label)}'; the model has "
                f"{shown(known)}",
                file=file,
                hint="write these numbers or names, or give the model that knows the file's labels",
                code="E-ROWS-LABEL",
            )
        found.append(numbers[sentence.label])
    return found


def _read_pairs(
    path: str | os.PathLike[str], known: Sequence[tuple[str, str]]
) -> list[Instruction]:
    name = os.fspath(path)
    return [_instruction(name, line, row, known) for line, row in read_rows(name)]


# --- rows -------------------------------------------------------------------------------------


def _chain(
    first: tuple[int, dict[str, Any]], rest: Iterator[tuple[int, dict[str, Any]]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    yield first
    yield from rest


def _rows(name: str, kinds: Sequence[str], what: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, column to value) of every row of a file with one of these endings."""
    kind = os.path.splitext(name)[1].lower()
    readers = {".tsv": _tsv, ".csv": _csv, ".jsonl": _jsonl, ".json": _jsonl}
    if kind not in kinds:
        known = ", ".join(kinds[:-1])
        raise FormatError(
            f"'{shown(kind)}' is no kind of file for {what}; expected {known} or {kinds[-1]}",
            file=name,
            code="E-FILE-ENDING",
        )
    return readers[kind](name, _decoded(name))


def _decoded(name: str) -> str:
    data = InputFile(name).read_all(MAX_BYTES)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _bad(name, line, "not UTF-8", "save the file as UTF-8", code="E-FILE-UTF8") from None


def _tsv(name: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # At line feeds alone: str.splitlines would cut texts at characters such as U+0085.
    lines = [line.removesuffix("\r") for line in _without_blank_end(text).split("\n")]
    header = lines[0].split("\t")
    for number, line in enumerate(lines[1:], 2):
        fields = line.split("\t")
        if not line.strip(" "):
            raise _blank(name, number)
        if len(fields) != len(header):
            reason = f"{counted(len(fields), 'field')}; the header has {len(header)}"
            raise _bad(name, number, reason, "a text with a tab in it needs .csv or .jsonl")
        yield number, dict(zip(header, fields, strict=True))


def _csv(name: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(_without_blank_end(text), newline=""), strict=True)
    try:
        header = next(reader, [])
        for fields in reader:
            if not "".join(fields).strip(" ") and len(fields) < 2:
                raise _blank(name, reader.line_num)
            if len(fields) != len(header):
                reason = f"{counted(len(fields), 'field')}; the header has {len(header)}"
                hint = "put quotes around a text with a comma in it"
                raise _bad(name, reader.line_num, reason, hint)
            yield reader.line_num, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise _bad(name, reader.line_num, f"not CSV: {error}") from None


def _without_blank_end(text: str) -> str:
    """Text without the lines at its end that hold nothing, or nothing but spaces."""
    end = len(text.rstrip(" \r\n"))
    breaks = [place for place in (text.find("\r", end), text.find("\n", end)) if place >= 0]
    return text[: min(breaks, default=len(text))]  # the last row keeps its own spaces


def _blank(name: str, line: int) -> FormatError:
    return _bad(name, line, "a blank line between the rows", "take it out")


def _jsonl(name: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if len(line) > _LONG_LINE and parsing_cost(line.encode()) > MEMORY:
            reason = "so many values that parsing them would exhaust memory"
            raise _bad(name, number, reason, code="E-JSON-COST")
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _bad(name, number, f"not JSON: {shown(error)}") from None
        if not isinstance(row, dict):
            raise _bad(name, number, "not a JSON object")
        yield number, row


def _instruction(
    name: str, line: int, row: Mapping[str, Any], known: Sequence[tuple[str, str]]
) -> Instruction:
    if "messages" in row:
        return _conversation(name, line, row["messages"])
    columns = next((c for c in known if set(c) <= row.keys()), None)
    if columns is None:
        wanted = ", ".join(" and ".join(pair) for pair in known)
        reason = f"fields {shown(', '.join(row))}; expected {wanted}, or messages"
        raise _bad(name, line, reason, code="E-ROWS-COLUMNS")
    question, answer = (_text(name, line, row, column) for column in columns)
    extra = row.get("input") if columns[0] == "instruction" else None
    if isinstance(extra, str) and extra.strip():
        question = f"{question}\n{extra}"
    return Instruction((("user", question),), answer, line)


def _conversation(name: str, line: int, messages: Any) -> Instruction:
    fits = isinstance(messages, list) and all(
        isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content"))
        for m in messages
    )
    if not fits or not messages or messages[-1]["role"] != "assistant":
        reason = "messages; expected a list of role and content that ends with the assistant's"
        raise _bad(name, line, reason)
    if not messages[-1]["content"].strip():
        raise _bad(name, line, "the assistant's last message is empty; expected text")
    *before, last = [(m["role"], m["content"]) for m in messages]
    return Instruction(tuple(before), last[1], line)


def _text(name: str, line: int, row: Mapping[str, Any], column: str) -> str:
    text = row.get(column)
    if not isinstance(text, str) or not text.strip():
        raise _bad(name, line, f"{column} is {shown(repr(text))}; expected text")
    return text


def _bad(
    name: str, line: int, reason: str, hint: str = "", *, code: str = "E-ROWS-LINE"
) -> FormatError:
    return FormatError(f"line {line}: {reason}", file=name, hint=hint, code=code)
