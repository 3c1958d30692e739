"""The writer: the bytes of its files, the record, what it refuses, and all or nothing."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import load_file, save_file

from tests import hostile
from tests.hostile import INDEX, SHARDS, entry, raw, weights
from weightsurgery import from_arrays, interpolate
from weightsurgery.checkpoint import Checkpoint, Step
from weightsurgery.formats import open_checkpoint, save
from weightsurgery.formats.card import make_card
from weightsurgery.stream import Engine

RECORD = "wsurg-record.json"
FILE_RECORD = f"out.safetensors.{RECORD}"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A single file of two tensors, alone in its folder."""
    folder = hostile.folder(tmp_path / "in", {"tuned.safetensors": weights("a", "b")})
    return folder / "tuned.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory of two shards, alone in its folder."""
    return hostile.sharded(tmp_path / "in" / "tuned", {"tokenizer.json": {}, "NOTICE": b"n"})


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder to write to."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


# --- the files --------------------------------------------------------------------------------

LIKE_THE_LIBRARY: dict[str, dict[str, Any]] = {
    "nothing": {},
    "one": {"w": np.arange(6, dtype=np.float32).reshape(2, 3)},
    "scalars and empty ones": {
        "s": np.array(1.5),
        "e": np.zeros((0, 3), np.float16),
        "t": np.array(-1, np.int8),
    },
    "every numpy dtype": {
        f"{kind}{i}": np.arange(i + 1).astype(kind)
        for i, kind in enumerate(
            ["?", "u1", "i1", "i2", "u2", "f2", "i4", "u4", "f4", "c8", "f8", "i8", "u8"]
        )
    },
    "dtypes that numpy lacks": {
        str(kind): np.ones(3, kind)
        for kind in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
    },
    "names that JSON escapes": {
        name: np.ones(1, np.float32) for name in ('"', "\\", "/", "\b\f\n\r\t\x00\x1f\x7f", "")
    },
    "unicode names, sorted by UTF-8": {
        name: np.ones(1, np.float32) for name in ("z", "ä", "\uffff", "\U0001f600", "層", "\u2028")
    },
    "many": {f"layer.{i}.weight": np.full(i % 5, i, np.float16) for i in range(200)},
}


@pytest.mark.parametrize("arrays", LIKE_THE_LIBRARY.values(), ids=LIKE_THE_LIBRARY.keys())
def test_a_file_is_the_librarys_byte_for_byte(place: Path, arrays: dict[str, Any]) -> None:
    save_file(arrays, place / "library.safetensors", metadata={"format": "pt"})
    save(from_arrays(arrays), str(place / "out.safetensors"))
    out = (place / "out.safetensors").read_bytes()
    assert out == (place / "library.safetensors").read_bytes()
    save(open_checkpoint(place / "library.safetensors"), str(place / "again.safetensors"))
    assert (place / "again.safetensors").read_bytes() == out


def test_metadata_is_kept_and_sorted(place: Path) -> None:
    metadata = {"z": "1", "format": "np", "a": "ä\n"}
    save(from_arrays({"w": np.ones(1)}, metadata=metadata), str(place / "out.safetensors"))
    found = open_checkpoint(place / "out.safetensors")
    assert found.metadata == metadata
    assert list(found.metadata) == sorted(metadata)


UNTOUCHED = {
    "signalling NaN, F32": ("F32", [2], b"\x01\0\x80\x7f\xff\xff\xbf\xff"),
    "signalling NaN, BF16": ("BF16", [2], b"\x81\x7f\x01\xff"),
    "signalling NaN, F16": ("F16", [2], b"\x01\x7c\xff\xfd"),
    "signalling NaN, F64": ("F64", [1], b"\1\0\0\0\0\0\xf0\x7f"),
    "-0.0": ("F32", [2], b"\0\0\0\x80\0\0\0\0"),
    "BOOL 2 and 255": ("BOOL", [4], b"\2\xff\0\1"),
    "F4": ("F4", [3, 2], b"\x0f\xf0\x7b"),
    "F6": ("F6_E3M2", [4], b"\xff\x81\x24"),
    "F8": ("F8_E8M0", [3], b"\xff\0\x7f"),
    "C64": ("C64", [1], b"\1\0\x80\x7f\0\0\0\x80"),
}


