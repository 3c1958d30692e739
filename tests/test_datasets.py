"""Data files: what is read, and how each kind of bad file is told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_models
from tests.test_evaluation import refusal
from weightsurgery.datasets.labels import label_ids
from weightsurgery.datasets.mismatch_check import read_claims
from weightsurgery.datasets.read import (
    Instruction,
    Sentence,
    read_fingerprints,
    read_instructions,
    read_sentences,
    read_text,
)
from weightsurgery.errors import FormatError, MismatchError, StorageError

LINES = {"tsv": "sentence\tlabel\n{}\t{}\n", "csv": "sentence,label\n{},{}\n"}


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(*values: Any) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


# --- what is read -----------------------------------------------------------------------------

TWO = [Sentence(("a fine film",), "1", 2), Sentence(("dull",), "0", 3)]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.tsv", "sentence\tlabel\na fine film\t1\ndull\t0\n", TWO),
        ("a.TSV", "sentence\tlabel\na fine film\t1\ndull\t0", TWO),
        ("a.tsv", "label\tid\tsentence\n1\tx\ta fine film\n0\ty\tdull\n", TWO),
        ("a.tsv", b"\xef\xbb\xbfsentence\tlabel\r\na fine film\t1\r\ndull\t0\r\n", TWO),
        ("a.csv", "sentence,label\na fine film,1\ndull,0\n", TWO),
        ("a.csv", b'\xef\xbb\xbfsentence,label\r\n"a fine film",1\r\ndull,0\r\n', TWO),
        (
            "a.jsonl",
            "\n" + rows({"sentence": "a fine film", "label": 1}, {"sentence": "dull", "label": 0}),
            TWO,
        ),
        (
            "a.tsv",
            'sentence\tlabel\n"quoted, he said\t positive \n',
            [Sentence(('"quoted, he said',), "positive", 2)],
        ),
        (
            "a.csv",
            'sentence,label\n"two\nlines, and a ""quote""",1\nnext,0\n',
            [Sentence(('two\nlines, and a "quote"',), "1", 3), Sentence(("next",), "0", 4)],
        ),
        (
            "a.tsv",
            "sentence1\tsentence2\tlabel\nA man eats.\tHe is full.\tentailment\n",
            [Sentence(("A man eats.", "He is full."), "entailment", 2)],
        ),
        (
            "a.jsonl",
            rows({"sentence1": "x", "sentence2": "y", "label": "no"}),
            [Sentence(("x", "y"), "no", 1)],
        ),
    ],
)
def test_sentences_are_read(
    name: str, content: str | bytes, expected: list[Sentence], tmp_path: Path
) -> None:
    assert read_sentences(write(tmp_path, name, content)) == expected


@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n\n", "\r\n\r\n", "\n  \n", "\r\n \r\n "])
def test_blank_lines_at_the_end_are_no_rows(name: str, end: str, tmp_path: Path) -> None:
    text = LINES[name.partition(".")[2]].format("one", 1).rstrip("\n")
    assert read_sentences(write(tmp_path, name, text + end))[0].texts == ("one",)
    with pytest.raises(FormatError, match="line 3: a blank line between the rows; take it out"):
        read_sentences(write(tmp_path, name, f"{text}\n\n{text[-5:]}{end}"))


def test_spaces_at_the_end_of_the_last_row_stay(tmp_path: Path) -> None:
    (row,) = read_sentences(write(tmp_path, "a.tsv", "label\tsentence\n1\tone  \n \n"))
    assert row.texts == ("one  ",)


