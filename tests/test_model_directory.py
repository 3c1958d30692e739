"""Model directories, sharded indexes and hub caches: one answer to "which weights?", or none."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests import cases, hostile
from tests.hostile import INDEX, SHARDS, entry, index, raw, weights
from weightsurgery.errors import FormatError, PolicyError, SettingError, shown
from weightsurgery.formats import open_checkpoint, save
from weightsurgery.formats.record import sealed
from weightsurgery.formats.strict_json import dump

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
        "twice, and listed in the second",
        {INDEX: index({"a": SHARDS[1], "b": SHARDS[1]}), SHARDS[1]: weights("a", "b")}
        | {SHARDS[0]: weights("a", "c"), "model-00003.safetensors": weights("d")}
        | {INDEX: index({"a": SHARDS[1], "b": SHARDS[1], "c": SHARDS[0]})},
        f"also in {SHARDS[0]}",
        file=SHARDS[1],
        tensor="a",
    ),
    refused(
        "twice, and not listed",
        {SHARDS[0]: weights("a", "hidden"), SHARDS[1]: weights("b", "hidden")},
        f"also in {SHARDS[0]}",
        file=SHARDS[1],
        tensor="hidden",
    ),
    refused(
        "twice, across shards",
        {SHARDS[1]: weights("a", "b")},
        f"also in {SHARDS[0]}",
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
    refused("index NaN", {INDEX: b'{"metadata": NaN}'}, "NaN is not JSON"),
    refused("index 1e999", {INDEX: b'{"metadata": 1e999}'}, "out of range"),
    refused("config nan", {"config.json": b'{"a": nan}'}, "not valid JSON", file="config.json"),
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
    reason = (
        f"ambiguous weights: {re.escape(' and '.join(both))}; choose one with --weights {both[0]}"
    )
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
    with pytest.raises((FormatError, PolicyError), match=r"found JSON|cannot be read") as told:
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


# --- indexes that do not describe their shards, and shards without an index -------------------

MTP = "mtp.safetensors"
# Files to the tensors that are read, the warning, and the names left out beside the weights.
WARNED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a tensor that no index lists": (
        {SHARDS[1]: weights("b", "hidden")},
        "a b hidden",
        f"{INDEX}: does not list 1 tensor of its shards: 'hidden'",
    ),
    "a listed tensor that no shard has": (
        {INDEX: index({**WHERE, "c": SHARDS[1], "d": SHARDS[0]})},
        "a b",
        f"{INDEX}: lists 2 tensors that no shard has: 'c', 'd'",
    ),
    "a listed tensor in another shard": (
        {INDEX: index({**WHERE, "c": SHARDS[1]}), SHARDS[0]: weights("a", "c")},
        "a b c",
        f"{INDEX}: places 1 tensor in the wrong shard: 'c'",
    ),
    "a file that the index does not name": (
        {MTP: weights("mtp.0", "mtp.1", "mtp.2", "mtp.3", "mtp.4")},
        "a b mtp.0 mtp.1 mtp.2 mtp.3 mtp.4",
        f"{MTP}: not in {INDEX}, holds 5 tensors more: 'mtp.0', 'mtp.1', 'mtp.2' and 2 more",
    ),
    "a shard that the index does not name": (
        {"model-00003-of-00003.safetensors": weights("c")},
        "a b c",
        f"model-00003-of-00003.safetensors: not in {INDEX}, holds 1 tensor more: 'c'",
    ),
    "a malformed file that the index does not name": (
        {MTP: b"{"},
        "a b",
        f"{MTP}: not in {INDEX}, skipped: ",
    ),
    "a pointer that the index does not name": (
        {MTP: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"},
        "a b",
        f"{MTP}: not in {INDEX}, skipped: ",
    ),
    "hostile tensor names": (
        {MTP: weights("\x1b[31m")},
        "a b \x1b[31m",
        rf"{MTP}: not in {INDEX}, holds 1 tensor more: '\x1b[31m'",
    ),
    "no index": (
        {INDEX: None},
        "a b",
        f"no index; opened 2 shards, {SHARDS[0]} to {SHARDS[1]}",
    ),
    "no index, an incomplete older set": (
        {INDEX: None, "model-00001-of-00003.safetensors": weights("a")},
        "a b",
        f"no index; opened 2 shards, {SHARDS[0]} to {SHARDS[1]}",
    ),
}


def changed_model(path: Path, files: dict[str, Any]) -> Path:
    """A model in two shards, with files changed, added or (None) removed."""
    model = hostile.sharded(path, {n: c for n, c in files.items() if c is not None})
    for name in (name for name, content in files.items() if content is None):
        (model / name).unlink()
    if INDEX not in files:  # without a total size, which would be another warning
        hostile.folder(model, {INDEX: index(WHERE)})
    return model


@pytest.mark.parametrize(("files", "names", "warning"), WARNED.values(), ids=WARNED.keys())
def test_must_warn(tmp_path: Path, files: dict[str, Any], names: str, warning: str) -> None:
    """All tensors that exist are read, written and listed in the output's index."""
    found = open_checkpoint(changed_model(tmp_path / "model", files))
    assert sorted(found) == sorted(names.split())
    (said,) = found.warnings
    assert said.startswith(warning)
    assert said.isprintable()
    record = save(found, tmp_path / "out")
    assert said in record["warnings"]
    assert record["tensors"].keys() == set(found)
    again = open_checkpoint(tmp_path / "out")
    assert again.warnings == ()
    assert hostile.stored(again) == hostile.stored(found)
    listed = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert listed == again.layout == found.layout
    hashed = {file["name"] for file in record["inputs"][0]["files"]}
    assert hashed >= {file.name for file in found.files}


