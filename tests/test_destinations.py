"""What `save` refuses before it works, and how it overwrites."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import hostile
from tests.hostile import weights
from tests.scene import IN_THE_WAY, KINDS, RECORD, Scene, must_refuse, other
from weightsurgery import from_arrays, interpolate
from weightsurgery.cli import cli
from weightsurgery.errors import (
    PolicyError,
    SettingError,
    StorageError,
)
from weightsurgery.formats import disk, open_checkpoint, save


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


# --- destinations -----------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("make", IN_THE_WAY.values(), ids=IN_THE_WAY.keys())
def test_must_refuse_what_exists(scene: Scene, kind: str, make: Any) -> None:
    make(scene.out(kind))
    fits = (kind, make) in (("file", IN_THE_WAY["file"]), ("model", IN_THE_WAY["directory"]))
    reason = "; --overwrite .* replaces it" if fits else " and is not .*; choose another"
    told = must_refuse(
        scene, scene.open(kind), scene.out(kind), PolicyError, f"exists already{reason}"
    )
    hostile.check_told(told, file=scene.out(kind))


def test_must_refuse_a_record_that_exists(scene: Scene) -> None:
    record = scene.place / f"out.safetensors.{RECORD}"
    record.write_bytes(b"precious")
    told = must_refuse(scene, scene.open("file"), scene.out("file"), PolicyError, "exists already")
    hostile.check_told(told, file=record)


OVERLAPS = {
    "the input file": ("file", "in/x.safetensors"),
    "the input file, by dots": ("file", "place/../in/x.safetensors"),
    "a link to the input file": ("file", "place/link.safetensors"),
    "a hard link to the input file": ("file", "place/hard.safetensors"),
    "the input file, in a linked folder": ("file", "linked/x.safetensors"),
    "the input directory": ("model", "in/model"),
    "a link to the input directory": ("model", "place/link"),
    "the input directory, in a linked folder": ("model", "linked/model"),
    "inside the input directory": ("model", "in/model/out"),
    "inside the input directory, linked": ("model", "place/link/out"),
    "around the input directory": ("model", "in"),
    "around the input directory, linked": ("model", "linked"),
    "around everything": ("model", "../"),
}


@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwrite"])
@pytest.mark.parametrize(("kind", "out"), OVERLAPS.values(), ids=OVERLAPS.keys())
def test_must_refuse_overlap(scene: Scene, kind: str, out: str, overwrite: bool) -> None:
    (scene.place / "link.safetensors").symlink_to(scene.file)
    (scene.place / "hard.safetensors").hardlink_to(scene.file)
    (scene.place / "link").symlink_to(scene.model)
    (scene.root / "linked").symlink_to("in")
    path = f"{scene.root}/{out}"
    told = must_refuse(
        scene,
        scene.open(kind),
        path,
        PolicyError,
        "the output would overlap the input .*; choose another output",
        overwrite=overwrite,
    )
    hostile.check_told(told, file=path.rstrip("/"))


@pytest.mark.parametrize("name", ["base", "tuned"])
def test_must_refuse_overlap_with_any_input(scene: Scene, name: str) -> None:
    hostile.folder(scene.root / "in", {"y.safetensors": weights("a", "b", seed=1)})
    base = open_checkpoint(scene.root / "in" / "y.safetensors")
    edited = interpolate(base, scene.open("file"))
    out = scene.root / "in" / ("y.safetensors" if name == "base" else "x.safetensors")
    must_refuse(scene, edited, out, PolicyError, "overlap the input", overwrite=True)


def test_must_refuse_a_record_over_an_input(scene: Scene) -> None:
    path = scene.place / f"out.safetensors.{RECORD}"
    path.write_bytes(weights("a"))
    must_refuse(
        scene,
        open_checkpoint(path),
        scene.out("file"),
        PolicyError,
        "overlap the input",
        overwrite=True,
    )


def test_a_neighbour_of_the_input_is_no_overlap(scene: Scene) -> None:
    save(scene.open("file"), str(scene.root / "in" / "x.safetensors.safetensors"))
    save(scene.open("model"), str(scene.root / "in" / "model2"))
    assert (scene.root / "in" / "model2" / "config.json").is_file()


WRONG = {
    "a file for a directory": ("model", "place/out.safetensors", SettingError, "names a file"),
    "a directory for a file": ("file", "place/out", SettingError, "does not end in .safetensors"),
    "no such folder": ("file", "none/out.safetensors", StorageError, "folder to write to does not"),
    "a file as the folder": ("model", "in/x.safetensors/out", StorageError, "does not exist"),
}


@pytest.mark.parametrize(("kind", "out", "error", "reason"), WRONG.values(), ids=WRONG.keys())
def test_must_refuse_destinations(
    scene: Scene, kind: str, out: str, error: type, reason: str
) -> None:
    must_refuse(scene, scene.open(kind), scene.root / out, error, reason)


ENDINGS = [".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".BIN"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_must_refuse_a_folder_named_as_a_file(scene: Scene, ending: str) -> None:
    out = scene.place / f"out{ending}"
    reason = f"names a file, but the input is a model directory: .*; give a name without {ending};"
    must_refuse(scene, scene.open("model"), out, SettingError, reason)


def test_a_folder_may_be_named_as_a_file_if_a_slash_says_so(scene: Scene) -> None:
    save(scene.open("model"), f"{scene.place}/out.bin/")
    assert (scene.place / "out.bin" / "config.json").is_file()


@pytest.mark.parametrize("ending", [*ENDINGS[1:], ""])
def test_must_refuse_a_file_that_is_named_otherwise(scene: Scene, ending: str) -> None:
    reason = "this output is a single file; give a name that ends in .safetensors"
    must_refuse(scene, scene.open("file"), scene.place / f"out{ending}", SettingError, reason)


@pytest.mark.parametrize(
    "outs",
    [
        ["-o", "out.bin"],
        ["-o", "out", "--mask", "mask.bin"],
        ["-o", "out.gguf", "--dry-run"],
        ["-o", "out", "--mask", "mask.bin", "--dry-run"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("command", ["mix", "purify"])
def test_the_names_of_outputs_are_checked_before_any_work(
    scene: Scene, command: str, outs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def running(*_: Any, **__: Any) -> None:
        raise AssertionError("work has begun")

    monkeypatch.setattr("weightsurgery.cli.options.running", running)
    monkeypatch.chdir(scene.place)
    before = hostile.contents(scene.root)
    inputs = [str(scene.model), str(scene.model)]
    score = ["--score", "drift"] if command == "purify" else []
    with pytest.raises(SettingError, match="give a name"):
        cli.main([command, *inputs, *score, *outs], standalone_mode=False)
    assert hostile.contents(scene.root) == before


SIZES = {
    "a file in shards": ("file", {"max_shard_size": 100}, "single file cannot be sharded"),
    "shards of nothing": ("model", {"max_shard_size": 0}, "expected at least 1 byte"),
    "no size": ("model", {"max_shard_size": "5 parsecs"}, "'5 parsecs' is not a size"),
    "no memory": (
        "model",
        {"max_memory": 1000},
        "1,000 bytes is too small; one worker needs",
    ),
}


@pytest.mark.parametrize(("kind", "options", "reason"), SIZES.values(), ids=SIZES.keys())
def test_must_refuse_sizes(scene: Scene, kind: str, options: dict[str, Any], reason: str) -> None:
    must_refuse(scene, scene.open(kind), scene.out(kind), SettingError, reason, **options)


@KINDS
def test_must_refuse_without_room(scene: Scene, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    room = SimpleNamespace(f_bavail=16, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda _path: room)
    told = must_refuse(
        scene, scene.open(kind), scene.out(kind), StorageError, "65,536 free; make room first"
    )
    hostile.check_told(told, file=scene.out(kind))


def test_must_refuse_a_folder_that_is_not_writable(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    must_refuse(scene, scene.open("file"), scene.out("file"), StorageError, "is not writable")


# --- overwriting ------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("renameat2", [True, False], ids=["exchange", "no exchange"])
def test_overwrite_replaces_all(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, kind: str, renameat2: bool
) -> None:
    if not renameat2:
        monkeypatch.setattr(disk, "_renameat2", lambda *_: False)
    save(scene.open(kind), str(scene.out(kind)))
    (scene.root / "other").mkdir()
    save(other(kind), str(scene.root / "other" / scene.out(kind).name))
    save(other(kind), str(scene.out(kind)), overwrite=True)
    assert hostile.contents(scene.place) == hostile.contents(scene.root / "other")


def test_overwrite_replaces_an_empty_directory(scene: Scene) -> None:
    scene.out("model").mkdir()
    save(other("model"), str(scene.out("model")), overwrite=True)
    assert set(open_checkpoint(scene.out("model"))) == {"c", "d"}


@KINDS
def test_a_reader_sees_the_old_or_the_new(scene: Scene, kind: str) -> None:
    names = [f"w{i}" for i in range(20)]
    checkpoints = [
        from_arrays(hostile.arrays(name), is_directory=kind == "model") for name in names
    ]
    save(checkpoints[0], str(scene.out(kind)))
    path = scene.out(kind) / "model.safetensors" if kind == "model" else scene.out(kind)
    seen: list[bytes | None] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(path.read_bytes() if path.exists() else None)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for checkpoint in checkpoints[1:]:
            save(checkpoint, str(scene.out(kind)), overwrite=True, hashes=False)
    finally:
        done.set()
        watcher.join()
    assert set(seen) <= {weights(name) for name in names}
    assert len(set(seen)) > 2


PRECIOUS: dict[str, Callable[[Path], Any]] = {
    "thesis.tex": lambda p: p.write_bytes(b"precious"),
    "notes.md": lambda p: p.write_bytes(b"precious"),
    "train.py": lambda p: p.write_bytes(b"precious"),
    "data.csv": lambda p: p.write_bytes(b"precious"),
    "results.json": lambda p: p.write_bytes(b"precious"),
    "notes.txt": lambda p: p.write_bytes(b"precious"),
    ".git": Path.mkdir,
    "config.json": Path.mkdir,
    "\x1b[31m": Path.mkdir,
    "model.safetensors": lambda p: p.symlink_to("nowhere"),
}


@pytest.mark.parametrize("name", PRECIOUS)
def test_overwrite_must_refuse_folders_of_other_things(scene: Scene, name: str) -> None:
    scene.out("model").mkdir()
    PRECIOUS[name](scene.out("model") / name)
    told = must_refuse(
        scene,
        other("model"),
        scene.out("model"),
        PolicyError,
        "exists already and contains .*, which is not part of a model; choose another output",
        overwrite=True,
    )
    hostile.check_told(told, file=scene.out("model"))


@KINDS
@pytest.mark.parametrize("make", IN_THE_WAY.values(), ids=IN_THE_WAY.keys())
def test_overwrite_must_refuse_other_kinds(
    scene: Scene, request: pytest.FixtureRequest, kind: str, make: Any
) -> None:
    make(scene.out(kind))
    if (kind, make) in (("file", IN_THE_WAY["file"]), ("model", IN_THE_WAY["directory"])):
        save(other(kind), str(scene.out(kind)), overwrite=True)
        assert set(open_checkpoint(scene.out(kind))) == {"c", "d"}
        return
    must_refuse(
        scene,
        other(kind),
        scene.out(kind),
        PolicyError,
        "exists already and is not a (directory|regular file), so it is not replaced",
        overwrite=True,
    )


def test_a_name_that_is_not_utf8_is_refused(scene: Scene) -> None:
    out = os.fsdecode(os.fsencode(scene.place) + b"/o\xff.safetensors")
    must_refuse(scene, scene.open("file"), out, SettingError, "not UTF-8")


@pytest.mark.parametrize(
    ("kind", "out", "told"),
    [
        ("model", "nowhere/deep/out", "nowhere/deep"),
        ("model", "nowhere/out/", "nowhere"),
        ("model", "in/model", "in/model"),
        ("model", "in/model/", "in/model"),
        ("model", "place/../in/model", "place/../in/model"),
        ("model", "diary", "diary"),
        ("file", "diary.safetensors", "diary.safetensors.wsurg-record.json"),
        ("file", "./diary.safetensors", "./diary.safetensors.wsurg-record.json"),
    ],
)
def test_must_refuse_in_the_users_words(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, kind: str, out: str, told: str
) -> None:
    """A relative path stays one: the absolute one is long, and not what was typed."""
    (scene.root / "diary").mkdir()
    (scene.root / "diary" / "monday.txt").write_text("mine")
    (scene.root / "diary.safetensors.wsurg-record.json").write_text("{}")
    monkeypatch.chdir(scene.root)
    checkpoint = open_checkpoint({"model": "in/model", "file": "in/x.safetensors"}[kind])
    with pytest.raises((PolicyError, StorageError)) as error:
        save(checkpoint, out)
    assert error.value.file == told
    assert str(scene.root) not in str(error.value)