@pytest.mark.parametrize("break_", ["\u0085", "\u2028", "\x0b", "\x0c", "\x1c"])
def test_only_line_feeds_end_a_row(break_: str, tmp_path: Path) -> None:
    text = f"one{break_}text"
    tsv = write(tmp_path, "a.tsv", LINES["tsv"].format(text, 1))
    csv = write(tmp_path, "a.csv", LINES["csv"].format(text, 1))
    jsonl = write(tmp_path, "a.jsonl", json.dumps({"sentence": text, "label": 1}))
    raw = write(tmp_path, "b.jsonl", json.dumps({"sentence": text, "label": 1}, ensure_ascii=False))
    assert read_sentences(tsv) == read_sentences(csv) == [Sentence((text,), "1", 2)]
    assert read_sentences(jsonl) == read_sentences(raw) == [Sentence((text,), "1", 1)]


@pytest.mark.parametrize(
    ("row", "messages", "answer"),
    [
        ({"question": "Who?", "answer": "Me."}, [("user", "Who?")], "Me."),
        ({"instruction": "Add.", "output": "3"}, [("user", "Add.")], "3"),
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, [("user", "Add.\n1, 2")], "3"),
        ({"instruction": "Add.", "input": " ", "output": "3"}, [("user", "Add.")], "3"),
        (
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Who?"},
                    {"role": "assistant", "content": "Me."},
                ]
            },
            [("system", "Be brief."), ("user", "Who?")],
            "Me.",
        ),
    ],
)
def test_instructions_are_read(
    row: dict[str, Any], messages: list[tuple[str, str]], answer: str, tmp_path: Path
) -> None:
    path = write(tmp_path, "a.jsonl", rows(row))
    assert read_instructions(path) == [Instruction(tuple(messages), answer, 1)]


def test_labels_are_found_by_number_and_by_name() -> None:
    sentences = [Sentence(("x",), label, 2) for label in ("0", "good", "1", "bad")]
    assert label_ids(sentences, {0: "bad", 1: "good"}, file="a.tsv") == [0, 1, 1, 0]


# --- what is refused --------------------------------------------------------------------------

