"""Input files that are no files, are something else, or change while we read them."""

from __future__ import annotations

import gc
import os
import pickle
import re
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import hostile
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.errors import (
    ChangedError,
    FormatError,
    PolicyError,
    StorageError,
    SurgeryError,
)
from weightsurgery.formats import open_checkpoint, save
from weightsurgery.formats.files import InputFile, did_you_mean
from weightsurgery.stream import Engine

LFS = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
REGULAR = "expected a regular file"


def case(name: str, make: Callable[[Path], Any], kind: type, reason: str) -> Any:
    return pytest.param(make, kind, reason, id=name)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def fifo_elsewhere(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)  # a whole path may be too long for a socket


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def looping(path: Path) -> None:
    path.symlink_to("other")
    path.with_name("other").symlink_to(path.name)


def nothing(_path: Path) -> None:
    pass


NO_FILE = [
    case("FIFO", fifo, FormatError, REGULAR),
    case("link to a FIFO", fifo_elsewhere, FormatError, REGULAR),
    case("device that is empty", link_to("/dev/null"), FormatError, REGULAR),
    case("device without end", link_to("/dev/zero"), FormatError, REGULAR),
    case("socket", listening, StorageError, "cannot open: No such device"),
    case("dangling link", link_to("nowhere"), StorageError, "cannot open: No such file"),
    case("looping links", looping, StorageError, "cannot open: Too many levels"),
    case("link to itself", link_to("x.safetensors"), StorageError, "cannot open: Too many levels"),
    case("nothing there", nothing, StorageError, "no such file or directory"),
    case("empty directory", Path.mkdir, FormatError, "no model.safetensors and no"),
]


@pytest.mark.parametrize(("make", "kind", "reason"), NO_FILE)
def test_must_refuse_what_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, kind: type, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.safetensors"
    make(path)
    with hostile.deadline(), pytest.raises(kind, match=reason) as told:
        open_checkpoint(path)
    hostile.check_told(told.value, file=path)
    assert type(told.value) is kind


@pytest.mark.parametrize(
    "name", ["\0", "a\0b.safetensors", "", "x" * 5000, "\udcff", "nowhere/x/y"]
)
def test_must_refuse_names_that_no_file_has(name: str) -> None:
    with pytest.raises(StorageError, match="no such file or directory") as told:
        open_checkpoint(name)
    hostile.check_told(told.value, file=name)


MEMBERS = ["model.safetensors", "config.json", hostile.INDEX, *hostile.SHARDS]


@pytest.mark.parametrize("make", [fifo, Path.mkdir], ids=["FIFO", "directory"])
@pytest.mark.parametrize("name", MEMBERS)
def test_must_refuse_in_a_model_directory(tmp_path: Path, name: str, make: Any) -> None:
    model = hostile.sharded(tmp_path / "model")
    if name == "model.safetensors":
        (model / hostile.INDEX).unlink()
    else:
        (model / name).unlink()
    make(model / name)
    with hostile.deadline(), pytest.raises(FormatError, match=REGULAR) as told:
        open_checkpoint(model)
    hostile.check_told(told.value, file=model / name)


# --- something else ---------------------------------------------------------------------------

OTHER_KINDS = {
    "Git LFS pointer": (LFS, "a Git LFS pointer.*; fetch the file itself with `git lfs pull`"),
    "HTML page": (b"<!DOCTYPE html>\n<html>404</html>", "an HTML page.*download the file again"),
    "HTML page, no doctype": (b"<HTML><body>Sign in", "an HTML page"),
    "HTML page, white space": (b"\n  <!doctype html><html>" + bytes(99), "an HTML page"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(99), "a GGUF file; convert it"),
    "text": (b"sentence\tlabel\na film\t1\n", "found text; give a .safetensors file"),
    "text cut in a letter": ("é".encode() * 15 + "a€".encode() + b"\n", "found text"),
    "text with a mark": (b"\xef\xbb\xbfsentence\tlabel\n", "found text"),
    "no text": (b"sentence\xff\xff" + bytes(99), "not a safetensors file, or damaged"),
    "a JSON answer": (b'{"error": "Repository not found"}', "found JSON"),
}


