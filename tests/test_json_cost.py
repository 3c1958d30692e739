"""JSON that would exhaust memory is refused before it is parsed; what real models have passes.

Memory is measured in a process of its own, as what opening takes more than the process had before.
"""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import bombs, hostile
from tests.bombs import BOMBS, LARGEST, header, measure, packed, tensors
from tests.hostile import INDEX, SHARDS, index, weights
from weightsurgery import from_arrays
from weightsurgery.errors import FormatError, SettingError
from weightsurgery.formats import json_cost, save
from weightsurgery.formats.json_cost import (
    DENSEST,
    MEMORY,
    MEMORY_OF_MANY,
    allowed_cost,
    collector_paused,
    parsing_cost,
)
from weightsurgery.formats.record import sealed
from weightsurgery.formats.strict_json import dump, parse
from weightsurgery.formats.vocabulary import MAX_TOKENS

MOST = 200_000_000  # bytes beyond what the process has anyway
DEAREST = ["lists in lists", "keys of keys", "keys of empty objects", "texts of four bytes"]
DEAREST += ["a long text", "a long text, one letter wide", "tensors without size"]
ONE = {"model.safetensors": weights("a"), "config.json": {"model_type": "bert"}}
LORA = {"adapter_model.safetensors": weights("a")}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile.sharded(tmp_path_factory.mktemp("good") / "model")


def near(make: Callable[[int], bytes], share: float) -> bytes:
    """Such a header of this share of what is allowed, just below."""
    size = int(share * MEMORY / parsing_cost(make(1_000_000)) * 1_000_000)
    while parsing_cost(make(size)) > share * MEMORY:
        size = int(size * 0.99)
    return make(size)


def headers(folder: Path, texts: Iterator[bytes]) -> Iterator[tuple[str, Path]]:
    """Files of these headers, each written when it is wanted."""
    for text in texts:
        (folder / "x.safetensors").write_bytes(header(text))
        yield "open", folder / "x.safetensors"


# --- what is refused ----------------------------------------------------------------------------


def test_what_would_cost_too_much_is_refused_unparsed(good: Path, tmp_path: Path) -> None:
    texts = (near(make, 1.1) for make in BOMBS.values())
    found = measure(good, headers(tmp_path, texts))
    for name, (peak, told) in zip(BOMBS, found, strict=True):
        assert told.startswith("E-JSON-COST: "), name
        assert peak < MOST / 2, name


def test_headers_of_the_largest_size_are_refused_too(good: Path, tmp_path: Path) -> None:
    names = ("empty lists", "tensors", "a long text, one letter wide")
    texts = (BOMBS[name](LARGEST) for name in names)
    for peak, told in measure(good, headers(tmp_path, texts)):
        assert told.startswith("E-JSON-COST: ")
        assert peak < MOST


PLACES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "index": ("open", dict.fromkeys(SHARDS, weights("a")), INDEX, "[],"),
    "config": ("open", ONE, "config.json", "[],"),
    "adapter": ("open", LORA, "adapter_config.json", "[],"),
    "record": ("record", {}, "wsurg-record.json", "[],"),
    "tokenizer": ("tokens", ONE, "tokenizer.json", "[],"),
    "tokenizer of texts": ("tokens", ONE, "tokenizer.json", '"",'),
    "vocabulary": ("tokens", ONE, "vocab.json", "[],"),
    "special tokens": ("tokens", ONE, "special_tokens_map.json", "[],"),
    "lines": ("tokens", ONE, "vocab.txt", "\n"),
}


def test_every_file_is_looked_at(good: Path, tmp_path: Path) -> None:
    def models() -> Iterator[tuple[str, Path]]:
        for place, (how, files, name, item) in PLACES.items():
            path = hostile.folder(tmp_path / place, {**files, name: packed(item)})
            yield how, path / name if how == "record" else path

    for place, (peak, told) in zip(PLACES, measure(good, models()), strict=True):
        assert told.startswith("E-FILE-LARGE: " if place == "lines" else "E-JSON-COST: "), place
        assert peak < MOST, place


