"""Model directories, sharded indexes and hub caches: one answer to "which weights?", or none."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests import hostile
from tests.hostile import INDEX, SHARDS, entry, index, raw, weights
from weightsurgery.errors import FormatError, PolicyError, SettingError
from weightsurgery.formats import open_checkpoint

WHERE = {"a": SHARDS[0], "b": SHARDS[1]}
PLAIN = "expected a plain name ending in .safetensors"


def refused(
    name: str, files: dict[str, Any], reason: str, *, file: str = INDEX, tensor: str | None = None
) -> Any:
    return pytest.param(files, reason, file, tensor, id=name)


def shard_named(name: Any) -> dict[str, Any]:
    return {INDEX: index({"a": SHARDS[0], "b": name})}


REFUSED = [
    *(
        refused(f"shard name {value!r:.30}", shard_named(value), PLAIN, tensor="b")
        for value in (
            *("../b.safetensors", "/etc/b.safetensors", "sub/b.safetensors", "..", ".", ""),
            *("..\\b.safetensors", "C:b.safetensors", "https://x.org/b.safetensors"),
            *("b\n.safetensors", "b\0.safetensors", "b\u202e.safetensors", "b\x7f.safetensors"),
            *("b.bin", "b.safetensors.bin", "b.SAFETENSORS", ".safetensors", "b.safetensors "),
            *("x" * 300 + ".safetensors", None, 1, True, ["b.safetensors"], {}),
        )
    ),
    refused("not JSON", {INDEX: b"{"}, "index is not valid JSON"),
    refused("not UTF-8", {INDEX: b"{\xff}"}, "index is not UTF-8"),
    refused("a list", {INDEX: []}, "index is a JSON list, not an object"),
    refused("no weight_map", {INDEX: {"metadata": {}}}, "no weight_map in the index"),
    refused("empty weight_map", {INDEX: index({})}, "no weight_map in the index"),
    refused("weight_map a list", {INDEX: index([SHARDS[0]])}, "no weight_map in the index"),
    refused(
        "tensor listed twice",
        {INDEX: b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'},
        "key 'a' occurs twice",
    ),
    refused("nesting bomb", {INDEX: b"[" * 10**5}, "index is nested too deeply"),
    refused(
        "shard missing",
        {INDEX: index({**WHERE, "c": "model-00003-of-00003.safetensors"})},
        "shard model-00003-of-00003.safetensors is missing; model.safetensors.index.json lists it",
        file="",
    ),
    refused(
        "listed tensor absent",
        {INDEX: index({**WHERE, "c": SHARDS[1]})},
        "listed in the index but not in the shard",
        file=SHARDS[1],
        tensor="c",
    ),
    refused(
        "hidden tensor",
        {SHARDS[1]: weights("b", "hidden")},
        "in the shard but not in the index",
        file=SHARDS[1],
        tensor="hidden",
    ),
    refused(
        "twice, across shards",
        {SHARDS[1]: weights("a", "b")},
        f"the index places it in {SHARDS[0]}",
        file=SHARDS[1],
        tensor="a",
    ),
    refused(
        "shard malformed",
        {SHARDS[1]: raw({"b": entry(0, 8)}, bytes(8))},
        "takes 32 bits, not 64",
        file=SHARDS[1],
        tensor="b",
    ),
    refused("config not JSON", {"config.json": b"{,}"}, "config is not valid", file="config.json"),
    refused("config a list", {"config.json": []}, "config is a JSON list", file="config.json"),
    refused("config NaN", {"config.json": b'{"a": NaN}'}, "NaN is not JSON", file="config.json"),
    refused(
        "config with a mark", {"config.json": b"\xef\xbb\xbf{}"}, "Unexpected", file="config.json"
    ),
    refused(
        "config UTF-16", {"config.json": "{}".encode("utf-16")}, "not UTF-8", file="config.json"
    ),
    refused(
        "config UTF-32", {"config.json": "{}".encode("utf-32-be")}, "not valid", file="config.json"
    ),
    refused(
        "config key twice",
        {"config.json": b'{"x": {"a": 1, "\\u0061": 2}}'},
        "key 'a' occurs twice",
        file="config.json",
    ),
    refused("config 1e999", {"config.json": b"[1e999]"}, "out of range", file="config.json"),
    refused("config cut", {"config.json": b"version "}, "config is not", file="config.json"),
]


@pytest.mark.parametrize(("files", "reason", "file", "tensor"), REFUSED)
def test_must_refuse(
    tmp_path: Path, files: dict[str, Any], reason: str, file: str, tensor: str | None
) -> None:
    model = hostile.sharded(tmp_path / "model", files)
    (tmp_path / "b.safetensors").write_bytes(weights("b"))
    with pytest.raises(FormatError, match=reason) as told:
        open_checkpoint(model)
    hostile.check_told(told.value, file=model / file if file else model, tensor=tensor)


ONE = {"model.safetensors": weights("a"), "config.json": {"model_type": "bert"}}
TWO = {SHARDS[0]: weights("a"), SHARDS[1]: weights("b"), INDEX: index(WHERE)}
TWO_ANSWERS = {
    "file and index": ({**ONE, **TWO}, ["model.safetensors", INDEX]),
    "file and pickle": (
        {**ONE, "pytorch_model.bin": b"PK"},
        ["model.safetensors", "pytorch_model.bin"],
    ),
    "index and pickle": ({**TWO, "pytorch_model.bin": b"PK"}, [INDEX, "pytorch_model.bin"]),
    "file and shards of pickles": (
        {**ONE, "pytorch_model-00001-of-00002.bin": b""},
        ["model.safetensors", "pytorch_model-00001-of-00002.bin"],
    ),
    "file and index of pickles": (
        {**ONE, "pytorch_model.bin.index.json": {}},
        ["model.safetensors", "pytorch_model.bin.index.json"],
    ),
    "config names other weights": (
        {**ONE, "config.json": {"transformers_weights": "other.safetensors"}},
        ["model.safetensors", "config.json's transformers_weights"],
    ),
    "adapter beside weights": (
        {**ONE, "adapter_config.json": {}, "adapter_model.safetensors": weights("x")},
        ["model.safetensors", "adapter_config.json"],
    ),
    "adapter's weights only": (
        {**ONE, "adapter_model.safetensors": weights("x")},
        ["model.safetensors", "adapter_model.safetensors"],
    ),
    "adapter's config only": (
        {**ONE, "adapter_config.json": {"base_model_name_or_path": "evil/base"}},
        ["model.safetensors", "adapter_config.json"],
    ),
}


@pytest.mark.parametrize(("files", "both"), TWO_ANSWERS.values(), ids=TWO_ANSWERS.keys())
def test_must_refuse_two_answers(tmp_path: Path, files: dict[str, Any], both: list[str]) -> None:
    model = hostile.folder(tmp_path / "model", files)
    reason = f"two answers .*: {re.escape(' and '.join(both))}; choose one with --weights {both[0]}"
    with pytest.raises(PolicyError, match=reason) as told:
        open_checkpoint(model)
    hostile.check_told(told.value, file=model)
    found = open_checkpoint(model, weights=both[0])
    assert set(found) == ({"a", "b"} if both[0] == INDEX else {"a"})


NO_ANSWER = {
    "nothing": ({}, "is this a model directory"),
    "config only": ({"config.json": {}}, "is this a model directory"),
    "other names": (
        {"weights.safetensors": weights("a"), "b.safetensors": weights("b")},
        "it holds b.safetensors, weights.safetensors; choose one with --weights FILE",
    ),
    "adapter's weights only": (
        {"adapter_model.safetensors": weights("x")},
        r"adapter_model\.safetensors without adapter_config\.json; take it from",
    ),
    "hostile name": ({"\x1b[31m.safetensors": b""}, r"it holds \\x1b\[31m.safetensors"),
}


@pytest.mark.parametrize(("files", "reason"), NO_ANSWER.values(), ids=NO_ANSWER.keys())
def test_must_refuse_no_answer(tmp_path: Path, files: dict[str, Any], reason: str) -> None:
    model = hostile.folder(tmp_path / "model", files)
    with pytest.raises(FormatError, match=reason) as told:
        open_checkpoint(model)
    hostile.check_told(told.value, file=model)


def test_weights_chooses_among_files(tmp_path: Path) -> None:
    model = hostile.folder(tmp_path / "model", {**ONE, "ema.safetensors": weights("e")})
    assert set(open_checkpoint(model)) == {"a"}
    assert set(open_checkpoint(model, weights="ema.safetensors")) == {"e"}


@pytest.mark.parametrize("name", ["config.json", "pytorch_model.bin"])
def test_weights_chosen_must_be_weights(tmp_path: Path, name: str) -> None:
    model = hostile.folder(
        tmp_path / "model", {**ONE, "pytorch_model.bin": b"\x80\x02" + bytes(99)}
    )
    with pytest.raises((FormatError, PolicyError), match=r"found JSON|can run code") as told:
        open_checkpoint(model, weights=name)
    hostile.check_told(told.value, file=model / name)


# --- what is accepted -------------------------------------------------------------------------

ACCEPTED: dict[str, dict[str, Any]] = {
    "two shards": {},
    "no total_size": {INDEX: index(WHERE)},
    "no metadata": {INDEX: {"weight_map": WHERE}},
    "metadata odd": {INDEX: {"weight_map": WHERE, "metadata": ["?"], "more": 1}},
    "shard names odd": {
        INDEX: index({"a": "-.safetensors", "b": "gewichte ä.safetensors"}),
        "-.safetensors": weights("a"),
        "gewichte ä.safetensors": weights("b"),
    },
}


@pytest.mark.parametrize("files", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_must_accept(tmp_path: Path, files: dict[str, Any]) -> None:
    model = hostile.sharded(tmp_path / "model", files)
    found = open_checkpoint(model)
    library = {n: hostile.stored_by_library(weights(n))[n] for n in ("a", "b")}
    assert hostile.stored(found) == library
    assert found.warnings == ()
    assert found.is_directory
    assert found.config == {"model_type": "bert"}
    assert [file.name for file in found.files] == [INDEX, *sorted(set(found.layout.values()))]


@pytest.mark.parametrize("total", [95, 97, 0, -96, 24, "96", True, 96.5, [], "\x1b[31m", 10**300])
def test_a_wrong_total_size_is_a_warning(tmp_path: Path, total: Any) -> None:
    model = hostile.sharded(tmp_path / "model", {INDEX: index(WHERE, total)})
    (warning,) = open_checkpoint(model).warnings
    assert warning.startswith(f"{INDEX}: total_size is ")
    assert warning.endswith(", the tensors take 96 bytes")
    assert warning.isprintable()


def test_opening_reads_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 35 << 30
    rows, shards = size // 4096, {}
    for name, shard in WHERE.items():
        shards[shard] = raw({name: entry(0, size, shape=[rows, 1024])}, b"")
    model = hostile.sharded(tmp_path / "model", {**shards, INDEX: index(WHERE, 2 * size)})
    for shard, header in shards.items():
        os.truncate(model / shard, len(header) + size)  # sparse: takes no room
    read = hostile.count_reads(monkeypatch)
    found = open_checkpoint(model)
    assert found.nbytes == 70 << 30
    assert found.warnings == ()
    assert 0 < sum(read) < 2000
    assert found["b"].read(found["b"].size - 3, found["b"].size).tolist() == [0, 0, 0]
    assert sum(read[-1:]) == 12


@pytest.mark.parametrize("name", ["typo.safetensors", "../secret.safetensors", "", "\x1b[31m"])
def test_weights_chosen_must_be_there(tmp_path: Path, name: str) -> None:
    model = hostile.folder(tmp_path / "model", ONE)
    (tmp_path / "secret.safetensors").write_bytes(weights("a"))
    with pytest.raises(SettingError, match=r"there is no .* to take the weights from") as told:
        open_checkpoint(model, weights=name)
    hostile.check_told(told.value, file=model)
    assert told.value.exit_code == 2


def test_there_is_no_choice_of_weights_in_a_file(tmp_path: Path) -> None:
    path = hostile.folder(tmp_path / "model", ONE) / "model.safetensors"
    with pytest.raises(SettingError, match="names a file of a model directory") as told:
        open_checkpoint(path, weights="model.safetensors")
    hostile.check_told(told.value, file=path)
