"""Rows of data files: the value of each column, and the row's line number."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from weightsurgery.datasets.arrow import read_dataset, read_parquet, repeated
from weightsurgery.errors import FormatError, counted, shown
from weightsurgery.formats.files import InputFile
from weightsurgery.formats.json_cost import MEMORY, MEMORY_OF_MANY, parsing_cost

Note = Callable[[str], None]
"""Called with one sentence about how a file was read."""
Row = tuple[int, dict[str, Any]]
"""Line in the file, from 1, and the value of each column."""

MAX_BYTES = 1 << 30  # of a data file
_LONG_LINE = 1 << 20  # characters; shorter lines are cheap to parse
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
OBJECTS = (".jsonl", ".json", ".parquet")  # values may be lists and objects
TABLES = (".tsv", ".csv", *OBJECTS)


def rows(name: str, kinds: Sequence[str], what: str, note: Note | None = None) -> Iterator[Row]:
    """Line, and column to value, of every row of a file with one of these endings.

    Args:
        name: The file, or the directory of a Hugging Face dataset.
        kinds: Accepted endings.
        what: What the rows are, for messages.
        note: Called with a sentence if a file is not in the format that its ending suggests.

    Raises:
        StorageError: The file cannot be read.
        FormatError: It has another ending, is not UTF-8, or a row is malformed.
        SettingError: It is of a format that needs pyarrow, which is not installed.
    """
    kind = os.path.splitext(name)[1].lower()
    if kind not in kinds and os.path.isdir(name):
        return read_dataset(name, MAX_BYTES)
    if kind not in kinds:
        known = ", ".join(kinds[:-1])
        raise FormatError(
            f"unsupported file type '{shown(kind)}' for {what}; expected {known} or {kinds[-1]}",
            file=name,
            code="E-FILE-ENDING",
        )
    if kind == ".parquet":
        return read_parquet(name, MAX_BYTES)
    text = decoded(name)
    if kind == ".csv":
        return _csv(name, text, note)
    return _tsv(name, text) if kind == ".tsv" else _json(name, text)


def decoded(name: str) -> str:
    """The text of a file in UTF-8.

    Args:
        name: The file.

    Raises:
        StorageError: It cannot be read.
        FormatError: It is not UTF-8, or too large.
    """
    data = InputFile(name).read_all(MAX_BYTES)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        hint = "save the file as UTF-8"
        raise bad_row(name, line, "not UTF-8", hint, code="E-FILE-UTF8") from None


def bad_row(
    name: str, line: int, reason: str, hint: str = "", *, code: str = "E-ROWS-LINE"
) -> FormatError:
    """The error for a row.

    Args:
        name: The file.
        line: Of the row, from 1.
        reason: What is wrong with it.
        hint: What to do.
        code: The rule that it breaks.
    """
    return FormatError(f"line {line}: {reason}", file=name, hint=hint, code=code)


# --- tables -----------------------------------------------------------------------------------


def _tsv(name: str, text: str) -> Iterator[Row]:
    # At line feeds alone: str.splitlines would cut texts at characters such as U+0085.
    lines = [line.removesuffix("\r") for line in _without_blank_end(text).split("\n")]
    header = _header(name, lines[0].split("\t"))
    for number, line in enumerate(lines[1:], 2):
        fields = line.split("\t")
        if not line.strip(" "):
            raise _blank(name, number)
        if len(fields) != len(header):
            reason = f"{counted(len(fields), 'field')}; the header has {len(header)}"
            raise bad_row(name, number, reason, "a text with a tab in it needs .csv or .jsonl")
        yield number, dict(zip(header, fields, strict=True))


def _csv(name: str, text: str, note: Note | None) -> Iterator[Row]:
    text = _without_blank_end(text)
    delimiter = _delimiter(text)
    if note is not None and delimiter != ",":
        note(f"{name}: its fields are separated by {_DELIMITERS[delimiter]}")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    try:
        header = _header(name, next(reader, []))
        for fields in reader:
            if not "".join(fields).strip(" ") and len(fields) < 2:
                raise _blank(name, reader.line_num)
            if len(fields) != len(header):
                reason = f"{counted(len(fields), 'field')}; the header has {len(header)}"
                separator = {",": "comma", ";": "semicolon", "\t": "tab"}[delimiter]
                hint = f"put quotes around a text with a {separator} in it"
                raise bad_row(name, reader.line_num, reason, hint)
            yield reader.line_num, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise bad_row(name, reader.line_num, f"not CSV: {error}") from None


def _delimiter(text: str) -> str:
    """The separator that occurs most often in the first line; a comma if none occurs."""
    first = text.partition("\n")[0]
    return max(_DELIMITERS, key=first.count)  # the first of equals


def _header(name: str, header: list[str]) -> list[str]:
    """The names of columns; two of one name are ambiguous."""
    twice = repeated(header)
    if twice is not None:
        raise bad_row(
            name, 1, f"two columns are called '{shown(twice)}'", "rename one",
            code="E-ROWS-COLUMNS",
        )  # fmt: skip
    return header


def _without_blank_end(text: str) -> str:
    """Text without the lines at its end that hold nothing, or nothing but spaces."""
    end = len(text.rstrip(" \r\n"))
    breaks = [place for place in (text.find("\r", end), text.find("\n", end)) if place >= 0]
    return text[: min(breaks, default=len(text))]  # the last row keeps its own spaces


def _blank(name: str, line: int) -> FormatError:
    return bad_row(name, line, "a blank line between the rows", "take it out")


# --- JSON -------------------------------------------------------------------------------------


def _json(name: str, text: str) -> Iterator[Row]:
    """Objects, one a line or all in one array."""
    start = len(text) - len(text.lstrip(" \t\r\n"))
    if text.startswith("[", start):
        found = _array(name, text, start)
        first = next(found, None)
        # A line such as [1, 2] is a row of the wrong kind, not an array of rows.
        if first is None or isinstance(first[1], dict):
            yield from _objects(name, first, found)
            return
        raise bad_row(name, first[0], "not a JSON object")
    yield from _lines(name, text)


def _lines(name: str, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if len(line) > _LONG_LINE and parsing_cost(line.encode()) > MEMORY:
            raise _costly(name, number)
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise bad_row(name, number, f"not JSON: {shown(error)}", _object_hint(line)) from None
        if not isinstance(row, dict):
            raise bad_row(name, number, "not a JSON object")
        yield number, row


def _object_hint(line: str) -> str:
    return "write one object per line, or one array of objects" if line.strip() == "{" else ""


def _array(name: str, text: str, start: int) -> Iterator[tuple[int, Any]]:
    """The values of an array, parsed one by one, and the line that each begins in."""
    if len(text) > _LONG_LINE and parsing_cost(text.encode()) > MEMORY_OF_MANY:
        raise _costly(name, 1)
    decode = json.JSONDecoder().raw_decode
    line, place, separators = 1 + text.count("\n", 0, start), start, "[,"
    while True:
        begin = _skip(text, place + 1)
        line += text.count("\n", place, begin)
        if separators == "[," and text.startswith("]", begin):
            place = begin
            break
        try:
            value, end = decode(text, begin)
        except (ValueError, RecursionError) as error:
            raise bad_row(name, line, f"not JSON: {shown(error)}") from None
        yield line, value
        separators = ","
        place = _skip(text, end)
        line += text.count("\n", begin, place)
        if text.startswith("]", place):
            break
        if not text.startswith(",", place):
            raise bad_row(name, line, "not JSON: expected a comma or the end of the array")
    if text[place + 1 :].strip():
        raise bad_row(name, line, "not JSON: something follows the array")


def _skip(text: str, place: int) -> int:
    """The index of the next character that is not white space."""
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def _objects(
    name: str, first: tuple[int, Any] | None, rest: Iterator[tuple[int, Any]]
) -> Iterator[Row]:
    if first is not None:
        yield first
    for line, row in rest:
        if not isinstance(row, dict):
            raise bad_row(name, line, "not a JSON object")
        yield line, row


def _costly(name: str, line: int) -> FormatError:
    reason = "so many values that parsing them would exhaust memory"
    return bad_row(name, line, reason, code="E-JSON-COST")
