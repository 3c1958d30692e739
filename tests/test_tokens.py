"""Rows of a vocabulary are paired by token, where both sides have a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests import cases
from weightsurgery import align, diff, mix, open_checkpoint
from weightsurgery.errors import MismatchError

WORDS = "model.embed_tokens.weight"
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}


def model(place: Path, tokens: list[str], rows: int | None = None, **more: Any) -> Any:
    """A model whose rows hold the numbers of their tokens; the file of the tokenizer by name."""
    place.mkdir()
    known = [sum(map(ord, token)) for token in tokens]
    values = np.array(known + [0.5] * ((rows or len(tokens)) - len(tokens)), np.float32)
    embedding = np.stack([values, values + more.pop("drift", 0)], axis=1)
    save_file({WORDS: embedding, "lm_head.weight": embedding.copy()}, place / "model.safetensors")
    (place / "config.json").write_text(json.dumps(LLAMA))
    for name, text in (more or {"vocab.json": {t: i for i, t in enumerate(tokens)}}).items():
        content = text if isinstance(text, str) else json.dumps(text)
        (place / name).write_text(content)
    return open_checkpoint(place)


def mixed(base: Any, tuned: Any) -> Any:
    return cases.read(mix(base, tuned, ratio=1, allow_partial=True))[WORDS]


def test_rows_in_another_order(tmp_path: Path) -> None:
    base = model(tmp_path / "base", ["a", "b", "c", "d"])
    tuned = model(tmp_path / "tuned", ["a", "c", "b", "d"], drift=1)
    found = align(base, tuned)
    assert found.coverage.is_complete
    assert {p.note for p in found.pairs} == {
        "4 rows of the same tokens ([4, 2] in BASE, [4, 2] in TUNED)"
    }
    assert mixed(base, tuned).tolist() == [[97, 97], [99, 99], [98, 98], [100, 100]]
    assert diff(base, tuned).model["max_abs"] == 1


def test_tokens_in_between_have_no_counterpart(tmp_path: Path) -> None:
    base = model(tmp_path / "base", ["a", "b", "c"])
    tuned = model(tmp_path / "tuned", ["a", "new", "b", "c"], drift=1)
    found = align(base, tuned)
    pair = next(p for p in found.pairs if p.name == WORDS)
    assert (pair.eligible, pair.runs) == (6, ((0, 2), (4, 8)))
    assert found.coverage.to_json()["added_tokens"] == 4
    assert mixed(base, tuned)[:, 1].tolist() == [97, sum(map(ord, "new")) + 1, 98, 99]
    report = diff(base, tuned)
    assert report.model["count"] == 12
    assert [row["row"] for row in report.top["tokens"]] == [0, 2, 3]


def test_rows_without_tokens_go_by_number(tmp_path: Path) -> None:
    base = model(tmp_path / "base", ["a", "b"], rows=5)
    tuned = model(tmp_path / "tuned", ["a", "b", "new"], rows=6, drift=1)
    (pair, _) = align(base, tuned).pairs
    assert (pair.eligible, pair.runs) == (10, ())


SAME: dict[str, dict[str, Any]] = {
    "the same bytes": {"vocab.json": '{"a": 0, "b": 1}'},
    "other spaces": {"vocab.json": '{"b":1,"a":0}'},
    "another file": {"vocab.txt": "a\nb\n"},
}


@pytest.mark.parametrize("files", SAME.values(), ids=SAME)
def test_one_vocabulary_in_two_spellings(tmp_path: Path, files: dict[str, Any]) -> None:
    base = model(tmp_path / "base", ["a", "b"], **{"vocab.json": '{"a": 0, "b": 1}'})
    found = align(base, model(tmp_path / "tuned", ["a", "b"], drift=1, **files))
    assert (found.warnings, {p.note for p in found.pairs}) == ((), {""})


WARNED: dict[str, tuple[dict[str, Any], str]] = {
    "of a kind that is not read": (
        {"tokenizer.model": "other"},
        "cannot compare the tokenizers",
    ),
    "broken": ({"vocab.json": "{"}, "not valid JSON"),
    "empty": ({"vocab.json": "{}"}, "one has no list of tokens"),
}


@pytest.mark.parametrize(("files", "says"), WARNED.values(), ids=WARNED)
def test_tokenizers_that_differ_and_cannot_be_read_are_warned_of(
    tmp_path: Path, files: dict[str, Any], says: str
) -> None:
    base = model(tmp_path / "base", ["a", "b"])
    (warning,) = align(base, model(tmp_path / "tuned", ["a", "b"], drift=1, **files)).warnings
    assert says in warning
    assert "vocabulary rows are paired by number" in warning


def test_one_file_in_common_is_enough_to_know_that_they_are_alike(tmp_path: Path) -> None:
    files = {"tokenizer.model": "pieces"}
    base = model(tmp_path / "base", ["a", "b"], **{"vocab.json": '{"a": 0, "b": 1}'}, **files)
    assert align(base, model(tmp_path / "tuned", ["a", "b"], **files)).warnings == ()


def test_a_blank_line_is_a_token_of_its_own(tmp_path: Path) -> None:
    base = model(tmp_path / "base", ["a", "", "b"], rows=5, **{"vocab.txt": "a\n\nb\n"})
    tuned = model(tmp_path / "tuned", ["b", "", "a"], rows=5, drift=1, **{"vocab.txt": "b\n\na\n"})
    (pair, _) = align(base, tuned).pairs
    assert pair.base is not None
    rows = pair.base.read(0, 10).reshape(5, 2)[:, 0].tolist()
    assert rows == [98, 0, 97, 0.5, 0.5]


def test_a_token_that_stands_twice_stays_where_both_have_it(tmp_path: Path) -> None:
    base = model(tmp_path / "base", ["a", "b", "c", "b"], **{"vocab.txt": "a\nb\nc\nb"})
    tuned = model(tmp_path / "tuned", ["c", "b", "a", "b"], **{"vocab.txt": "c\nb\na\nb\n"})
    (pair, _) = align(base, tuned).pairs
    assert pair.base is not None
    assert pair.base.read(0, 8).reshape(4, 2)[:, 0].tolist() == [99, 98, 97, 98]


@pytest.mark.parametrize("listed", ["vocab.json", "tokenizer.model"])
def test_added_tokens_are_paired_by_token(tmp_path: Path, listed: str) -> None:
    files = {listed: '{"a": 0}'}
    added = [{"<x>": 1, "<y>": 2}, {"<y>": 1, "<x>": 2}]
    base, tuned = (
        model(tmp_path / name, ["a", *found], **files, **{"added_tokens.json": found})
        for name, found in zip(("base", "tuned"), added, strict=True)
    )
    (pair, _) = align(base, tuned).pairs
    assert pair.base is not None
    wanted = [sum(map(ord, token)) for token in ("a", "<y>", "<x>")]
    assert pair.base.read(0, 6).reshape(3, 2)[:, 0].tolist() == wanted


def test_a_vocabulary_of_other_tokens_did_not_just_grow(tmp_path: Path) -> None:
    base = model(tmp_path / "base", ["a", "b", "c"])
    tuned = model(tmp_path / "tuned", ["x", "y", "c"])
    with pytest.raises(MismatchError, match="have a counterpart in BASE"):
        mix(base, tuned)


def test_numbers_beyond_the_rows_pair_nothing(tmp_path: Path) -> None:
    numbers = {"vocab.json": '{"a": -1, "b": 9000, "c": 2}'}
    base = model(tmp_path / "base", ["a", "b", "c"], **numbers)
    tuned = model(tmp_path / "tuned", ["c", "b", "a"], drift=1)
    (pair, _) = align(base, tuned).pairs
    assert (pair.eligible, pair.runs) == (2, ((0, 2),))


def test_no_tokenizer_on_a_side_is_nothing_to_warn_of(tmp_path: Path) -> None:
    base = model(tmp_path / "base", ["a", "b"])
    assert align(base, model(tmp_path / "tuned", ["a", "b"], none="")).warnings == ()