@pytest.mark.parametrize(("content", "reason"), OTHER_KINDS.values(), ids=OTHER_KINDS.keys())
@pytest.mark.parametrize("place", ["x.safetensors", "model/model.safetensors"])
def test_must_refuse_and_name(tmp_path: Path, place: str, content: bytes, reason: str) -> None:
    path = tmp_path / place
    hostile.folder(path.parent, {path.name: content})
    with pytest.raises(FormatError, match=reason) as told:
        open_checkpoint(path if path.parent == tmp_path else path.parent)
    hostile.check_told(told.value, file=path)


class Evil:
    """Its pickle makes a file when it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return open, (self.marker, "w")


def pickled(path: Path, marker: Path, protocol: int) -> None:
    path.write_bytes(pickle.dumps({"w": Evil(marker)}, protocol))


def zipped(path: Path, marker: Path, _protocol: int = 0) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"w": Evil(marker)}, 2))
        archive.writestr("archive/version", "3\n")


PICKLES = [
    *(pytest.param(f"x{end}", pickled, 2, id=end) for end in (".bin", ".pt", ".pth", ".ckpt")),
    *(pytest.param("x.bin", pickled, p, id=f"protocol {p}, .bin") for p in (0, 1, 4)),
    *(pytest.param("x.safetensors", pickled, p, id=f"protocol {p}, renamed") for p in (2, 3, 4, 5)),
    pytest.param("x.bin", zipped, 0, id="zip"),
    pytest.param("x.safetensors", zipped, 0, id="zip, renamed"),
    pytest.param("model/pytorch_model.bin", zipped, 0, id="directory"),
    pytest.param("model/pytorch_model.bin", pickled, 2, id="directory, legacy"),
    pytest.param("model/pytorch_model-00001-of-00001.bin", zipped, 0, id="directory, shards"),
    pytest.param("model/model.safetensors", zipped, 0, id="directory, renamed"),
]


@pytest.mark.parametrize(("place", "make", "protocol"), PICKLES)
def test_must_refuse_pickles_that_are_programs(
    tmp_path: Path, place: str, make: Any, protocol: int
) -> None:
    path, marker = tmp_path / place, tmp_path / "code ran"
    path.parent.mkdir(exist_ok=True)
    make(path, marker, protocol)
    reason = r"needs \w+\.open, which is not on the list|not one that torch|not a PyTorch file|"
    reason += "expected a safetensors file, found a (zip|Python pickle)"
    with pytest.raises((PolicyError, FormatError), match=reason) as told:
        open_checkpoint(path if path.parent == tmp_path else path.parent)
    hostile.check_told(told.value, file=path)
    assert not marker.exists()


# --- changes while we run ---------------------------------------------------------------------


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def rewrite(path: Path) -> None:
    content, time = bytearray(path.read_bytes()), path.stat().st_mtime_ns
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(time, time + 1))


def rewrite_in_secret(path: Path) -> None:
    """The time of modification is that of before; the system's own clock of changes is not."""
    content, before = bytearray(path.read_bytes()), path.stat()
    content[-1] ^= 1
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # the system counts in milliseconds
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def replace(path: Path) -> None:
    time = path.stat().st_mtime_ns
    path.with_name("new").write_bytes(path.read_bytes())
    os.utime(path.with_name("new"), ns=(time, time))
    os.replace(path.with_name("new"), path)


def swap_for_link(path: Path) -> None:
    path.with_name("new").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to("new")


CHANGED = r"(changed|became shorter|gone) while it was read"
CHANGES = [append, truncate, rewrite, rewrite_in_secret, replace, Path.unlink, swap_for_link]
HASHES = pytest.mark.parametrize("hashes", [True, False], ids=["hashes", "no hashes"])


def must_fail(checkpoint: Checkpoint, place: Path, **options: Any) -> ChangedError:
    """Saving raises ChangedError, and nothing is left of it."""
    place.mkdir()
    out = place / ("out" if checkpoint.is_directory else "out.safetensors")
    with pytest.raises(ChangedError, match=CHANGED) as told:
        save(checkpoint, str(out), **options)
    assert told.value.exit_code == 6
    assert list(place.iterdir()) == []
    return told.value


@HASHES
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_a_file_changed_before_it_is_read(tmp_path: Path, change: Any, hashes: bool) -> None:
    path = hostile.folder(tmp_path / "in", {"x.safetensors": hostile.weights("a", "b")})
    path /= "x.safetensors"
    found = open_checkpoint(path)
    change(path)
    told = must_fail(found, tmp_path / "place", hashes=hashes)
    hostile.check_told(told, file=path)