@pytest.mark.parametrize("size", [10_000_000, 30_000_000])
def test_smaller_tokenizers_that_are_packed(good: Path, tmp_path: Path, size: int) -> None:
    models = (
        ("tokens", hostile.folder(tmp_path / str(i), {**ONE, "tokenizer.json": packed(text, size)}))
        for i, text in enumerate(("[],", "{},", '{"a":1},', '"",', "[[[[]]]],"))
    )
    for peak, told in measure(good, models):
        assert told.startswith("E-JSON-COST: ")
        assert peak < MOST


def test_the_dearest_that_passes_takes_no_more_than_is_said(good: Path, tmp_path: Path) -> None:
    texts = (near(BOMBS[name], 1) for name in DEAREST)
    found = dict(zip(DEAREST, measure(good, headers(tmp_path, texts)), strict=True))
    for name, (peak, told) in found.items():
        assert not told.startswith("E-JSON-COST"), name
        assert peak < MOST, name
    assert max(peak for peak, _ in found.values()) > MEMORY / 2  # or nothing was measured


@pytest.mark.slow
@pytest.mark.long
def test_no_bomb_takes_long_or_much(good: Path, tmp_path: Path) -> None:
    for share in (1.0, 1e9):
        for name, make in BOMBS.items():
            text = near(make, share) if share == 1 else make(LARGEST)
            began = time.monotonic()
            ((peak, _),) = measure(good, headers(tmp_path, iter([text])))
            assert peak < MOST, name
            assert time.monotonic() - began < 60, name


# --- what is accepted ---------------------------------------------------------------------------


def test_a_header_of_a_hundred_thousand_tensors(good: Path, tmp_path: Path) -> None:
    name = "model.language_model.layers.61.mlp.experts.%d.down_proj.weight_scale_inv"
    path = tmp_path / "x.safetensors"
    text = tensors(100_000, name)
    path.write_bytes(header(text + b" " * (80_000_000 - len(text))))  # and padding
    with path.open("ab") as file:
        file.truncate(8 + 80_000_000 + 400_000)
    ((peak, told),) = measure(good, [("open", path)])
    assert told == ""
    assert peak < MOST


def tokenizer(words: int, merges: int) -> dict[str, Any]:
    """A tokenizer of so many words and merges, some of them of letters that take four bytes."""
    vocabulary = {f"\u2581{hashlib.sha256(b'%d' % i).hexdigest()[:9]}": i for i in range(words)}
    vocabulary[bombs.SMILE] = words
    pairs = list(vocabulary)[: merges // 3]
    return {
        "added_tokens": [{"id": words, "content": bombs.SMILE, "special": True}],
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": [[a[:k], a[k:]] for k in (3, 5, 7) for a in pairs],
        },
    }


def test_a_tokenizer_of_a_quarter_of_a_million_words(good: Path, tmp_path: Path) -> None:
    content = tokenizer(262_000, 515_000)
    files = {
        "indented": json.dumps(content, ensure_ascii=False, indent=1),
        "dense": json.dumps(content, ensure_ascii=False, separators=(",", ":")),
    }
    models = [
        ("tokens", hostile.folder(tmp_path / name, {**ONE, "tokenizer.json": text.encode()}))
        for name, text in files.items()
    ]
    assert max(map(len, files.values())) > 24_000_000
    for peak, told in measure(good, models):
        assert told == ""
        assert peak < MEMORY_OF_MANY