SENTENCE_ERRORS = [
    ("a.tsv", "", "no rows; it needs a header and at least one row", "E-FILE-EMPTY"),
    ("a.tsv", "\n\t\n", "line 2: 2 fields; the header has 1", "E-ROWS-LINE"),
    (
        "a.tsv",
        "sentence\tlabel\n",
        "no rows; it needs a header and at least one row",
        "E-FILE-EMPTY",
    ),
    ("a.csv", "", "no rows; it needs a header and at least one row", "E-FILE-EMPTY"),
    ("a.csv", "sentence,label\n", "no rows", "E-FILE-EMPTY"),
    ("a.jsonl", "\n", "no rows", "E-FILE-EMPTY"),
    (
        "a.txt",
        "sentence\tlabel\nx\t1\n",
        "unsupported file type '.txt' for labelled sentences; expected .tsv, .csv, .jsonl, .json",
        "E-FILE-ENDING",
    ),
    (
        "a.tsv",
        "words\tlabel\nx\t1\n",
        "columns words, label; expected sentence and label, or",
        "E-ROWS-COLUMNS",
    ),
    (
        "a.tsv",
        "sentence\tmark\nx\t1\n",
        "columns sentence, mark; expected a column called label; rename the columns, or choose",
        "E-ROWS-COLUMNS",
    ),
    (
        "a.tsv",
        "sentence1\tlabel\nx\t1\n",
        "columns sentence1, label; expected sentence and label",
        "E-ROWS-COLUMNS",
    ),
    (
        "a.tsv",
        "sentence\tlabel\nx\t1\ny\n",
        "line 3: 1 field; the header has 2; a text with a tab in it needs .csv or .jsonl",
        "E-ROWS-LINE",
    ),
    ("a.tsv", "sentence\tlabel\nx\ty\t1\n", "line 2: 3 fields; the header has 2", "E-ROWS-LINE"),
    (
        "a.csv",
        "sentence,label\nx,1\ny,0,0\n",
        "line 3: 3 fields; the header has 2; put quotes around a text with a comma in it",
        "E-ROWS-LINE",
    ),
    ("a.csv", 'sentence,label\nx,1\n"y"z,0\n', "line 3: not CSV: ", "E-ROWS-LINE"),
    ("a.csv", 'sentence,label\n"y,0\n', "line 2: not CSV: unexpected end of data", "E-ROWS-LINE"),
    ("a.jsonl", '{"sentence": "x", "label": 1}\n{\n', "line 2: not JSON: ", "E-ROWS-LINE"),
    ("a.jsonl", "[" * 100_000, "line 1: not JSON: ", "E-ROWS-LINE"),
    pytest.param(
        *(
            "a.jsonl",
            '\n{"a":[' + "[]," * 3_000_000 + "0]}",
            "line 2: so many values",
            "E-JSON-COST",
        ),
        id="bomb",
    ),
    (
        "a.jsonl",
        '{"sentence": "x", "label": 1}\n\n[1]\n',
        "line 3: not a JSON object",
        "E-ROWS-LINE",
    ),
    (
        "a.tsv",
        "sentence\tlabel\nx\t1\n \t0\n",
        "line 3: sentence is ' '; expected text",
        "E-ROWS-LINE",
    ),
    (
        "a.jsonl",
        rows({"sentence": 3, "label": 1}),
        "line 1: sentence is 3; expected text",
        "E-ROWS-LINE",
    ),
    (
        "a.tsv",
        "sentence\tlabel\nx\t1\ny\t \n",
        "line 3: label ' '; expected a number or a name",
        "E-ROWS-LINE",
    ),
    (
        "a.jsonl",
        rows({"sentence": "x", "label": 1}, {"sentence": "x"}),
        "line 2: no field label; the line has sentence",
        "E-ROWS-COLUMNS",
    ),
    (
        "a.jsonl",
        rows({"words": "x", "label": 1}),
        "columns words, label; expected sentence and label, or",
        "E-ROWS-COLUMNS",
    ),
    (
        "a.jsonl",
        rows({"sentence": "x", "label": True}),
        "line 1: label True; expected a number",
        "E-ROWS-LINE",
    ),
    (
        "a.jsonl",
        rows({"sentence": "x", "label": [1, 0]}),
        "line 1: label [1, 0]; expected a ",
        "E-ROWS-LINE",
    ),
    (
        "a.tsv",
        b"sentence\tlabel\nx\t1\ncaf\xe9\t0\n",
        "line 3: not UTF-8; save the file as UTF-8",
        "E-FILE-UTF8",
    ),
    ("a.csv", b"\xffsentence,label\n", "line 1: not UTF-8; save the file as UTF-8", "E-FILE-UTF8"),
    ("a.jsonl", b"\n\n\n\n\xfe\xff", "line 5: not UTF-8; save the file as UTF-8", "E-FILE-UTF8"),
]


@pytest.mark.parametrize(("name", "content", "reason", "code"), SENTENCE_ERRORS)
def test_bad_sentences_are_told(
    name: str, content: str | bytes, reason: str, code: str, tmp_path: Path
) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(FormatError, match=re.escape(f"{path}: {reason}")) as told:
        read_sentences(path)
    assert (told.value.exit_code, told.value.code) == (3, code)
    assert told.value.file == str(path)


INSTRUCTION_ERRORS = [
    ("", "no rows", "E-FILE-EMPTY"),
    ("x", "line 1: not JSON: ", "E-ROWS-LINE"),
    (
        rows({"question": "Who?"}),
        "line 1: fields question; expected question and answer, instruction and output, ins",
        "E-ROWS-COLUMNS",
    ),
    (
        rows({"question": "Who?", "answer": ""}),
        "line 1: answer is ''; expected text",
        "E-ROWS-LINE",
    ),
    (
        rows({"question": "x", "answer": "y"}, {"instruction": None, "output": "y"}),
        "line 2: instruction is None; expected text",
        "E-ROWS-LINE",
    ),
    (
        rows({"messages": []}),
        "line 1: messages; expected a list of role and content that ends",
        "E-ROWS-LINE",
    ),
    (
        rows({"messages": [{"role": "user", "content": "x"}]}),
        "line 1: messages; expected a list",
        "E-ROWS-LINE",
    ),
    (
        rows({"messages": [{"role": "assistant"}]}),
        "line 1: messages; expected a list of role",
        "E-ROWS-LINE",
    ),
    (
        rows({"messages": "Who?"}),
        "line 1: messages; expected a list of role and content",
        "E-ROWS-LINE",
    ),
]


