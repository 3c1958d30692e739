"""What is fuzzed: every way in for bytes of a stranger, and what must hold of each.

A target takes a folder and bytes, puts the bytes where a stranger's file would be, and opens that.
It gives whether they were accepted; if so they mean to us what they mean to an independent reader.
Only our own exceptions may come of the rest. A broken promise is an AssertionError, or whatever
else comes out.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import safetensors

from tests import cases, hostile
from tests.hostile import INDEX, SHARDS, entry, index, raw, weights
from weightsurgery import apply_adapter, mix, open_checkpoint, replay, save, verify
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.cli import cli
from weightsurgery.cli.settings_file import read_settings
from weightsurgery.errors import SurgeryError
from weightsurgery.formats.record import SEAL, sealed
from weightsurgery.formats.recorded import read_record
from weightsurgery.formats.strict_json import dump
from weightsurgery.formats.vocabulary import read_special, read_vocabulary

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Target = Callable[[Path, bytes], bool]
RECORD = "wsurg-record.json"
ONE = {"model.safetensors": weights("a"), "config.json": {"model_type": "bert"}}
MALFORMED = (2, 3, 4, 5, 6)  # exit codes of what a file can be guilty of; 1 is our own bug


def _opened(open_it: Callable[[], Any], codes: tuple[int, ...] = (3, 5)) -> Any:
    """What opening gives; None if it is refused, in one line and for a reason of these kinds."""
    told: SurgeryError | None = None
    try:
        return open_it()
    except SurgeryError as error:
        told = error
    assert told.exit_code in codes, repr(told)
    assert str(told).isprintable(), repr(told)
    return None


def _model(folder: Path, files: Mapping[str, Any]) -> Path:
    """A model that is made once for each folder; the first file is written each time."""
    model = folder / "model"
    if not model.exists():
        hostile.folder(model, files)
    return model


# --- weights ------------------------------------------------------------------------------------


def weights_file(folder: Path, data: bytes) -> bool:
    """A safetensors file: what we accept the library accepts, with equal bytes."""
    path = folder / "x.safetensors"
    path.write_bytes(data)
    found = _opened(partial(open_checkpoint, path))
    if found is None:
        return False
    assert hostile.stored(found) == hostile.stored_by_library(data)
    with safetensors.safe_open(path, framework="np") as library:
        assert list(found) == sorted(library.keys())
        assert found.metadata == (library.metadata() or {})
    return True


def header(folder: Path, data: bytes) -> bool:
    """The same of a header whose length is right, and of as much data as fits it, if any does."""
    size = 0
    try:
        entries = json.loads(data)
        size = max(int(e["data_offsets"][1]) for e in entries.values() if "data_offsets" in e)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError):
        pass
    return weights_file(folder, raw(data, bytes(size if 0 <= size < 1 << 16 else 4)))


def index_file(folder: Path, data: bytes) -> bool:
    """An index: what is read is all that the library finds in the shards, whatever it lists."""
    model = _model(folder, {n: weights(t) for n, t in zip(SHARDS, "ab", strict=True)})
    (model / INDEX).write_bytes(data)
    found = _opened(partial(open_checkpoint, model))
    if found is None:
        return False
    listed = json.loads(data)["weight_map"]
    shards = {file.name for file in found.files} - {INDEX}
    assert shards >= set(listed.values())
    assert found.layout == listed or found.warnings
    library = {
        name: tensor
        for shard in shards
        for name, tensor in hostile.stored_by_library((model / shard).read_bytes()).items()
    }
    assert hostile.stored(found) == library
    return True


# --- JSON beside the weights --------------------------------------------------------------------


def config(folder: Path, data: bytes) -> bool:
    """A config.json: it is read as any parser reads it, and what is written loads no code."""
    model = _model(folder, ONE)
    (model / "config.json").write_bytes(data)
    found = _opened(partial(open_checkpoint, model))
    if found is None:
        return False
    assert json.dumps(found.config) == json.dumps(json.loads(data))  # as text: NaN is not NaN
    shutil.rmtree(folder / "out", ignore_errors=True)
    save(found, str(folder / "out"), hashes=False)
    written = (folder / "out" / "config.json").read_bytes()
    assert not {"auto_map", "custom_pipelines", "trust_remote_code"} & _keys(json.loads(written))
    return True


def _keys(value: Any) -> set[str]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {*(value if isinstance(value, dict) else ())}.union(*map(_keys, inner))


def adapter_config(folder: Path, data: bytes) -> bool:
    """An adapter's configuration: what is folded in is what it says, or it is refused."""
    base = cases.model("bert")
    arrays = cases.adapter(base)
    if not (folder / "base").exists():
        cases.write_directory(folder / "base", base)
        cases.write_adapter(folder / "adapter", arrays, {})
    (folder / "adapter" / "adapter_config.json").write_bytes(data)
    merged = _opened(partial(_merged, folder), (3, 4, 5))
    if merged is None:
        return False
    told = json.loads(data)
    for name, before in base.items():
        module = name.removesuffix(".weight")
        factors = [arrays.get(f"base_model.model.{module}.lora_{x}.weight") for x in "AB"]
        expected = before
        if factors[0] is not None and factors[1] is not None:
            expected = before + _scale(told, module) * (factors[1] @ factors[0])
        np.testing.assert_allclose(merged[name], expected, rtol=1e-5, atol=1e-5)
    return True


