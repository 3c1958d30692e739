"""Token strings, read as data from whatever tokenizer lies beside a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import hostile
from tests.hostile import weights
from weightsurgery import from_arrays
from weightsurgery.errors import FormatError
from weightsurgery.formats import open_checkpoint, vocabulary
from weightsurgery.formats.vocabulary import read_vocabulary

WORDPIECE = {"type": "WordPiece", "vocab": {"[PAD]": 0, "cf": 1, "##ing": 2}}
BPE = {"type": "BPE", "vocab": {"Ġthe": 1, "a": 0}, "merges": ["Ġ the"]}
UNIGRAM = {"type": "Unigram", "vocab": [["<unk>", 0.0], ["▁the", -3.5], ["", -1]]}
ADDED = [{"id": 2, "content": "<mask>"}, {"id": 9, "content": "<|end|>", "special": True}]
ODD_ADDED = [*ADDED, {"id": True, "content": "x"}, {"id": 1.0}, {"content": "x"}, None, [], "x"]


def read(tmp_path: Path, files: dict[str, Any]) -> dict[int, str]:
    model = hostile.folder(tmp_path / "model", {"model.safetensors": weights("a"), **files})
    return read_vocabulary(open_checkpoint(model))


FOUND: dict[str, tuple[dict[str, Any], dict[int, str]]] = {
    "no tokenizer": ({}, {}),
    "WordPiece": ({"tokenizer.json": {"model": WORDPIECE}}, {0: "[PAD]", 1: "cf", 2: "##ing"}),
    "BPE": ({"tokenizer.json": {"model": BPE}}, {0: "a", 1: "Ġthe"}),
    "Unigram": ({"tokenizer.json": {"model": UNIGRAM}}, {0: "<unk>", 1: "▁the", 2: ""}),
    "added tokens": (
        {"tokenizer.json": {"model": BPE, "added_tokens": ADDED}},
        {0: "a", 1: "Ġthe", 2: "<mask>", 9: "<|end|>"},
    ),
    "added tokens, odd ones": (
        {"tokenizer.json": {"model": BPE, "added_tokens": ODD_ADDED}},
        {0: "a", 1: "Ġthe", 2: "<mask>", 9: "<|end|>"},
    ),
    "ids that are no integers": (
        {
            "tokenizer.json": {
                "model": {"vocab": {"a": 0, "b": 1.0, "c": True, "d": "2", "e": None}}
            }
        },
        {0: "a"},
    ),
    "no model": ({"tokenizer.json": {}}, {}),
    "model odd": ({"tokenizer.json": {"model": {"vocab": "abc"}, "added_tokens": 1}}, {}),
    "vocab.json": ({"vocab.json": {"b": 1, "a": 0}}, {0: "a", 1: "b"}),
    "vocab.txt": ({"vocab.txt": b"[PAD]\ncf\n##ing\n"}, {0: "[PAD]", 1: "cf", 2: "##ing"}),
    "vocab.txt, no last line feed": ({"vocab.txt": b"a\nb"}, {0: "a", 1: "b"}),
    "vocab.txt of Windows": ({"vocab.txt": b"a\r\nb\r\n"}, {0: "a", 1: "b"}),
    "vocab.txt, other line separators": (
        {"vocab.txt": "a\n\u0085\n\u2028\n\x0b\x0c\n \n\nz\n".encode()},
        {0: "a", 1: "\u0085", 2: "\u2028", 3: "\x0b\x0c", 4: " ", 5: "", 6: "z"},
    ),
    "vocab.txt, not UTF-8": ({"vocab.txt": b"a\n\xff\nb\n"}, {0: "a", 1: "\ufffd", 2: "b"}),
    "tokenizer.json before the others": (
        {"vocab.txt": b"x", "vocab.json": {"y": 0}, "tokenizer.json": {"model": BPE}},
        {0: "a", 1: "Ġthe"},
    ),
    "vocab.json before vocab.txt": ({"vocab.txt": b"x", "vocab.json": {"y": 0}}, {0: "y"}),
}


@pytest.mark.parametrize(("files", "expected"), FOUND.values(), ids=FOUND.keys())
def test_must_accept(tmp_path: Path, files: dict[str, Any], expected: dict[int, str]) -> None:
    assert read(tmp_path, files) == expected


REFUSED: dict[str, tuple[str, bytes, str]] = {
    "tokenizer.json cut": ("tokenizer.json", b'{"model":', "tokenizer is not valid JSON"),
    "tokenizer.json a list": ("tokenizer.json", b"[]", "tokenizer is a JSON list, not an object"),
    "tokenizer.json empty": ("tokenizer.json", b"", "tokenizer is not valid JSON"),
    "tokenizer.json a bomb": ("tokenizer.json", b"[" * 10**5, "nested too deeply"),
    "tokenizer.json UTF-16": ("tokenizer.json", "{}".encode("utf-16"), "tokenizer is not UTF-8"),
    "token twice": ("vocab.json", b'{"a": 0, "a": 1}', "key 'a' occurs twice"),
    "vocab.json cut": ("vocab.json", b'{"a"', "vocabulary is not valid JSON"),
    "vocab.json a pointer": ("vocab.json", b"version https://git-lfs", "a Git LFS pointer"),
}


@pytest.mark.parametrize(("name", "content", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_must_refuse(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    with pytest.raises(FormatError, match=reason) as told:
        read(tmp_path, {name: content})
    hostile.check_told(told.value, file=tmp_path / "model" / name)


def test_a_tokenizer_that_is_too_large_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "MAX_BYTES", 10)
    files = {"tokenizer.json": {"model": BPE}, "vocab.txt": b"a\nb"}
    assert read(tmp_path, files) == {0: "a", 1: "b"}


def test_a_checkpoint_without_files_has_no_tokens() -> None:
    assert read_vocabulary(from_arrays(hostile.arrays("a"))) == {}