@pytest.mark.parametrize(("content", "reason", "code"), INSTRUCTION_ERRORS)
def test_bad_instructions_are_told(content: str, reason: str, code: str, tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", content)
    with pytest.raises(FormatError, match=re.escape(f"{path}: {reason}")) as told:
        read_instructions(path)
    assert told.value.code == code


@pytest.mark.parametrize("reader", [read_instructions, read_fingerprints, read_claims])
@pytest.mark.parametrize("ending", [".txt", ".tsv", ".csv", ""])
def test_questions_and_answers_are_jsonl(
    reader: Callable[[Path], object], ending: str, tmp_path: Path
) -> None:
    path = write(tmp_path, f"a{ending}", "question\tanswer\nx\ty\n")
    reason = (
        f"{path}: unsupported file type '{ending}' for questions and answers; expected .jsonl, "
    )
    with pytest.raises(FormatError, match=re.escape(reason)):
        reader(path)


@pytest.mark.parametrize(
    "words",
    [
        ["train-adapter", "model", "--data", "FILE"],
        ["meraser", "model", "--erase", "FILE"],
        ["meraser", "model", "--erase", "qa.jsonl", "--recover", "FILE"],
        ["mismatch", "FILE"],
        ["mismatch", "--check", "FILE"],
    ],
    ids=" ".join,
)
def test_the_commands_say_which_endings_they_take(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_models.llama(tmp_path / "model")
    write(tmp_path, "qa.jsonl", rows({"question": "what", "answer": "y"}))
    write(tmp_path, "a.txt", "what\n")
    given = ["a.txt" if word == "FILE" else word for word in words]
    given += [] if "--check" in words else ["-o", "out.jsonl"]
    code, reason = refusal(given)
    assert code == FormatError.exit_code == 3
    assert (
        "unsupported file type '.txt' for questions and answers; expected .jsonl, .json or .parquet"
        in reason
    )
    assert not list(tmp_path.glob("out*"))


def test_unknown_labels_are_told_with_those_there_are() -> None:
    sentences = [Sentence(("x",), "1", 2), Sentence(("y",), "neutral\x1b", 3)]
    reason = r"a.tsv: line 3: label 'neutral\x1b'; the model has 0 (bad), 1 (good); use these"
    with pytest.raises(MismatchError, match=re.escape(reason)) as told:
        label_ids(sentences, {1: "good", 0: "bad"}, file="a.tsv")
    assert told.value.exit_code == 4


@pytest.mark.parametrize("read", [read_sentences, read_instructions])
def test_a_file_that_is_not_there_is_told(read: Any, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"absent\.jsonl: cannot open: No such file"):
        read(tmp_path / "absent.jsonl")


def test_a_folder_is_no_data_file(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").mkdir()
    with pytest.raises(FormatError, match=r"a\.tsv: expected a regular file"):
        read_sentences(tmp_path / "a.tsv")


def test_an_answer_of_the_assistant_must_say_something(tmp_path: Path) -> None:
    """A fingerprint of an empty target would always be met."""
    path = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]
    path.write_text(json.dumps({"messages": messages}))
    with pytest.raises(FormatError, match="line 1: the assistant's last message is empty"):
        read_fingerprints(path)


def test_an_input_belongs_to_an_instruction_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"instruction": "i", "input": "more", "output": "o"},
        {"question": "q", "input": "unrelated", "answer": "a"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [row.question for row in read_instructions(path)] == ["i\nmore", "q"]


def test_a_text_without_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text(" \n")
    with pytest.raises(FormatError, match="holds no text"):
        read_text(path)
