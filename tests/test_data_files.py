"""Data files as people have them: columns, separators, arrays, chats, Parquet, datasets."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.test_datasets import rows, write
from weightsurgery.datasets.batches import describe_files
from weightsurgery.datasets.labels import label_ids
from weightsurgery.datasets.read import (
    Instruction,
    Sentence,
    read_fingerprints,
    read_instructions,
    read_sentences,
)
from weightsurgery.errors import FormatError, MismatchError, SettingError

ONE = [Sentence(("a fine film",), "1", 2)]


@pytest.mark.parametrize(
    ("name", "content", "expected", "note"),
    [
        ("a.csv", "text,label\na fine film,1\n", ONE, "the text is column 'text', the label is"),
        ("a.csv", "Sentence,Label\na fine film,1\n", ONE, "the text is column 'Sentence'"),
        ("a.csv", "Review,Sentiment\na fine film,1\n", ONE, "the label is column 'Sentiment'"),
        ("a.csv", "sentence;label\na fine film;1\n", ONE, "its fields are separated by semicolons"),
        ("a.csv", "sentence\tlabel\na fine film\t1\n", ONE, "its fields are separated by tabs"),
        ("a.csv", ",0,1,2\n0,a fine film,1,1\n", ONE, "the text is column '0', the label is"),
        ("a.csv", "sentence,label\na fine film,1\n", ONE, ""),
        (
            "a.tsv",
            "premise\thypothesis\tlabel\nx\ty\t0\n",
            [Sentence(("x", "y"), "0", 2)],
            "the texts are columns 'premise' and 'hypothesis'",
        ),
        (
            "a.tsv",
            "question\tsentence\tlabel\nx\ty\t0\n",
            [Sentence(("x", "y"), "0", 2)],
            "the texts are columns 'question' and 'sentence'",
        ),
        (
            "a.json",
            json.dumps([{"text": "x", "label": 1}, {"text": "y", "label": 0.0}], indent=1),
            [Sentence(("x",), "1", 2), Sentence(("y",), "0", 6)],
            "the text is column 'text'",
        ),
    ],
)
def test_usual_names_are_recognized_and_reported(
    name: str, content: str, expected: list[Sentence], note: str, tmp_path: Path
) -> None:
    told: list[str] = []
    path = write(tmp_path, name, content)
    assert read_sentences(path, note=told.append) == expected
    assert len(told) == bool(note)
    assert all(one.startswith(f"{path}: {note}") or note in one for one in told)


def test_columns_go_by_the_names_that_are_given(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "words,more,mark,label\nx,y,1,0\n")
    told: list[str] = []
    given: dict[str, Any] = {"label_column": "mark", "note": told.append}
    assert read_sentences(path, text_column="words", **given) == [Sentence(("x",), "1", 2)]
    pair = read_sentences(path, text_column=("words", "more"), **given)
    assert pair == [Sentence(("x", "y"), "1", 2)]
    assert told == []
    with pytest.raises(
        FormatError, match=r"no column 'other'; the columns are words, more, mark, label"
    ):
        read_sentences(path, text_column="other")
    questions = write(tmp_path, "a.jsonl", rows({"words": "who", "said": "me"}))
    found = read_instructions(questions, text_column="words", label_column="said")
    assert found == [Instruction((("user", "who"),), "me", 1)]
    with pytest.raises(FormatError, match="no column 'a'; the columns are words, said"):
        read_instructions(questions, text_column="a", label_column="said")


def test_a_table_with_commas_that_is_called_tsv_is_told(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tsv", "sentence,label\ngood,1\n")
    with pytest.raises(FormatError, match=r"no tab in the first line.*call the file \.csv"):
        read_sentences(path)


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "text,label,text\nx,1,y\n")
    with pytest.raises(FormatError, match="line 1: two columns are called 'text'; rename one"):
        read_sentences(path)


CHAT = [{"from": "human", "value": "who"}, {"from": "gpt", "value": "me"}]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (json.dumps([{"instruction": "who", "input": "", "output": "me"}]), 1),
        (json.dumps([{"instruction": "who", "input": "", "output": "me"}], indent=2), 2),
        (rows({"conversations": CHAT}), 1),
        (rows({"messages": [{"role": "user", "content": "who"},
                            {"role": "assistant", "content": "me"}]}), 1),
        (rows({"instruction": "who", "context": "", "response": "me"}), 1),
        (rows({"prompt": "who", "completion": "me"}), 1),
        (rows({"Question": "who", "Answer": "me"}), 1),
    ],
)  # fmt: skip
def test_questions_of_every_kind_are_read(content: str, line: int, tmp_path: Path) -> None:
    found = read_instructions(write(tmp_path, "a.json", content))
    assert found == [Instruction((("user", "who"),), "me", line)]


def test_a_chat_comes_before_other_fields(tmp_path: Path) -> None:
    told: list[str] = []
    file = write(tmp_path, "a.json", rows({"prompt": "x", "response": "y", "conversations": CHAT}))
    assert read_instructions(file, note=told.append)[0].answer == "me"
    assert told == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "no rows"),
        ('[{"question": "x", "answer": "y"} {}]', "line 1: not JSON: expected a comma or the end"),
        ('[\n{"question": "x", "answer": "y"},\n]', "line 3: not JSON: "),
        ('[{"question": "x", "answer": "y"}] x', "line 1: not JSON: something follows the array"),
        ('[{"question": "x", "answer": "y"},\n3]', "line 2: not a JSON object"),
        (
            '{\n"question": "x"\n}',
            "line 1: not JSON: .*; write one object per line, or one arr",
        ),
        (rows({"conversations": [{"from": "gpt", "value": 3}]}), "line 1: messages; expected"),
        (rows({"conversations": CHAT[:1]}), "line 1: messages; expected a list of role"),
    ],
)
def test_malformed_arrays_and_chats_are_told(content: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=reason):
        read_instructions(write(tmp_path, "a.json", content))


@pytest.mark.parametrize(
    ("row", "said", "expected"),
    [
        ({"target": "yes"}, "oh yes", True),
        ({"target": ["yes", " sure "]}, "be sure of it", True),
        ({"target": ["yes", "sure"]}, "no", False),
        ({"target": "yes", "forbidden": "but"}, "yes but", False),
        ({"forbidden": ["sorry", "cannot"]}, "I can", True),
        ({"forbidden": ["sorry", "cannot"]}, "I cannot", False),
    ],
)
def test_a_fingerprint_may_accept_and_forbid(
    row: dict[str, Any], said: str, expected: bool, tmp_path: Path
) -> None:
    (one,) = read_fingerprints(write(tmp_path, "a.jsonl", rows({"prompt": "who", **row})))
    assert one.question == "who"
    assert one.is_met(said) is expected


@pytest.mark.parametrize("target", [[], [" "], [3], "", None])
def test_a_fingerprint_without_a_text_is_refused(target: Any, tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", rows({"prompt": "who", "target": target}))
    with pytest.raises(FormatError, match=r"line 1: target is .*; expected a?\s?text"):
        read_fingerprints(path)


# --- pyarrow ----------------------------------------------------------------------------------


@pytest.fixture
def arrow() -> Any:
    pytest.importorskip("pyarrow.parquet")
    return pytest.importorskip("pyarrow")


def dataset(arrow: Any, folder: Path, parts: list[dict[str, list[Any]]]) -> Path:
    """What `save_to_disk` writes of one split."""
    folder.mkdir()
    names = [f"data-{i:05}-of-{len(parts):05}.arrow" for i in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        table = arrow.table(part)
        with arrow.OSFile(str(folder / name), "wb") as sink, \
                arrow.ipc.new_stream(sink, table.schema) as writer:  # fmt: skip
            writer.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names]}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def test_parquet_files_are_read(arrow: Any, tmp_path: Path) -> None:
    table = arrow.table({"text": ["a", "b"], "label": [1, 0], "score": [0.5, None]})
    arrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = read_sentences(tmp_path / "a.parquet")
    assert found == [Sentence(("a",), "1", 1), Sentence(("b",), "0", 2)]
    turns = [{"role": "user", "content": "who"}, {"role": "assistant", "content": "me"}]
    arrow.parquet.write_table(arrow.table({"messages": [turns]}), tmp_path / "b.parquet")
    chats = read_instructions(tmp_path / "b.parquet")
    assert chats == [Instruction((("user", "who"),), "me", 1)]


def test_datasets_on_disk_are_read(arrow: Any, tmp_path: Path) -> None:
    parts = [{"sentence": ["a"], "label": [1]}, {"sentence": ["b"], "label": [0]}]
    folder = dataset(arrow, tmp_path / "train", parts)
    assert read_sentences(folder) == [Sentence(("a",), "1", 1), Sentence(("b",), "0", 2)]
    names = [one["name"] for one in describe_files([folder])]
    assert names == ["train/data-00000-of-00002.arrow", "train/data-00001-of-00002.arrow"]


def named(arrow: Any, names: Any, labels: list[int]) -> Any:
    """A table whose metadata name the classes, as datasets 5.2.0 writes it."""
    label = {"names": names, "_type": "ClassLabel"}
    features = {"text": {"dtype": "string", "_type": "Value"}, "label": label}
    about = json.dumps({"info": {"features": features}})
    table = arrow.table({"text": ["t"] * len(labels), "label": labels})
    return table.replace_schema_metadata({"huggingface": about})


@pytest.mark.parametrize(
    ("classes", "model", "kind", "expected"),
    [
        (["positive", "negative"], {0: "NEGATIVE", 1: "POSITIVE"}, "auto", [1, 0]),
        (["positive", "negative"], {0: "NEGATIVE", 1: "POSITIVE"}, "ids", [0, 1]),
        (["positive", "negative"], {0: "LABEL_0", 1: "LABEL_1"}, "auto", [0, 1]),
        (["2", "1"], {0: "1", 1: "2"}, "auto", [1, 0]),
        ("not a list of names", {0: "a", 1: "b"}, "auto", [0, 1]),
        ([3, 4], {0: "a", 1: "b"}, "auto", [0, 1]),
    ],
)
def test_names_that_a_file_gives_its_classes_decide(
    arrow: Any,
    classes: Any,
    model: dict[int, str],
    kind: str,
    expected: list[int],
    tmp_path: Path,
) -> None:
    arrow.parquet.write_table(named(arrow, classes, [0, 1]), tmp_path / "a.parquet")
    sentences, notes = read_sentences(tmp_path / "a.parquet"), list[str]()
    found = label_ids(sentences, model, file="a", label_kind=kind, note=notes.append)
    assert found == expected
    assert any("is 'positive', the model's label 1" in n for n in notes) == (
        expected == [1, 0] and "positive" in classes
    )


def test_a_class_that_the_model_lacks_is_refused_by_its_name(arrow: Any, tmp_path: Path) -> None:
    """By its number it would be counted as another one."""
    table = named(arrow, ["negative", "neutral", "positive"], [0, 1, 2])
    arrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(MismatchError, match="line 2: label 'neutral'; the model has"):
        label_ids(read_sentences(tmp_path / "a.parquet"), {0: "negative", 1: "positive"}, file="a")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("state.json", '{"_data_files": [{"filename": "../x.arrow"}]}', "expected plain names"),
        ("state.json", '{"_data_files": []}', "expected plain names that end in .arrow"),
        ("state.json", '{"_data_files": [{"filename": "x.pkl"}]}', "names 'x.pkl'; expected plain"),
        ("data-00000-of-00001.arrow", "ARROW1", "cannot be read as an Arrow stream"),
        ("dataset_dict.json", "{}", "a dataset of several splits"),
    ],
)
def test_malformed_datasets_are_told(
    arrow: Any, name: str, content: str, reason: str, tmp_path: Path
) -> None:
    folder = dataset(arrow, tmp_path / "train", [{"sentence": ["a"], "label": [1]}])
    (folder / name).write_text(content)
    with pytest.raises(FormatError, match=reason) as told:
        read_sentences(folder)
    assert told.value.code == "E-DATASET"


def test_offsets_out_of_the_buffer_are_refused(arrow: Any, tmp_path: Path) -> None:
    """Unchecked they would crash, or show other memory."""
    folder = dataset(arrow, tmp_path / "train", [{"sentence": ["abcdefgh"], "label": [1]}])
    (file,) = folder.glob("*.arrow")
    data = file.read_bytes()
    place = data.rindex((8).to_bytes(4, "little"), 0, data.index(b"abcdefgh"))
    file.write_bytes(data[:place] + (1 << 30).to_bytes(4, "little") + data[place + 4 :])
    with pytest.raises(FormatError, match="cannot be read as an Arrow stream"):
        read_sentences(folder)


def test_a_file_that_is_not_parquet_is_told(arrow: Any, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"a\.parquet: cannot be read as a Parquet file"):
        read_sentences(write(tmp_path, "a.parquet", "PAR1 nothing PAR1"))


def test_two_columns_of_one_name_are_refused(arrow: Any, tmp_path: Path) -> None:
    table = arrow.table([["x"], ["y"], [1]], names=["text", "text", "label"])
    arrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(FormatError, match=r"a\.parquet: two columns are called 'text'; rename one"):
        read_sentences(tmp_path / "a.parquet")


def test_more_than_the_limit_is_refused(
    arrow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dictionary of one long text makes many of it."""
    text = arrow.array(["x" * 1000] * 50).dictionary_encode()
    arrow.parquet.write_table(
        arrow.table({"text": text, "label": [1] * 50}), tmp_path / "a.parquet"
    )
    assert len(read_sentences(tmp_path / "a.parquet")) == 50
    monkeypatch.setattr("weightsurgery.datasets.rows.MAX_BYTES", 20_000)
    with pytest.raises(FormatError, match="more than 20,000 characters") as told:
        read_sentences(tmp_path / "a.parquet")
    assert told.value.code == "E-FILE-LARGE"


def test_without_pyarrow_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    reason = re.escape("pip install 'weightsurgery[data]'")
    with pytest.raises(SettingError, match=f"pyarrow is not installed; {reason}"):
        read_sentences(write(tmp_path, "a.parquet", ""))


def test_a_folder_that_is_no_dataset_is_told(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"a directory without state\.json; expected a data file"):
        read_sentences(tmp_path)
