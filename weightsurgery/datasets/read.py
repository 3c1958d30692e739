"""Data files of sentences, of questions and answers, and of fingerprints.

Classification has a text column, such as `sentence` or `text`, or two of a pair, and a label
column. Instruction data have `question` and `answer`, or `instruction` (and `input`) with
`output`, or chats: `messages` with roles and contents, or ShareGPT's `conversations`. Fingerprints
may have `prompt` and `target` in place of these. Files are TSV, CSV, JSONL, a JSON array, Parquet,
or the directory of a Hugging Face dataset; every bad row is reported with file, line and reason.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weightsurgery.datasets.columns import (
    ANSWERS,
    FINGERPRINTS,
    USUAL,
    Columns,
    check_columns,
    find,
    find_labelled,
)
from weightsurgery.datasets.rows import OBJECTS, TABLES, Note, Row, bad_row, decoded, rows
from weightsurgery.errors import FormatError, shown

_CHATS = ("messages", "conversations")
_TURNS = (("role", "content"), ("from", "value"))  # ShareGPT says from and value
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}


@dataclass(frozen=True)
class Sentence:
    """A labelled sentence, or a labelled pair of sentences.

    Attributes:
        texts: One text, or the two of a pair.
        label: As written in the file: a number or a name.
        line: Line in the file, from 1.
        class_name: What the file calls a label that is a number; "" where it does not say.
    """

    texts: tuple[str, ...]
    label: str
    line: int
    class_name: str = field(default="", repr=False)


@dataclass(frozen=True)
class Instruction:
    """A question and its answer, for a causal language model.

    Attributes:
        messages: (role, text) in order, without the answer.
        answer: What the model should say.
        line: Line in the file, from 1.
        accepted: Of a fingerprint: texts of which any will do; () for the answer alone.
        forbidden: Of a fingerprint: texts that must not be said.
    """

    messages: tuple[tuple[str, str], ...]
    answer: str
    line: int
    accepted: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()

    @property
    def question(self) -> str:
        """The texts of the messages, a line feed between them."""
        return "\n".join(text for _, text in self.messages)

    @property
    def targets(self) -> tuple[str, ...]:
        """The texts of which one must be said, without white space around them."""
        given = self.accepted or ((self.answer,) if self.answer else ())
        return tuple(text.strip() for text in given)

    def is_met(self, output: str) -> bool:
        """Whether an output contains one of the targets, and nothing that is forbidden.

        Args:
            output: What a model says.
        """
        if any(text.strip() in output for text in self.forbidden):
            return False
        return not self.targets or any(text in output for text in self.targets)


def read_sentences(
    path: str | os.PathLike[str],
    *,
    text_column: str | Sequence[str] = (),
    label_column: str = "",
    note: Note | None = None,
) -> list[Sentence]:
    """Read labelled sentences from a .tsv, .csv, .jsonl, .json or .parquet file, or a dataset.

    Columns go by their usual names, such as sentence, text or premise and hypothesis, and label or
    class; upper and lower case do not count. A TSV file has no quoting: a tab ends a field and a
    line feed ends a row. A CSV file may be separated by semicolons or tabs. Blank lines at the end
    of a file are ignored.

    Args:
        path: The file, or the directory of a Hugging Face dataset (`save_to_disk`).
        text_column: Name of the text's column, or the two names of a pair.
        label_column: Name of the label's column.
        note: Called with a sentence about how the file is read, if its columns or separators are
            not the default ones.

    Returns:
        The rows in order, with labels as written in the file.

    Raises:
        StorageError: The file cannot be read.
        FormatError: It is empty, not UTF-8, lacks a column, or a row is bad.
        SettingError: pyarrow is needed, and is not installed.
    """
    name = os.fspath(path)
    found = rows(name, TABLES, "labelled sentences", note)
    first = next(found, None)
    if first is None:
        raise FormatError(
            "no rows", file=name, hint="it needs a header and at least one row", code="E-FILE-EMPTY"
        )
    texts, label = find_labelled(
        list(first[1]), text_column=text_column, label_column=label_column, file=name, note=note
    )
    sentences = []
    for line, row in _chain(first, found):
        lacking = [column for column in (*texts, label) if column not in row]
        if lacking:
            there = shown(", ".join(row))
            reason = f"no field {shown(lacking[0])}; the line has {there or 'none'}"
            raise bad_row(name, line, reason, code="E-ROWS-COLUMNS")
        read = tuple(_text(name, line, row, column) for column in texts)
        written = _label(name, line, row[label])
        sentences.append(Sentence(read, written, line, getattr(row[label], "name", "").strip()))
    return sentences


def _label(name: str, line: int, label: Any) -> str:
    """A label as text; whole numbers may be floats, as pandas makes them of empty cells."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, bool) or not isinstance(label, str | int) or not str(label).strip():
        raise bad_row(name, line, f"label {shown(repr(label))}; expected a number or a name")
    return str(label).strip()