LEFT_OUT = {
    "the same in another dtype": ("model.fp16.safetensors", weights("x")),
    "its shards": ("model.fp16-00001-of-00002.safetensors", weights("x")),
    "the maker's format": ("consolidated.safetensors", weights("x")),
    "its shards, numbered otherwise": ("consolidated-00001-of-00002.safetensors", weights("x")),
    "LoRA factors": ("pytorch_lora_weights.safetensors", weights("x")),
    "a hostile name": ("\x1b[31m.safetensors", weights("x")),
    "an optimizer": ("optimizer.safetensors", weights("x")),
    "the same tensors": ("ema.safetensors", weights("a")),
    "some of the same tensors": ("model-00001-of-00003.safetensors", weights("a", "x")),
}


@pytest.mark.parametrize(("name", "content"), LEFT_OUT.values(), ids=LEFT_OUT.keys())
@pytest.mark.parametrize("with_index", [True, False], ids=["index", "no index"])
def test_files_that_are_not_of_the_model(
    tmp_path: Path, name: str, content: bytes, with_index: bool
) -> None:
    files = {name: content, **({} if with_index else {INDEX: None})}
    found = open_checkpoint(changed_model(tmp_path / "model", files))
    assert set(found) == {"a", "b"}
    assert len(found.warnings) == (not with_index)
    assert shown(name) in dict(found.left_out)
    if b'"a"' in content:
        assert dict(found.left_out)[name].endswith("already have: 'a'")


@pytest.mark.parametrize("make", ["fifo", "link"])
def test_what_is_no_file_beside_the_shards_is_left_out(tmp_path: Path, make: str) -> None:
    model = changed_model(tmp_path / "model", {})
    os.mkfifo(model / MTP) if make == "fifo" else (model / MTP).symlink_to("/etc/hosts")
    with hostile.deadline():
        found = open_checkpoint(model)
    assert set(found) == {"a", "b"}
    assert found.warnings[0].startswith(f"{MTP}: not in {INDEX}, skipped: ")


INCOMPLETE = {
    "one of two": ([SHARDS[0]], r"1 of 2 shards is missing: model-00002-of-00002\.safetensors"),
    "two of five": (
        [f"model-0000{n}-of-00005.safetensors" for n in (1, 3, 5)],
        r"2 of 5 shards are missing: model-00002-of-00005\.safetensors, model-00004",
    ),
    "of two sets, the one that lacks less": (
        [SHARDS[0], *(f"model-0000{n}-of-00009.safetensors" for n in (1, 2, 3))],
        "1 of 2 shards is missing",
    ),
    "numbers beyond the last": (
        [SHARDS[0], "model-00003-of-00002.safetensors", "model-00000-of-00002.safetensors"],
        "1 of 2 shards is missing",
    ),
}


@pytest.mark.parametrize(("names", "reason"), INCOMPLETE.values(), ids=INCOMPLETE.keys())
def test_must_refuse_an_incomplete_set(tmp_path: Path, names: list[str], reason: str) -> None:
    model = hostile.folder(tmp_path / "model", {name: weights(name) for name in names})
    with pytest.raises(FormatError, match=f"{reason}.*; the download may be") as told:
        open_checkpoint(model)
    hostile.check_told(told.value, file=model)
    assert told.value.code == "E-SHARD-MISSING"


def test_must_refuse_two_complete_sets(tmp_path: Path) -> None:
    names = [*SHARDS, *(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))]
    model = hostile.folder(tmp_path / "model", {name: weights(name) for name in names})
    with pytest.raises(PolicyError, match="complete sets of shards, of 2 and of 3") as told:
        open_checkpoint(model)
    hostile.check_told(told.value, file=model)


