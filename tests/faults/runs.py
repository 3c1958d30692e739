"""Runs that are killed, and runs that race, with a reader that looks all the time.

Each run is a forked child of this process, which must have no threads of its own.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from tests.faults.door import Door, standing
from weightsurgery import from_arrays
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.errors import BusyError, PolicyError
from weightsurgery.formats import open_checkpoint, save

DONE, BUSY, THERE, BROKEN = 0, 7, 5, 1
NAMES = [f"layers.{i}.weight" for i in range(6)]


class FaultError(Exception):
    """A promise was broken."""


def content(number: int, *, is_directory: bool) -> Checkpoint:
    """An output whose every element tells which it is; a directory has three shards."""
    arrays = {name: np.full((64, 64), number, np.float32) for name in NAMES}
    layout = {n: f"model-0000{i // 2 + 1}-of-00003.safetensors" for i, n in enumerate(NAMES)}
    return from_arrays(
        arrays, label="made", is_directory=is_directory, layout=layout if is_directory else {}
    )


def look(out: Path) -> int | None:
    """Which output a reader finds there; None if there is none.

    Raises:
        FaultError: It is half of one.
    """
    for _ in range(1000):
        if not out.exists():
            return None
        try:
            identity = os.stat(out).st_ino
            found = open_checkpoint(out)
            values = {float(x) for n in found for x in np.unique(found[n].read(0, found[n].size))}
            found.check_unchanged()
        except Exception as error:
            with suppress(FileNotFoundError):  # it was replaced while it was read: look again
                if os.stat(out).st_ino == identity:
                    raise FaultError(f"a reader saw {error}") from error
            continue
        if os.path.exists(out) and os.stat(out).st_ino != identity:
            continue
        if len(values) != 1 or [*found] != NAMES:
            raise FaultError(f"a reader saw {values} in {len(found)} tensors")
        return int(values.pop())
    raise FaultError("it never stood still")


def begin(action: Callable[[], None], seed: int) -> int:
    """A child that does something and ends; its exit code tells how."""
    child = os.fork()
    if child:
        return child
    code = BROKEN
    try:
        random.seed(seed)
        action()
        code = DONE
    except BusyError:
        code = BUSY
    except PolicyError:
        code = THERE
    finally:
        os._exit(code)
    raise AssertionError


def wait(child: int, out: Path, allowed: set[int | None], until: float | None = None) -> int:
    """Read until a child has ended, or kill it at a time; its status as the system gives it.

    Raises:
        FaultError: The reader saw something else than it may.
    """
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if until is not None and time.monotonic() >= until:
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1]
        found = look(out)
        if found not in allowed:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise FaultError(f"a reader saw {found}, expected one of {allowed}")


def place(root: Path, *, is_directory: bool) -> Path:
    """Where a kind of output goes."""
    return root / ("out" if is_directory else "out.safetensors")


def clear(root: Path) -> None:
    """What one round left must be the output alone; remove it.

    Raises:
        FaultError: A temporary is there.
    """
    import shutil

    left = [path.name for path in root.iterdir() if path.name.startswith(".")]
    if left:
        raise FaultError(f"left behind: {left}")
    shutil.rmtree(root)
    root.mkdir()


def killed_at_every_call(root: Path, *, is_directory: bool, old: bool, step: int = 1) -> int:
    """SIGKILL at each output call; then the next run. Gives how many runs were killed."""
    out, number = place(root, is_directory=is_directory), 1
    kills = 0
    while True:
        if old:
            save(content(1, is_directory=is_directory), out)

        def die(call: object, arguments: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def run(number: int = number) -> None:
            with standing(Door(number, die)):
                save(content(2, is_directory=is_directory), out, overwrite=old)

        status = wait(begin(run, number), out, {1 if old else None, 2})
        if not os.WIFSIGNALED(status):
            if status:
                raise FaultError(f"exit code {os.WEXITSTATUS(status)}")
            clear(root)
            return kills
        kills += 1
        go_on(out, old=old, is_directory=is_directory)
        clear(root)
        number += step


def killed_at_random(root: Path, seed: int) -> bool:
    """SIGKILL at some moment; then the next run. Gives whether it came in time."""
    draw = random.Random(seed)
    is_directory, old = draw.random() < 0.5, draw.random() < 0.5
    out = place(root, is_directory=is_directory)
    if old:
        save(content(1, is_directory=is_directory), out)

    def run() -> None:
        save(content(2, is_directory=is_directory), out, overwrite=old)

    until = time.monotonic() + draw.random() * 0.08
    status = wait(begin(run, seed), out, {1 if old else None, 2}, until)
    go_on(out, old=old, is_directory=is_directory)
    clear(root)
    return os.WIFSIGNALED(status)


def go_on(out: Path, *, old: bool, is_directory: bool) -> None:
    """The next run finds what the killed one left, clears it, and writes the whole.

    Raises:
        FaultError: It does not.
    """
    seen = look(out)
    save(content(3, is_directory=is_directory), out, overwrite=old or seen == 2)
    if look(out) != 3:
        raise FaultError("the next run did not write")
    record = out / "wsurg-record.json" if is_directory else Path(f"{out}.wsurg-record.json")
    if not record.is_file():
        raise FaultError("the record is not there")


def race(root: Path, seed: int, runs: int = 4) -> list[int]:
    """Runs that begin at once on one output. Gives their exit codes.

    Raises:
        FaultError: None of them made it, or what is there is not what one made.
    """
    draw = random.Random(seed)
    is_directory, overwrite = draw.random() < 0.5, draw.random() < 0.5
    out = place(root, is_directory=is_directory)
    start, go = os.pipe()

    def run(number: int) -> Callable[[], None]:
        def action() -> None:
            os.close(go)
            os.read(start, 1)  # until the other end is closed
            time.sleep(random.random() * 0.01)
            save(content(number, is_directory=is_directory), out, overwrite=overwrite)

        return action

    children = [begin(run(number), seed * runs + number) for number in range(1, runs + 1)]
    os.close(start)
    os.close(go)
    allowed = {None, *range(1, runs + 1)}
    codes = [os.waitstatus_to_exitcode(wait(child, out, allowed)) for child in children]
    winners = {number for number, code in enumerate(codes, 1) if code == DONE}
    if not winners or not {*codes} <= {DONE, BUSY, THERE}:
        raise FaultError(f"exit codes {codes}")
    if not overwrite and len(winners) != 1:
        raise FaultError(f"{len(winners)} runs made an output that only one could")
    if look(out) not in winners:
        raise FaultError(f"{look(out)} is there, but {winners} made it")
    clear(root)
    return codes