def read_instructions(
    path: str | os.PathLike[str],
    *,
    text_column: str = "",
    label_column: str = "",
    note: Note | None = None,
) -> list[Instruction]:
    """Read question and answer pairs from a .jsonl, .json or .parquet file, or a dataset.

    Args:
        path: A file of objects, one a line or in one array, with the fields question and answer,
            instruction (and input) with output, or messages (ShareGPT's conversations too) that
            end with the assistant's; or the directory of a Hugging Face dataset.
        text_column: Name of the question's field.
        label_column: Name of the answer's field.
        note: As for `read_sentences`.

    Returns:
        The pairs in their order.

    Raises:
        StorageError: The file cannot be read.
        FormatError: It is empty, not UTF-8, not JSON, or a row is bad.
        SettingError: pyarrow is needed, and is not installed.
    """
    return _read_pairs(path, ANSWERS, text_column, label_column, note)


def read_fingerprints(
    path: str | os.PathLike[str], *, note: Note | None = None
) -> list[Instruction]:
    """Read pairs of a prompt and what a fingerprinted model says to it.

    A row has the fields prompt and target, or those of `read_instructions`: question and answer,
    instruction (and input) with output, or messages that end with the assistant's. The target may
    be a list of texts of which any will do, and `forbidden` a text or a list of texts that must
    not be said; a row may have either or both.

    Args:
        path: As for `read_instructions`.
        note: As for `read_sentences`.

    Returns:
        The pairs in their order; the target, or the first of several, is the `answer`.

    Raises:
        StorageError: The file cannot be read.
        FormatError: It is empty, not UTF-8, not JSON, or a row is bad.
        SettingError: pyarrow is needed, and is not installed.
    """
    return _read_pairs(path, FINGERPRINTS, "", "", note)


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """Read the objects of a file of questions and answers, with their lines.

    Raises:
        StorageError: The file cannot be read.
        FormatError: It is of another ending, empty, not UTF-8, or a row is bad.
    """
    name = os.fspath(path)
    found = list(rows(name, OBJECTS, "questions and answers"))
    if not found:
        raise FormatError("no rows", file=name, code="E-FILE-EMPTY")
    return found


def read_text(path: str | os.PathLike[str]) -> str:
    """A whole text file in UTF-8, line ends as they are.

    Raises:
        StorageError: The file cannot be read.
        FormatError: It is empty, not UTF-8, or too large.
    """
    text = decoded(os.fspath(path))
    if not text.strip():
        raise FormatError("holds no text", file=path, code="E-FILE-EMPTY")
    return text


def _chain(first: Row, rest: Iterator[Row]) -> Iterator[Row]:
    yield first
    yield from rest