def test_must_refuse_shards_and_something_else(tmp_path: Path) -> None:
    files = {"adapter_config.json": {}, INDEX: None}
    model = changed_model(tmp_path / "model", files)
    reason = rf"{SHARDS[0]} and adapter_config\.json; keep one in the directory"
    with pytest.raises(PolicyError, match=reason):
        open_checkpoint(model)
    (model / "adapter_config.json").unlink()
    (model / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    with pytest.raises(PolicyError, match=rf"{SHARDS[0]} and pytorch_model-00001"):
        open_checkpoint(model)


def test_tensors_of_shards_without_index_must_differ(tmp_path: Path) -> None:
    model = changed_model(tmp_path / "model", {INDEX: None, SHARDS[1]: weights("a")})
    with pytest.raises(FormatError, match=f"tensor 'a': also in {SHARDS[0]}"):
        open_checkpoint(model)


def test_one_shard_of_one_is_a_model(tmp_path: Path) -> None:
    name = "model-00001-of-00001.safetensors"
    model = hostile.folder(tmp_path / "model", {name: weights("a")})
    assert open_checkpoint(model).warnings == (f"no index; opened 1 shard, {name}",)
    assert open_checkpoint(model, weights=name).warnings == ()


def test_one_shard_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for files in ({}, {INDEX: None}):
        model = changed_model(tmp_path / f"model {len(files)}", files)
        reason = "is shard 2 of 2, only a part of the model; leave out --weights to open all"
        with pytest.raises(PolicyError, match=reason) as told:
            open_checkpoint(model, weights=SHARDS[1])
        hostile.check_told(told.value, file=model)
        (said,) = open_checkpoint(model / SHARDS[1]).warnings
        assert said.startswith(f"{SHARDS[1]}: shard 2 of 2, only a part of a model")
    # With two inputs one of them may lack the file; this one has it, and it is not ignored.
    plain = hostile.folder(tmp_path / "plain", ONE)
    assert cases.wsurg("diff", plain, model, "--weights", SHARDS[1]) == 5
    assert "shard 2 of 2" in capsys.readouterr().err


@pytest.mark.parametrize("with_index", [True, False], ids=["index", "no index"])
def test_what_was_made_of_such_shards_is_verified_and_replayed(
    tmp_path: Path, with_index: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changed_model(tmp_path / "base", {SHARDS[1]: weights("b", "hidden", seed=1)})
    files = {SHARDS[1]: weights("b", "hidden"), MTP: weights("mtp")}
    changed_model(tmp_path / "tuned", {**files, **({} if with_index else {INDEX: None})})
    assert cases.wsurg("mix", "base", "tuned", "--ratio", "1", "-o", "out", "--allow-partial") == 0
    made = open_checkpoint("out")
    assert sorted(made) == ["a", "b", "hidden", "mtp"]
    assert (
        made["hidden"].read(0, 12).tolist()
        == open_checkpoint("base")["hidden"].read(0, 12).tolist()
    )
    assert cases.wsurg("verify", "out", "--base", "base", "--tuned", "tuned") == 0
    assert cases.wsurg("replay", "out", "-o", "again") == 0


def test_verify_reads_the_index_of_an_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where somebody seals the record again, so that no hash tells."""
    out = tmp_path / "out"
    save(open_checkpoint(hostile.sharded(tmp_path / "model")), out)
    for listed in ({"a": SHARDS[0]}, {**WHERE, "c": SHARDS[0]}, {"a": SHARDS[1], "b": SHARDS[1]}):
        content = dump(index(listed, 96))
        (out / INDEX).write_bytes(content)
        record = json.loads((out / "wsurg-record.json").read_text())
        digest = hashlib.sha256(content).hexdigest()
        record["outputs"][INDEX] = {"size": len(content), "sha256": digest}
        (out / "wsurg-record.json").write_bytes(dump(sealed(record)))
        assert cases.wsurg("verify", out) == 10
        assert f"{INDEX} (malformed)" in capsys.readouterr().err


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
    with pytest.raises(SettingError, match="weights file not found") as told:
        open_checkpoint(model, weights=name)
    hostile.check_told(told.value, file=model)
    assert told.value.exit_code == 2


def test_there_is_no_choice_of_weights_in_a_file(tmp_path: Path) -> None:
    path = hostile.folder(tmp_path / "model", ONE) / "model.safetensors"
    with pytest.raises(SettingError, match="names a file of a model directory") as told:
        open_checkpoint(path, weights="model.safetensors")
    hostile.check_told(told.value, file=path)


# --- what transformers loads ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("change", ["unlisted", "moved", "another file", "no index"])
def test_transformers_loads_the_same_of_the_output(tmp_path: Path, change: str) -> None:
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    path = tmp_path / "in"
    module = transformers.LlamaForCausalLM(config)
    module.save_pretrained(path, max_shard_size="8KB")
    listed = json.loads((path / INDEX).read_text())
    if change == "unlisted":
        del listed["weight_map"]["model.norm.weight"]
    elif change == "moved":
        places = listed["weight_map"]
        others = sorted(set(places.values()) - {places["model.norm.weight"]})
        places["model.norm.weight"] = others[0]
    elif change == "another file":
        (path / MTP).write_bytes(weights("mtp.layers.0.weight"))
    (path / INDEX).write_text(json.dumps(listed))
    loaded = transformers.LlamaForCausalLM.from_pretrained(path).state_dict()
    if change == "no index":
        (path / INDEX).unlink()
    found = open_checkpoint(path)
    assert found.warnings
    save(found, tmp_path / "out")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert again.keys() == loaded.keys()
    for name, value in module.state_dict().items():
        assert torch.equal(loaded[name], value), name
        assert torch.equal(again[name], value), name