def test_a_vocabulary_of_half_a_million_lines(good: Path, tmp_path: Path) -> None:
    lines = "".join(f"token{i}\n" for i in range(MAX_TOKENS // 2))
    model = hostile.folder(tmp_path / "model", {**ONE, "vocab.txt": lines.encode()})
    assert [told for _, told in measure(good, [("tokens", model)])] == [""]


def test_an_index_of_two_hundred_thousand_tensors(good: Path, tmp_path: Path) -> None:
    names = (f"model.layers.{i // 4000}.mlp.experts.{i}.up_proj.weight" for i in range(200_000))
    listed = {n: f"model-{i % 61:05}-of-00061.safetensors" for i, n in enumerate(names)}
    model = hostile.folder(tmp_path / "model", {INDEX: index(listed)})
    ((peak, told),) = measure(good, [("open", model)])
    assert told.startswith("E-SHARD-MISSING: ")  # so the index was read
    assert peak < MOST


def test_a_record_of_a_hundred_thousand_tensors(good: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256(b"").hexdigest()
    tensor = {"changed": 0, "dtype": "BF16", "file": "model.safetensors", "sha256": digest}
    record = sealed(
        {
            "schema": "wsurg.record/1",
            "tool": {"name": "weightsurgery", "version": "0"},
            "outputs": {"model.safetensors": {"size": 0, "sha256": digest}},
            "inputs": [{"name": "m", "files": []}],
            "recipe": {"input": 0},
            "tensors": {
                f"model.layers.1.mlp.experts.{i}.up_proj.weight": {
                    **tensor,
                    "shape": [7168, 2048],
                    "status": "copied",
                }
                for i in range(100_000)
            },
        }
    )
    path = tmp_path / "wsurg-record.json"
    path.write_bytes(dump(record))
    ((peak, told),) = measure(good, [("record", path)])
    assert told == ""
    assert peak < MEMORY_OF_MANY


def test_no_file_is_written_that_would_not_be_opened(tmp_path: Path) -> None:
    tensor = np.zeros(0, np.int8)
    model = from_arrays({f"t{i}": tensor for i in range(150_000)}, is_directory=True)
    with pytest.raises(SettingError, match=r"would hold 150,000 tensors; .* with max_shard_size"):
        save(model, str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


# --- the cost -----------------------------------------------------------------------------------


def naive_cost(text: str) -> int:
    """The same, character by character."""
    data = text.encode()
    highest = max(map(ord, text), default=0)
    width = 1 if highest < 0x100 else 2 if highest < 0x10000 else 4
    objects, lists, items, keys, quotes = (text.count(c) for c in '{[,:"')
    cost = len(data) + 2 * width * len(text)
    cost += 120 * objects + 84 * lists + 48 * (items + 1) + 80 * keys + 30 * quotes
    return cost + 85 * max(0, keys - 4 * objects)


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(text=st.text(st.sampled_from('{[,:"a1 é€\xff\u0100\uffff\U00010000\U0010ffff')))
def test_the_cost_is_that_of_all_characters(text: str) -> None:
    for chunk in (1, 7, 1 << 18):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_cost, "_CHUNK", chunk)
            assert parsing_cost(text.encode()) == naive_cost(text)


def test_small_texts_may_be_as_dense_as_they_like_and_large_ones_not() -> None:
    assert allowed_cost(1, MEMORY) == allowed_cost(10**8, MEMORY) == MEMORY
    assert allowed_cost(1, MEMORY_OF_MANY) == MEMORY
    assert allowed_cost(10**7, MEMORY_OF_MANY) == 10**7 * DENSEST
    assert allowed_cost(10**8, MEMORY_OF_MANY) == MEMORY_OF_MANY


def test_padding_costs_nothing() -> None:
    with pytest.raises(FormatError, match=r"header would take .* bytes of memory to parse"):
        parse(packed("[],", 10_000_000), file="x", what="header")
    assert parse(b"{}" + b" \n\r\t" * 25_000_000, file="x") == {}


def test_the_collector_goes_on_afterwards() -> None:
    assert gc.isenabled()
    with collector_paused():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(FormatError):
        parse(b"{", file="x")
    assert gc.isenabled()
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