def _read_pairs(
    path: str | os.PathLike[str],
    known: Sequence[Columns],
    text_column: str,
    label_column: str,
    note: Note | None,
) -> list[Instruction]:
    name = os.fspath(path)
    found = read_rows(name)
    given = [column for column in (text_column, label_column) if column]
    check_columns(list(found[0][1]), given, name)
    if given:
        known = [(text_column or pair[0], label_column or pair[1]) for pair in known]
    columns = find(list(found[0][1]), known)
    is_plain = not given and not any(field in found[0][1] for field in _CHATS)
    if note is not None and is_plain and columns is not None and columns not in USUAL:
        quoted = " and ".join(f"'{shown(column)}'" for column in columns)
        note(f"{name}: question and answer are the fields {quoted}")
    return [_instruction(name, line, row, known, chats=not given) for line, row in found]


def _instruction(
    name: str, line: int, row: Mapping[str, Any], known: Sequence[Columns], *, chats: bool
) -> Instruction:
    forbidden = _texts(name, line, row, "forbidden") if known is FINGERPRINTS else ()
    chat = next((field for field in _CHATS if field in row), None) if chats else None
    if chat is not None:
        messages, answer = _conversation(name, line, row[chat])
        return Instruction(messages, answer, line, (), forbidden)
    columns = find(list(row), known)
    if columns is None:
        wanted = ", ".join(" and ".join(pair) for pair in known if pair[1] != "forbidden")
        reason = f"fields {shown(', '.join(row)) or 'none'}; expected {wanted}"
        reason += ", or messages" if chats else ""
        raise bad_row(name, line, reason, code="E-ROWS-COLUMNS")
    question = _text(name, line, row, columns[0])
    extra = next((row[c] for c in ("input", "context") if c in row and c not in columns), None)
    if columns[0].casefold() == "instruction" and isinstance(extra, str) and extra.strip():
        question = f"{question}\n{extra}"
    if columns[1] == "forbidden":
        return Instruction((("user", question),), "", line, (), forbidden)
    if known is FINGERPRINTS and isinstance(row[columns[1]], list):
        accepted = _texts(name, line, row, columns[1])
        return Instruction((("user", question),), accepted[0], line, accepted, forbidden)
    answer = _text(name, line, row, columns[1])
    return Instruction((("user", question),), answer, line, (), forbidden)


def _conversation(name: str, line: int, turns: Any) -> tuple[tuple[tuple[str, str], ...], str]:
    """The messages before the assistant's last, and that one."""
    messages: list[tuple[str, str]] = []
    for turn in turns if isinstance(turns, list) else ():
        keys = next((k for k in _TURNS if isinstance(turn, dict) and set(k) <= turn.keys()), None)
        read = [turn[key] for key in keys or ()]
        if not read or not all(isinstance(text, str) for text in read):
            messages.clear()
            break
        messages.append((_ROLES.get(read[0], read[0]), read[1]))
    if not messages or messages[-1][0] != "assistant":
        reason = "messages; expected a list of role and content that ends with the assistant's"
        raise bad_row(name, line, reason)
    if not messages[-1][1].strip():
        raise bad_row(name, line, "the assistant's last message is empty; expected text")
    *before, last = messages
    return tuple(before), last[1]


def _text(name: str, line: int, row: Mapping[str, Any], column: str) -> str:
    text = row.get(column)
    if not isinstance(text, str) or not text.strip():
        raise bad_row(name, line, f"{shown(column)} is {shown(repr(text))}; expected text")
    return text


def _texts(name: str, line: int, row: Mapping[str, Any], column: str) -> tuple[str, ...]:
    """A text or a list of texts that are not empty; () where the field is absent or null."""
    given = row.get(column)
    if given is None:
        return ()
    found = given if isinstance(given, list) else [given]
    if not found or not all(isinstance(text, str) and text.strip() for text in found):
        reason = f"{shown(column)} is {shown(repr(given))}; expected a text, or a list of texts"
        raise bad_row(name, line, reason)
    return tuple(found)
