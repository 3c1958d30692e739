"""All of an output appears, or nothing: failures, interrupts, and other runs."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import hostile
from tests.faults.door import FAULTS, SURVIVED, Door, standing
from tests.hostile import weights
from tests.scene import IN_THE_WAY, KINDS, RECORD, Scene, at_progress, must_refuse, other
from weightsurgery import from_arrays, interpolate
from weightsurgery.errors import (
    BusyError,
    NonFiniteError,
    PolicyError,
    StorageError,
)
from weightsurgery.formats import disk, open_checkpoint, output, save
from weightsurgery.stream import Engine


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


# --- failures ---------------------------------------------------------------------------------


def failing(really: Any, number: int, code: int, *, short: bool) -> tuple[Any, list[int]]:
    """A system call that fails at the N-th time; where `short`, the others write a bit only."""
    calls: list[int] = []

    def call(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise OSError(code, os.strerror(code))
        if short:
            return really(arguments[0], memoryview(arguments[1])[:100])
        return really(*arguments)

    return call, calls


@pytest.mark.parametrize("old", [False, True], ids=["new", "overwrite"])
@KINDS
@pytest.mark.parametrize("fault", FAULTS)
def test_a_failing_call_leaves_nothing(scene: Scene, fault: str, kind: str, old: bool) -> None:
    if old:
        save(other(kind), str(scene.out(kind)))
    checkpoint, before, number, told = scene.open(kind), hostile.contents(scene.root), 0, 0
    how, persistent = FAULTS[fault]
    while True:
        number += 1
        with standing(Door(number, how, persistent=persistent)) as door:
            try:
                save(checkpoint, str(scene.out(kind)), overwrite=old, hashes=False)
            except StorageError:
                told += 1
                after = hostile.contents(scene.root)
            else:
                after = {}
        if not after and not door.reached:
            break
        if after != before and after:  # nothing could be moved back any more, or removed
            assert fault in ("input/output errors from then on", "interrupted from then on")
            old_or_new(scene, kind, before)
        if after == before or not scene.out(kind).exists():
            save(checkpoint, str(scene.out(kind)), overwrite=old)
            assert hostile.stored(open_checkpoint(scene.out(kind))) == hostile.stored(checkpoint)
        elif persistent:
            save(checkpoint, str(scene.out(kind)), overwrite=True)
        assert not list(scene.place.glob(".wsurg-*")), (number, door.calls)
        clear(scene)
        if old:
            save(other(kind), str(scene.out(kind)))
    assert number > 10
    assert (told == 0) == (fault in SURVIVED)
    assert not list(scene.place.glob(".wsurg-*"))


def old_or_new(scene: Scene, kind: str, before: Any) -> None:
    """The output is absent, as it was, or the new one; never half of it."""
    out, place = scene.out(kind), f"place/{scene.out(kind).name}"
    now = {n: c for n, c in hostile.contents(scene.root).items() if n.startswith(place)}
    was = {n: c for n, c in before.items() if n.startswith(place)}
    weights = {n: c for n, c in now.items() if not n.endswith(f"{place}.{RECORD}")}
    before_it = {n: c for n, c in was.items() if not n.endswith(f"{place}.{RECORD}")}
    assert weights == before_it or set(open_checkpoint(out)) == {"a", "b"}


def clear(scene: Scene) -> None:
    """An empty place again."""
    shutil.rmtree(scene.place)
    scene.place.mkdir()


@KINDS
@pytest.mark.parametrize("old", [False, True], ids=["new", "overwrite"])
def test_a_failing_move_leaves_nothing(scene: Scene, kind: str, old: bool) -> None:
    if old:
        save(other(kind), str(scene.out(kind)))
    checkpoint, before = scene.open(kind), hostile.contents(scene.root)
    for number in range(1, 3 if kind == "file" else 2):
        call, calls = failing(disk._renameat2, number, errno.EIO, short=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(disk, "_renameat2", call)
            with pytest.raises(StorageError, match="cannot put in place: Input/output error"):
                save(checkpoint, str(scene.out(kind)), overwrite=old)
        assert len(calls) >= number
        assert hostile.contents(scene.root) == before


@KINDS
def test_a_failing_write_out_leaves_nothing(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    # One byte a window: every write fills one, and from the fifth on the oldest is waited for.
    monkeypatch.setattr(output, "_WINDOW", 1)
    really, checkpoint, number = disk.sync_range, scene.open(kind), 0
    before = hostile.contents(scene.root)
    while True:
        number += 1
        call, calls = failing(really, number, errno.EIO, short=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(disk, "sync_range", call)
            with suppress(StorageError):
                save(checkpoint, str(scene.out(kind)), hashes=False)
        if len(calls) < number:
            break
        assert hostile.contents(scene.root) == before
    assert number > 3
    assert hostile.stored(open_checkpoint(scene.out(kind))) == hostile.stored(checkpoint)


@pytest.mark.skipif(sys.platform != "linux", reason="the call is Linux's")
def test_an_error_of_the_write_out_is_told() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        disk.sync_range(-1, 0, 1, disk.WRITE_OUT)
    reading, writing = os.pipe()
    disk.sync_range(writing, 0, 1, disk.WRITE_OUT)  # a file without ranges: only a hint is lost
    os.close(reading)
    os.close(writing)


def test_what_is_on_the_disk_is_waited_for_and_dropped_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(output, "_WINDOW", 10)
    monkeypatch.setattr(disk, "sync_range", lambda _fd, *call: calls.append(call))
    monkeypatch.setattr(os, "posix_fadvise", lambda _fd, *call: calls.append(("drop", *call[:2])))
    file = output.OutputFile(str(tmp_path / "x"))
    for size in (4, 8, 10, 3, 10, 30, 1):
        file.write(bytes([size]) * size)
    file.drop()
    begin, wait = disk.WRITE_OUT, disk.WAIT
    assert calls == [
        *[(0, 12, begin), (12, 22, begin), (22, 35, begin), (35, 65, begin)],
        *[(0, 12, wait), ("drop", 0, 12)],
    ]


@KINDS
def test_all_is_durable_before_it_appears(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    events: list[str] = []
    fsync, move = os.fsync, disk._renameat2

    def noted_fsync(descriptor: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def noted_move(source: str, target: str, flags: int) -> bool:
        events.append(f"move {Path(target).name}")
        return move(source, target, flags)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(disk, "_renameat2", noted_move)
    save(scene.open(kind), str(scene.out(kind)))
    out = scene.out(kind)
    moves = [f"move {out.name}.{RECORD}"] * (kind == "file") + [f"move {out.name}"]
    written = out.iterdir() if kind == "model" else scene.place.iterdir()
    *files, temporary = events[: events.index(moves[0])]
    if kind == "file":  # two moves: what tells a later run that one was not the whole
        assert files.pop() == f"{temporary}/.commit"
    assert sorted(files) == sorted(f"{temporary}/{path.name}" for path in written)
    if kind == "model":  # the index tells that the shards are all there, the record tells of all
        order = [Path(path).name for path in files]
        assert order.index(hostile.INDEX) > max(order.index(name) for name in hostile.SHARDS)
        assert order[-1] == RECORD
    assert Path(temporary).name.startswith(".wsurg-")
    assert events[events.index(temporary) + 1 :] == [*moves, str(scene.place)]


@pytest.mark.parametrize("old", [False, True], ids=["new", "overwrite"])
def test_what_was_in_place_when_its_run_was_killed_stays(scene: Scene, old: bool) -> None:
    out = scene.out("file")
    if old:
        save(other("file"), str(out))
    child = os.fork()
    if child == 0:
        output.Output.__exit__ = lambda *_: os._exit(0)  # type: ignore[method-assign]
        save(scene.open("file"), str(out), overwrite=old)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    content = out.read_bytes()
    Path(f"{out}.{RECORD}").unlink()  # of its own accord; only half is there now
    with pytest.raises(PolicyError, match="exists already"):
        output.check_destination(str(out), is_directory=False, overwrite=False, inputs=[])
    assert out.read_bytes() == content
    assert not list(scene.place.glob(".wsurg-*"))


def interrupt() -> None:
    raise KeyboardInterrupt


@KINDS
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("old", [False, True], ids=["new", "overwrite"])
def test_an_interrupt_leaves_nothing(scene: Scene, kind: str, number: int, old: bool) -> None:
    if old:
        save(other(kind), str(scene.out(kind)))
    checkpoint, before = scene.open(kind), hostile.contents(scene.root)
    engine, threads = at_progress(number, interrupt), set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt) as told:
        save(checkpoint, str(scene.out(kind)), overwrite=old, engine=engine)
    assert hostile.contents(scene.root) == before
    # Nor workers: the traceback holds their generator, and its end must not wait for the garbage
    # collector, which may come while a thread is being started and then waits for ever.
    assert told.tb is not None
    assert set(threading.enumerate()) <= threads


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_value_that_is_not_finite_leaves_nothing(
    scene: Scene, value: float, workers: int
) -> None:
    tuned = hostile.arrays("a", "b", "c")
    tuned["b"][2, 1] = value
    edited = interpolate(from_arrays(hostile.arrays("a", "b", "c", seed=1)), from_arrays(tuned))
    told = must_refuse(
        scene,
        edited,
        scene.out("file"),
        NonFiniteError,
        "NaN or infinity among elements 0 to 12",
        engine=Engine(workers),
    )
    assert (told.tensor, told.exit_code) == ("b", 4)


@KINDS
@pytest.mark.parametrize("make", IN_THE_WAY.values(), ids=IN_THE_WAY.keys())
def test_what_appears_meanwhile_is_not_replaced(scene: Scene, kind: str, make: Any) -> None:
    checkpoint, before = scene.open(kind), hostile.contents(scene.root)
    engine = at_progress(1, lambda: make(scene.out(kind)))
    with pytest.raises(PolicyError, match="appeared while this run was working") as told:
        save(checkpoint, str(scene.out(kind)), engine=engine)
    hostile.check_told(told.value, file=scene.out(kind))
    after = hostile.contents(scene.root)
    assert after.pop(f"place/{scene.out(kind).name}") in (b"precious", "nowhere", None)
    assert after == before


@KINDS
def test_a_temporary_that_vanishes_is_told(scene: Scene, kind: str) -> None:
    def vanish() -> None:
        (temporary,) = scene.place.glob(".wsurg-*")
        shutil.rmtree(temporary)

    checkpoint, before = scene.open(kind), hostile.contents(scene.root)
    with pytest.raises(StorageError, match="No such file or directory"):
        save(checkpoint, str(scene.out(kind)), engine=at_progress(1, vanish))
    assert hostile.contents(scene.root) == before


# --- other runs -------------------------------------------------------------------------------


@KINDS
def test_the_second_run_on_an_output_is_refused(scene: Scene, kind: str) -> None:
    refusals = []

    def second() -> None:
        with hostile.deadline(), pytest.raises(BusyError, match="another run is writing") as told:
            save(other(kind), str(scene.out(kind)))
        refusals.append(told.value)

    save(scene.open(kind), str(scene.out(kind)), engine=at_progress(1, second))
    (told,) = refusals
    hostile.check_told(told, file=scene.out(kind))
    assert told.exit_code == 7
    assert set(open_checkpoint(scene.out(kind))) == {"a", "b"}
    assert not list(scene.place.glob(".wsurg-*"))


@KINDS
def test_runs_on_other_outputs_are_not(scene: Scene, kind: str) -> None:
    name = "two.safetensors" if kind == "file" else "two"
    engine = at_progress(1, lambda: save(other(kind), str(scene.place / name)))
    save(scene.open(kind), str(scene.out(kind)), engine=engine)
    assert set(open_checkpoint(scene.place / name)) == {"c", "d"}
    assert set(open_checkpoint(scene.out(kind))) == {"a", "b"}


@KINDS
@pytest.mark.parametrize("old", [False, True], ids=["new", "overwrite"])
def test_a_run_that_begins_as_another_ends_is_left_alone(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, kind: str, old: bool
) -> None:
    if old:
        save(other(kind), str(scene.out(kind)))
    commit, out = output.Output.commit, str(scene.out(kind))
    begun: list[output.Output] = []

    def commit_and_begin(first: output.Output) -> None:
        commit(first)
        second = output.Output(out, is_directory=kind == "model", overwrite=True, inputs=[])
        with suppress(BusyError):
            begun.append(second.__enter__())

    monkeypatch.setattr(output.Output, "commit", commit_and_begin)
    save(scene.open(kind), out, overwrite=old)
    assert set(open_checkpoint(out)) == {"a", "b"}
    assert len(begun) == (kind == "model" and not old)  # in the other cases the lock is held
    for second in begun:
        with ExitStack() as stack:
            stack.push(second)
            second.write("model.safetensors", weights("second"))
            commit(second)
        assert set(open_checkpoint(out)) == {"second"}
    assert not list(scene.place.glob(".wsurg-*"))


KILLED = """
import os, signal, sys
from weightsurgery import Engine, open_checkpoint, save
engine = Engine(progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))
save(open_checkpoint(sys.argv[1]), sys.argv[2], engine=engine)
"""


@KINDS
def test_what_a_killed_run_left_is_cleared(scene: Scene, kind: str) -> None:
    given = scene.file if kind == "file" else scene.model
    before = hostile.contents(scene.root)
    command = [sys.executable, "-c", KILLED, str(given), str(scene.out(kind))]
    assert subprocess.run(command, check=False).returncode == -9
    assert hostile.contents(given.parent) == hostile.contents(scene.root / "in")
    (left,) = scene.place.iterdir()
    assert left.name.startswith(".wsurg-")
    assert list(left.glob("*.safetensors"))
    hostile.folder(left / "deep", {"file": b"x"})
    (left / "link").symlink_to(scene.root / "in")
    save(scene.open(kind), str(scene.out(kind)))
    assert set(open_checkpoint(scene.out(kind))) == {"a", "b"}
    assert not list(scene.place.glob(".wsurg-*"))
    after = hostile.contents(scene.root)
    assert {name: content for name, content in after.items() if name in before} == before


@pytest.mark.parametrize("make", [lambda p: p.symlink_to("../in"), lambda p: p.write_bytes(b"x")])
def test_a_temporary_that_is_no_directory_is_told(scene: Scene, make: Any) -> None:
    checkpoint, places = scene.open("model"), []
    engine = at_progress(1, lambda: places.extend(scene.place.glob(".wsurg-*")))
    save(checkpoint, str(scene.out("model")), engine=engine)
    shutil.rmtree(scene.out("model"))
    make(places[0])
    told = must_refuse(
        scene, checkpoint, scene.out("model"), StorageError, "cannot open: Not a directory"
    )
    hostile.check_told(told, file=places[0])
