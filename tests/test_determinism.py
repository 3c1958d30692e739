"""The same inputs, settings and seed give the same bytes, whatever runs them and wherever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import cases
from weightsurgery import drift_kernel

# Not ASCII, for the sake of locales.
BASE, TUNED = "Grundmodell ä", "Feinabstimmung 微調"
TOKENS = ["[PAD]", "straße", "日本", "naïve", "\u00a0", "é", "e\u0301", "x", "y", "z", "🙂"]
COMMANDS = {
    "mix": ["mix", "--ratio", "0.3", "--seed", "7"],
    "mix by drift": ["mix", "--ratio", "0.7", "--select", "drift"],
    "interpolate": ["interpolate", "--weight", "0.4"],
}
EVERY = pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
RECORD = "wsurg-record.json"
Digests = dict[str, str]


def many_kinds() -> tuple[cases.Arrays, cases.Arrays]:
    """A pair with F16, BF16, F32, integer and boolean tensors, and many equal drifts."""
    base: cases.Arrays = {}
    tuned: cases.Arrays = {}
    for family in cases.FAMILIES:
        old, new = cases.pair(family)
        # Of several word embeddings no tokens would be listed.
        names = [n for n in old if n != cases.EMBEDDING[family] or family == "bert"]
        base |= {name: old[name] for name in names}
        tuned |= {name: new[name] for name in names}
    base["Gewicht ß 重み"] = np.zeros((40, 6), np.float32)
    tuned["Gewicht ß 重み"] = np.tile(np.float32([0, 1, -1, 2, -2, 3]), (40, 1))
    return base, tuned


def write_models(folder: Path, *, shards: int) -> None:
    for name, arrays in zip((BASE, TUNED), many_kinds(), strict=True):
        model = cases.write_directory(
            folder / name, arrays, shards=shards, config=cases.CONFIGS["bert"]
        )
        (model / "vocab.txt").write_text("\n".join(TOKENS) + "\n", "utf-8")


# --- workers and shards -----------------------------------------------------------------------


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for each number of shards, with a pair in it; tensors have many blocks."""
    cases.shrink_blocks(monkeypatch, 32)
    for shards in cases.SHARDS:
        write_models(tmp_path / str(shards), shards=shards)
    return tmp_path


def run_all_workers(folder: Path, command: list[str], *options: str) -> Path:
    """Run with each number of workers; the outputs are one. Gives the folder of the last."""
    name, *settings = command
    found: list[Digests] = []
    for workers in cases.WORKERS:
        place = folder / f"{workers} workers"
        place.mkdir()
        given = [name, folder / BASE, folder / TUNED, *settings, *options, "--workers", workers]
        assert cases.wsurg(*given, "-o", place / "out") == 0
        found.append(cases.digests(place))
    assert found[0] == found[1] == found[2]
    assert {f"out/{RECORD}", "out/README.md", "out/config.json"} < found[0].keys()
    return place / "out"


def record_of(out: Path) -> dict[str, Any]:
    """The record, without what tells how the inputs are stored."""
    record: dict[str, Any] = json.loads((out / RECORD).read_bytes())
    del record["record_sha256"]  # of the inputs' names and files too
    assert [source.pop("name") for source in record["inputs"]] == [BASE, TUNED]
    del record["inputs"]
    return record


@EVERY
def test_workers_and_shards_do_not_matter(command: list[str], models: Path) -> None:
    found = []
    for shards in cases.SHARDS:
        out = run_all_workers(models / str(shards), command)
        assert len(list(out.glob("*.safetensors"))) == shards
        record = record_of(out)
        del record["outputs"]  # the files mirror the input's
        for entry in record["tensors"].values():
            del entry["file"]
        side_files = [(out / name).read_bytes() for name in ("config.json", "vocab.txt")]
        found.append((cases.stored_in(out), record, side_files))
    assert found[0] == found[1] == found[2]
    assert found[0][1]["changed_dimensions"] > 200


@EVERY
def test_shards_of_a_given_size_are_the_same_files(command: list[str], models: Path) -> None:
    found = []
    for shards in cases.SHARDS:
        out = run_all_workers(models / str(shards), command, "--max-shard-size", "1kB")
        assert len(list(out.glob("*.safetensors"))) > 3
        record = record_of(out)
        (out / RECORD).unlink()
        found.append((cases.digests(out), record))
    assert found[0] == found[1] == found[2]
    assert found[0][0].keys() >= {"README.md", "config.json", "model.safetensors.index.json"}


@EVERY
def test_workers_do_not_matter_to_a_file(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases.shrink_blocks(monkeypatch, 32)
    base, tuned = (
        cases.write_file(tmp_path / f"{name}.safetensors", arrays)
        for name, arrays in zip((BASE, TUNED), many_kinds(), strict=True)
    )
    found = []
    for workers in cases.WORKERS:
        out = tmp_path / str(workers) / "out.safetensors"
        out.parent.mkdir()
        assert cases.wsurg(*command, base, tuned, "-o", out, "--workers", workers) == 0
        found.append(cases.digests(out.parent))
    assert found[0] == found[1] == found[2]
    assert found[0].keys() == {"out.safetensors", f"out.safetensors.{RECORD}"}


def test_workers_and_shards_do_not_matter_to_diff(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = set()
    for shards in cases.SHARDS:
        monkeypatch.chdir(models / str(shards))
        for workers in cases.WORKERS:
            assert cases.wsurg("diff", BASE, TUNED, "--json", "--workers", workers) == 0
            found.add(capsys.readouterr().out)
    assert len(found) == 1
    report = json.loads(found.pop())
    assert len(report["tensors"]) > 20
    assert {entry["token"] for entry in report["top"]["tokens"]} & set(TOKENS)


@pytest.mark.parametrize("size", [8, 9, 10, 12, 768, 2058])
def test_where_in_memory_a_block_lies_does_not_matter(
    size: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Compiled loops look at run time how far apart their arrays lie, and run in lanes or not.
    base, drift = rng.normal(size=(2, size)).astype(np.float32)
    tuned = base + drift
    memory = np.zeros(1 << 16, np.uint8)
    moved = memory[-memory.ctypes.data % 64 :][: base.nbytes].view(np.float32)
    moved[:] = base
    after = memory[moved.ctypes.data - memory.ctypes.data + -(-base.nbytes // 16) * 16 :]

    def totals() -> bytes:
        found = drift_kernel.drift_statistics(moved, tuned, width=size, top=2, by_column=True)
        return found[0].tobytes()

    found = {totals()}
    for gap in range(0, 512, 16):  # the kernel's own memory lies this far behind the block
        with monkeypatch.context() as patched:
            patched.setattr(np, "empty", lambda n, dtype, at=gap: after[at:].view(dtype)[:n])
            found.add(totals())
    assert len(found) == 1