@pytest.mark.parametrize("engine", [Engine(workers=1), Engine(workers=4)], ids=["1", "4"])
def test_untouched_tensors_are_copied_byte_for_byte(place: Path, engine: Engine) -> None:
    header, data = {}, b""
    for name, (dtype, shape, bits) in UNTOUCHED.items():
        header[name] = entry(len(data), len(data) + len(bits), dtype=dtype, shape=shape)
        data += bits
    (place / "in.safetensors").write_bytes(raw(header, data))
    record = save(
        open_checkpoint(place / "in.safetensors"), str(place / "out.safetensors"), engine=engine
    )
    out = (place / "out.safetensors").read_bytes()
    expected = {n: (dtype, tuple(shape), bits) for n, (dtype, shape, bits) in UNTOUCHED.items()}
    assert hostile.stored_by_library(out) == expected
    assert record["changed_dimensions"] == 0
    assert {e["status"] for e in record["tensors"].values()} == {"copied"}


def test_the_shard_layout_is_kept(model: Path, place: Path) -> None:
    save(open_checkpoint(model), str(place / "out"))
    out = place / "out"
    assert sorted(os.listdir(out)) == sorted([*os.listdir(model), "README.md", RECORD])
    for name in (*SHARDS, "config.json", "tokenizer.json", "NOTICE"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    content = (out / INDEX).read_bytes()
    expected = {
        "metadata": {"total_parameters": 24, "total_size": 96},
        "weight_map": {"a": SHARDS[0], "b": SHARDS[1]},
    }
    assert content == (json.dumps(expected, indent=2, sort_keys=True) + "\n").encode()
    assert set(open_checkpoint(out)) == {"a", "b"}


@pytest.mark.parametrize(
    ("limit", "groups"),
    [
        (1, ["a", "b", "c"]),
        (48, ["a", "b", "c"]),
        (95, ["a", "b", "c"]),
        (96, ["ab", "c"]),
        (144, ["abc"]),
        (10**30, ["abc"]),
    ],
)
def test_max_shard_size(place: Path, limit: int, groups: list[str]) -> None:
    arrays = hostile.arrays("a", "b", "c")
    checkpoint = from_arrays(arrays, is_directory=True)
    record = save(checkpoint, str(place / "out"), max_shard_size=limit)
    count = len(groups)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    names = names if count > 1 else ["model.safetensors"]
    assert sorted(p.name for p in (place / "out").glob("*.safetensors")) == names
    assert [set(load_file(place / "out" / n)) for n in names] == [set(g) for g in groups]
    assert (place / "out" / INDEX).exists() == (count > 1)
    assert set(record["outputs"]) == {*names, "README.md", *([INDEX] if count > 1 else [])}
    assert all(e["sha256"] == sha256(place / "out" / n) for n, e in record["outputs"].items())
    assert hostile.stored(open_checkpoint(place / "out")) == hostile.stored(checkpoint)


def test_one_shard_needs_no_index(tmp_path: Path, place: Path) -> None:
    files = {"config.json": {}, "x-1.safetensors": weights("a")}
    hostile.folder(tmp_path / "in", {**files, INDEX: hostile.index({"a": "x-1.safetensors"})})
    save(open_checkpoint(tmp_path / "in"), str(place / "out"))
    expected = ["README.md", "config.json", "model.safetensors", RECORD]
    assert sorted(os.listdir(place / "out")) == expected


def test_a_tensor_without_a_shard_joins_the_last(place: Path) -> None:
    layout = {"a": SHARDS[0], "b": SHARDS[1]}
    checkpoint = from_arrays(hostile.arrays("0", "a", "b"), is_directory=True, layout=layout)
    save(checkpoint, str(place / "out"))
    assert open_checkpoint(place / "out").layout == {**layout, "0": SHARDS[1]}


def test_modes_are_the_umasks(file: Path, model: Path, place: Path) -> None:
    before = os.umask(0o027)
    try:
        save(open_checkpoint(file), str(place / "out.safetensors"))
        save(open_checkpoint(model), str(place / "out"))
    finally:
        os.umask(before)
    assert (place / "out").stat().st_mode & 0o7777 == 0o750
    files = [p for p in place.rglob("*") if p.is_file()]
    assert len(files) == 2 + 8
    assert {p.stat().st_mode & 0o7777 for p in files} == {0o640}


# --- the record -------------------------------------------------------------------------------


def test_the_records_hashes_are_true(model: Path, place: Path) -> None:
    given = save(open_checkpoint(model), str(place / "out"))
    out = place / "out"
    record = json.loads((out / RECORD).read_bytes())
    assert record == json.loads(json.dumps(given))
    assert set(record["outputs"]) == set(os.listdir(out)) - {RECORD}
    for name, told in record["outputs"].items():
        assert told == {"size": (out / name).stat().st_size, "sha256": sha256(out / name)}
    assert set(record["tensors"]) == {"a", "b"}
    for name, (dtype, shape, data) in hostile.stored(open_checkpoint(out)).items():
        told = record["tensors"][name]
        assert told["sha256"] == hashlib.sha256(data).hexdigest()
        assert (told["dtype"], tuple(told["shape"])) == (dtype, shape)
        assert told["file"] == {"a": SHARDS[0], "b": SHARDS[1]}[name]
    (source,) = record["inputs"]
    assert source["name"] == "tuned"
    sides = ["NOTICE", "config.json", "tokenizer.json"]
    assert [told["name"] for told in source["files"]] == [INDEX, *SHARDS, *sides]
    for told in source["files"]:
        path = model / told["name"]
        assert (told["size"], told["sha256"]) == (path.stat().st_size, sha256(path))


def test_the_record_of_an_edit(file: Path, place: Path) -> None:
    base = hostile.arrays("a", "b", seed=1)
    mixed = interpolate(from_arrays(base, label="/secret/base"), open_checkpoint(file), weight=0.5)
    record = save(mixed, str(place / "out.safetensors"))
    assert {e["status"] for e in record["tensors"].values()} == {"edited"}
    assert record["changed_dimensions"] == record["eligible_dimensions"] == 24
    assert record["recipe"]["operator"] == "interpolate"
    assert [source["name"] for source in record["inputs"]] == ["base", "tuned.safetensors"]
    assert b"/secret" not in (place / FILE_RECORD).read_bytes()


def test_without_hashes(model: Path, place: Path) -> None:
    save(open_checkpoint(model), str(place / "hashed"))
    record = save(open_checkpoint(model), str(place / "out"), hashes=False)
    told = [*record["tensors"].values(), *record["outputs"].values(), *record["inputs"][0]["files"]]
    assert len(told) == 2 + 7 + 6
    assert {e["sha256"] for e in told} == {None}
    for name in (*SHARDS, INDEX, "config.json"):
        assert (place / "out" / name).read_bytes() == (place / "hashed" / name).read_bytes()


def test_the_model_card(model: Path, place: Path) -> None:
    save(open_checkpoint(model), str(place / "out"))
    text = (place / "out" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.tags == ["weightsurgery", "copy"]
    assert f"\n# {model.name}, after copy\n" in text
    for name in (*SHARDS, INDEX, "config.json", "tokenizer.json"):
        assert f"| {name} | {sha256(place / 'out' / name)} |" in text


def chains() -> dict[str, Checkpoint]:
    """Results of one or more operators that edit `tuned`, whatever else they take."""
    base, tuned, fisher = (from_arrays({}, label=f"/x/{n}") for n in ("base", "tuned", "fisher"))

    def step(operator: str, **inputs: Checkpoint) -> Checkpoint:
        return from_arrays({}).made_by(Step(operator, {}, inputs))

    purified = step("purify", base=base, tuned=tuned, fisher=fisher)
    return {
        "nothing": tuned,
        "a last input that is not the subject": purified,
        "two operators": step("epur", base=base, tuned=purified),
        "trained": step("finetune", tuned=purified),
        "measured": step("fisher", base=base, model=purified),
        "renamed": step("mix", base=fisher, tuned=purified.renamed({})),
        "an input of another name": step("shrink", large=tuned),
    }


@pytest.mark.parametrize("made", chains().values(), ids=chains())
def test_the_model_card_is_of_the_model_that_was_edited(made: Checkpoint) -> None:
    record = {"changed_dimensions": 0, "effective_share": None, "outputs": {}}
    title = next(line for line in make_card(made, record).decode().splitlines() if line[:2] == "# ")
    assert title == f"# tuned, after {made.step.operator if made.step else 'copy'}"


@pytest.mark.parametrize("kind", ["file", "model"])
def test_record_and_files_do_not_depend_on_where_and_when(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path: Path = request.getfixturevalue(kind)
    name = "out" if kind == "model" else "out.safetensors"
    found = []
    for number, workers in enumerate((1, 4)):
        place = tmp_path / f"place {number}"
        place.mkdir()
        monkeypatch.chdir(place)
        given = os.path.relpath(path) if number else str(path)
        save(open_checkpoint(given), name if number else str(place / name), engine=Engine(workers))
        found.append(hostile.contents(place))
        for member in [path, *path.rglob("*")]:
            os.utime(member, (number, number))
    assert found[0] == found[1]
    assert len(found[0]) == (2 if kind == "file" else 9)
    for content in found[0].values():
        assert content is None or str(tmp_path).encode() not in bytes(content)
