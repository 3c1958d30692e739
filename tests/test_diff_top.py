"""Dimensions, rows, columns and tokens of largest drift: as the naive ranking has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import cases, reference
from weightsurgery.checkpoint import from_arrays
from weightsurgery.comparison import DiffReport, diff
from weightsurgery.formats import open_checkpoint

NAMES = ("layer.0.weight", "layer.1.weight", "layer.0.bias", cases.EMBEDDING["bert"])
SHAPES = ((7, 5), (3, 5, 2), (6,), (11, 4))
BLOCKS = pytest.mark.parametrize("block", [1 << 20, 10, 4], ids=["whole", "rows", "parts of rows"])
TOPS = pytest.mark.parametrize("top", [0, 1, 5, 12, 1000])


def models(levels: int) -> tuple[cases.Arrays, cases.Arrays]:
    """Drifts are small integers, so that there are ties and sums of squares are exact."""
    rng = np.random.default_rng(levels)
    shapes = dict(zip(NAMES, SHAPES, strict=True))
    base = {n: rng.integers(-9, 9, s).astype(np.float32) for n, s in shapes.items()}
    tuned = {
        n: a + rng.integers(-levels, levels + 1, a.shape).astype(np.float32)
        for n, a in base.items()
    }
    return base, tuned


def report_of(levels: int, top: int) -> tuple[DiffReport, dict[str, Any]]:
    base, tuned = models(levels)
    drifts = {n: (tuned[n] - base[n]).astype(np.float64) for n in base}
    return diff(from_arrays(base), from_arrays(tuned), top=top), drifts


@pytest.mark.parametrize("levels", [1, 3, 1000], ids=["ties", "some ties", "few ties"])
@BLOCKS
@TOPS
def test_dimensions(levels: int, block: int, top: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cases.shrink_blocks(monkeypatch, block)
    report, drifts = report_of(levels, top)
    base, tuned = models(levels)
    expected = [
        (n, tuple(int(j) for j in np.unravel_index(i, base[n].shape)))
        for n, i in reference.largest({n: np.abs(d).ravel() for n, d in drifts.items()}, top)
    ]
    found = report.top["dimensions"]
    assert [(e["tensor"], tuple(e["index"])) for e in found] == expected
    for entry, (name, index) in zip(found, expected, strict=True):
        assert entry["base"] == base[name][index]
        assert entry["tuned"] == tuned[name][index]
        assert entry["drift"] == drifts[name][index]


@pytest.mark.parametrize("levels", [1, 3, 1000], ids=["ties", "some ties", "few ties"])
@pytest.mark.parametrize("block", [1 << 20, 10], ids=["whole", "rows"])
@TOPS
def test_rows_and_columns(
    levels: int, block: int, top: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases.shrink_blocks(monkeypatch, block)
    report, drifts = report_of(levels, top)
    for what, axis in (("row", 1), ("column", 0)):
        lengths = {
            n: np.sqrt((d.reshape(len(d), -1) ** 2).sum(axis))
            for n, d in drifts.items()
            if d.ndim > 1
        }
        expected = reference.largest(lengths, top)
        found = report.top[f"{what}s"]
        assert [(e["tensor"], e[what]) for e in found] == expected
        assert [e["l2"] for e in found] == [lengths[n][i] for n, i in expected]


def test_rows_longer_than_a_block_are_not_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    cases.shrink_blocks(monkeypatch, 4)
    report, _ = report_of(3, 100)
    assert {e["tensor"] for e in report.top["rows"]} == {cases.EMBEDDING["bert"]}


@TOPS
def test_tokens(top: int, tmp_path: Path) -> None:
    base, tuned = models(3)
    paths = [
        cases.write_directory(tmp_path / name, arrays)
        for name, arrays in (("base", base), ("tuned", tuned))
    ]
    words = [f"word{i}" for i in range(10)]  # one fewer than there are rows
    (paths[1] / "vocab.txt").write_text("\n".join(words))
    report = diff(*map(open_checkpoint, paths), top=top)
    name = cases.EMBEDDING["bert"]
    lengths = np.sqrt(((tuned[name] - base[name]).astype("f8") ** 2).sum(1))
    expected = [
        {
            "tensor": name,
            "row": i,
            "token": words[i] if i < 10 else None,
            "l2": lengths[i],
        }
        for _, i in reference.largest({name: lengths}, top)
    ]
    assert report.top["tokens"] == expected


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", {"model": {"vocab": {"zero": 0, "one": 1}}}),
        ("tokenizer.json", {"model": {"vocab": [["zero", -1.0], ["one", -2.0]]}}),
        (
            "tokenizer.json",
            {"model": {"vocab": {"zero": 0}}, "added_tokens": [{"id": 1, "content": "one"}]},
        ),
        ("vocab.json", {"zero": 0, "one": 1}),
    ],
    ids=["BPE", "Unigram", "added token", "vocab.json"],
)
def test_token_strings_of_every_kind_of_tokenizer(file: str, content: Any, tmp_path: Path) -> None:
    base = {"wte.weight": np.zeros((2, 3), np.float32)}
    tuned = {"wte.weight": np.array([[0, 0, 0], [0, 2, 0]], np.float32)}
    path = cases.write_directory(tmp_path / "tuned", tuned)
    (path / file).write_text(json.dumps(content))
    report = diff(from_arrays(base), open_checkpoint(path))
    assert report.top["tokens"] == [{"tensor": "wte.weight", "row": 1, "token": "one", "l2": 2.0}]


def test_without_one_word_embedding_there_are_no_tokens() -> None:
    arrays = {"a.wte.weight": np.zeros((2, 2), np.float32), "b.wte.weight": np.zeros((2, 2), "f4")}
    moved = {n: a + 1 for n, a in arrays.items()}
    assert diff(from_arrays(arrays), from_arrays(moved)).top["tokens"] == []


def test_a_scalar_has_an_empty_index() -> None:
    report = diff(
        from_arrays({"s": np.array(1.0, np.float32)}), from_arrays({"s": np.array(3.0, np.float32)})
    )
    assert report.top["dimensions"] == [
        {"tensor": "s", "index": [], "base": 1.0, "tuned": 3.0, "drift": 2.0}
    ]