def _merged(folder: Path) -> cases.Arrays:
    base, adapter = open_checkpoint(folder / "base"), open_checkpoint(folder / "adapter")
    return cases.read(apply_adapter(base, adapter, force_base=True))


def _scale(told: dict[str, Any], module: str) -> float:
    """Alpha over rank, as PEFT finds the two."""

    def found(patterns: dict[str, Any] | None, otherwise: Any) -> Any:
        for key, value in (patterns or {}).items():
            plain = key.removeprefix("^")
            if module == plain or (plain == key and module.endswith(f".{key}")):
                return value
        return otherwise

    rank = found(told.get("rank_pattern"), told["r"])
    alpha = found(told.get("alpha_pattern"), told["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if told.get("use_rslora") else rank))


def tokenizer(folder: Path, data: bytes) -> bool:
    """A tokenizer.json: numbers and texts come of it, whatever it is."""
    model = _model(folder, ONE)
    (model / "tokenizer.json").write_bytes(data)
    opened = open_checkpoint(model)
    found = _opened(lambda: (read_vocabulary(opened), read_special(opened)), (3,))
    if found is None:
        return False
    json.loads(data)
    vocabulary, special = found
    assert all(type(number) is int for number in (*vocabulary, *special))
    assert all(isinstance(token, str) for token in vocabulary.values())
    return True


# --- records and settings -----------------------------------------------------------------------


def record(folder: Path, data: bytes) -> bool:
    """A record: what is altered is not proved, and nothing that it says is believed."""
    out = _output(folder)
    path = out / RECORD
    path.write_bytes(data)
    found = _opened(partial(read_record, str(path)), (3,))
    if found is None:
        return False
    assert found.content == json.loads(data)
    report = _opened(partial(verify, out), MALFORMED)
    assert report is None or report["proved"] <= found.intact
    return True


def sealed_record(folder: Path, data: bytes) -> bool:
    """A record by somebody who knows how to seal one, verified and replayed."""
    out = _output(folder)
    try:
        told = json.loads(data)
        (out / RECORD).write_bytes(dump(sealed(told)))
    except (ValueError, TypeError, AttributeError, RecursionError):  # no object, or no JSON
        (out / RECORD).write_bytes(data)
    base, tuned = (open_checkpoint(folder / name) for name in ("base", "tuned"))
    report = _opened(partial(verify, out, base=base, tuned=tuned), MALFORMED)
    first = json.loads((folder / "first.json").read_bytes())
    if report is not None and report["proved"] and all(g["same"] for g in _inputs(report)):
        assert all(dump(told[key]) == dump(first[key]) for key in _PROVED)
    again = folder / "again"
    shutil.rmtree(again, ignore_errors=True)
    replayed = _opened(partial(replay, out, again), MALFORMED)
    assert again.exists() == (replayed is not None)
    assert replayed is None or replayed["identical"] == (sealed(told) == first)
    return report is not None


# What a proof with the very inputs leaves no choice of; files and warnings may be told otherwise.
_PROVED = ("changed_dimensions", "eligible_dimensions", "changed_by", "alignment", "report")


def _inputs(report: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = report["selection"]["inputs"]
    return found


def _output(folder: Path) -> Path:
    """A model that was mixed, with its inputs beside it."""
    out = folder / "out"
    if not out.exists():
        opened: list[Checkpoint] = []
        for name, arrays in zip(("base", "tuned"), cases.pair(), strict=True):
            cases.write_directory(folder / name, arrays, config={"model_type": "bert"})
            opened.append(open_checkpoint(folder / name))
        save(mix(*opened), str(out))
        shutil.copy(out / RECORD, folder / "first.json")
    return out


def _commands() -> dict[str, click.Command]:
    context = click.Context(cli)
    found = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}


COMMANDS = _commands()


def settings(folder: Path, data: bytes) -> bool:
    """A wsurg.toml: only what each option takes reaches click."""
    path = folder / "wsurg.toml"
    path.write_bytes(data)
    found = _opened(partial(read_settings, str(path), click.Context(cli)), (2, 3))
    if found is None:
        return False
    assert tomllib.loads(data.decode()).keys() or not any(found.values())
    for name, given in found.items():
        assert given.keys() <= {parameter.name for parameter in COMMANDS[name].params}
        for value in given.values():
            for one in value if isinstance(value, list) else [value]:
                assert isinstance(one, bool | int | float | str)
    return True


# --- all of them, each with what it takes -------------------------------------------------------


def _record_seed() -> bytes:
    """A record as `mix` writes it; made where the seeds are wanted."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return (_output(Path(folder)) / RECORD).read_bytes()


def _json(*values: Any) -> list[bytes]:
    return [json.dumps(value).encode() for value in values]


ADAPTER = cases.adapter_config(
    rank_pattern={"query": 2},
    alpha_pattern={"^encoder.layer.0.attention.self.key": 5, "value": 0.5},
    use_rslora=True,
    use_dora=False,
    bias="none",
    target_modules=["query"],
    modules_to_save=None,
    base_model_name_or_path="org/base",
)
TOKENIZER = {
    "added_tokens": [{"id": 0, "content": "<s>", "special": True}],
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]},
}
TOML = b"""ratio = 0.3
base = "base"
json = true
workers = 2
[mix]
seed = 7
no-hash = true
[purify]
"exclude" = ["a", "b"]
"""
HEADER = {
    "__metadata__": {"format": "pt"},
    "a": entry(),
    "b": entry(4, 10, dtype="BF16", shape=[3, 1]),
    "c": entry(10, 10, shape=[0]),
}

TARGETS: dict[str, Target] = {
    "weights": weights_file,
    "header": header,
    "index": index_file,
    "config": config,
    "adapter-config": adapter_config,
    "tokenizer": tokenizer,
    "record": record,
    "sealed-record": sealed_record,
    "settings": settings,
}
SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "weights": lambda: [weights("a", "b"), raw(HEADER, bytes(10)), raw({}, b"")],
    "header": lambda: _json(HEADER, {"w": entry()}),
    "index": lambda: _json(index({"a": SHARDS[0], "b": SHARDS[1]}, 96)),
    "config": lambda: _json(
        {"model_type": "bert", "auto_map": {"A": "m.C"}, "text_config": {"_attn_implementation": 1}}
    ),
    "adapter-config": lambda: _json(ADAPTER, cases.adapter_config()),
    "tokenizer": lambda: _json(TOKENIZER, {"model": {"vocab": [["a", -1.5]]}}),
    "record": lambda: [_record_seed()],
    "sealed-record": lambda: [_record_seed()],
    "settings": lambda: [TOML],
}
# Words that a mutation would not find by itself.
WORDS = [
    *("dtype", "shape", "data_offsets", "__metadata__", "F32", "BF16", "F4", "F6_E2M3", "BOOL"),
    *("weight_map", "metadata", "total_size", *SHARDS, "../", "transformers_weights", "auto_map"),
    *ADAPTER,
    *("trainable_token_indices", "target_parameters", "lora_bias", "init_lora_weights"),
    *(
        "added_tokens",
        "vocab",
        "special",
        "content",
        "schema",
        SEAL,
        "recipe",
        "operator",
        "inputs",
    ),
    *("settings", "ratio", "seed", "select", "drift", "outputs", "tensors", "sha256", "status"),
    *(
        "\\u0077",
        "\\ud800",
        "NaN",
        "Infinity",
        "1e999",
        "-0",
        "true",
        "null",
        "[[mix]]",
        "0x",
        "inf",
    ),
]


def run(name: str, folder: Path, data: bytes) -> bool:
    """One target, in a folder of its own.

    Args:
        name: Of the target.
        folder: Where all of them may write.
        data: The stranger's.

    Returns:
        Whether it was accepted.
    """
    place = folder / name
    place.mkdir(exist_ok=True)
    before = os.getcwd()
    try:
        return TARGETS[name](place, data)
    finally:
        assert os.getcwd() == before