@HASHES
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_a_shard_changed_while_it_is_read(tmp_path: Path, change: Any, hashes: bool) -> None:
    model = hostile.sharded(tmp_path / "model")
    found = open_checkpoint(model)
    todo = [change]

    def progress(_what: str, done: int, _total: int) -> None:
        assert done > 0
        if todo:
            todo.pop()(model / hostile.SHARDS[1])

    engine = Engine(workers=1, progress=progress)
    told = must_fail(found, tmp_path / "place", engine=engine, hashes=hashes)
    hostile.check_told(told, file=model / hostile.SHARDS[1])


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "LICENSE", hostile.INDEX])
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_a_side_file_changed(tmp_path: Path, change: Any, name: str) -> None:
    model = hostile.sharded(tmp_path / "model", {"tokenizer.json": {}, "LICENSE": b"free"})
    found = open_checkpoint(model)
    change(model / name)
    hostile.check_told(must_fail(found, tmp_path / "place"), file=model / name)


def test_a_file_that_ends_early_gives_no_data(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(hostile.weights("a"))
    view = open_checkpoint(path)["a"]
    truncate(path)
    with pytest.raises(ChangedError, match="became shorter while it was read") as told:
        view.read(0, view.size)
    hostile.check_told(told.value, file=path)


def test_a_read_error_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(hostile.weights("a"))
    view = open_checkpoint(path)["a"]

    def broken(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(StorageError, match="cannot read: Input/output error") as told:
        view.read(0, view.size)
    hostile.check_told(told.value, file=path)


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(hostile.weights("a", "b"))
    really = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: really(fd, [views[0][:3]], at))
    found = hostile.stored(open_checkpoint(path))
    assert found == hostile.stored_by_library(path.read_bytes())


def test_a_link_that_the_user_names_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(hostile.weights("a"))
    (tmp_path / "one").symlink_to(path)
    (tmp_path / "two").symlink_to("one")
    found = open_checkpoint(tmp_path / "two")
    assert hostile.stored(found) == hostile.stored_by_library(path.read_bytes())


def offline(*_: object, **__: object) -> None:
    raise OSError("no network")


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("tund", "tuned"),
        ("tund/model.safetensors", "tuned/model.safetensors"),
        ("tuned/model.safetensor", "tuned/model.safetensors"),
        ("tuned/modl.safetensors", "tuned/model.safetensors"),
        ("./tund/", "./tuned"),
        ("tund/other", None),
        ("quite-another", None),
        ("no/folder/at/all", None),
    ],
)
def test_the_nearest_name_is_suggested(
    path: str, near: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile.folder(tmp_path / "tuned", {"model.safetensors": b"", "config.json": b"{}"})
    monkeypatch.chdir(tmp_path)
    assert did_you_mean(path) == ("" if near is None else f"did you mean '{near}'?")
    if near is not None:
        monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
        for opened in (InputFile, open_checkpoint):
            with pytest.raises(StorageError, match=re.escape(f"; did you mean '{near}'?")):
                opened(path)


def test_nothing_is_suggested_for_a_link_that_dangles(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").symlink_to("nowhere")
    with pytest.raises(StorageError, match=r"No such file or directory$"):
        InputFile(str(tmp_path / "a.tsv"))


@pytest.mark.parametrize(
    ("name", "told"), [("gpt2", True), ("gpt2@v1", True), ("a.safetensors", False)]
)
def test_a_name_that_may_be_the_hubs_is_told_how_those_look(
    name: str, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match="no such file or directory") as refused:
        open_checkpoint(name)
    assert ("called org/name" in refused.value.hint) == told


def test_descriptors_are_closed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(hostile.weights("a"))
    gc.collect()  # what earlier tests left in cycles
    before = len(os.listdir("/proc/self/fd"))
    opened = [InputFile(str(path)) for _ in range(8)]
    assert len(os.listdir("/proc/self/fd")) == before + 8
    opened.clear()
    path.write_bytes(b"")
    for _ in range(8):
        with pytest.raises(SurgeryError, match=re.escape("0 bytes")):
            open_checkpoint(path)
    assert len(os.listdir("/proc/self/fd")) == before
