"""Runs commands in turns and takes their wall time and the peak memory of their process tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import psutil

SAMPLE_SECONDS = 0.2
ERROR_CHARACTERS = 400


@dataclass(frozen=True)
class Command:
    """A command line, and the output that it writes and that is removed after each run."""

    label: str
    arguments: tuple[str, ...]
    output: Path | None = None


@dataclass
class Result:
    """What the runs of one command took; `error` tells why there are no more of them."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    error: str = ""

    @property
    def best(self) -> float | None:
        """The shortest run: other people's work only ever adds time."""
        return None if self.error or not self.seconds else min(self.seconds)

    @property
    def spread(self) -> float | None:
        """How much longer the longest run took than the shortest, as a share."""
        return None if self.best is None else max(self.seconds) / self.best - 1


class TreeWatch(threading.Thread):
    """Samples the resident memory of a process and all its descendants, added up."""

    def __init__(self, pid: int) -> None:
        """Prepare to watch process `pid`."""
        super().__init__(daemon=True)
        self.pid = pid
        self.peak_bytes = 0
        self.stopped = threading.Event()

    def run(self) -> None:
        """Sample until `stopped` is set; a process that has just ended counts nothing."""
        while not self.stopped.wait(SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, tree_bytes(self.pid))


def tree_bytes(pid: int) -> int:
    """Return the resident memory of process `pid` and its descendants, 0 when it has ended."""
    try:
        root = psutil.Process(pid)
        return sum(each.memory_info().rss for each in [root, *root.children(recursive=True)])
    except psutil.Error:
        return 0


def run(command: Command, result: Result) -> None:
    """Run `command` once and add what it took to `result`."""
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            command.arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"},
        )
        watch = TreeWatch(process.pid)
        watch.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        watch.stopped.set()
        watch.join()
        if process.returncode:
            result.error = f"exit code {process.returncode}: {last_words(errors)}"
    unit = 1 if sys.platform == "darwin" else 1024
    result.seconds.append(seconds)
    result.peak_bytes = max(result.peak_bytes, usage.ru_maxrss * unit, watch.peak_bytes)


def last_words(errors: BinaryIO) -> str:
    """Return the end of what a command wrote to stderr."""
    errors.seek(0)
    return errors.read().decode(errors="replace").strip()[-ERROR_CHARACTERS:]


def remove_output(command: Command) -> None:
    """Remove what `command` wrote, if it is there."""
    if command.output is not None:
        shutil.rmtree(command.output, ignore_errors=True)


def run_alone(command: Command, result: Result, warm: Command | None) -> None:
    """Run `command` once, undisturbed by what ran before it, and remove its output."""
    remove_output(command)
    os.sync()
    if warm is not None:
        run(warm, Result())
    try:
        run(command, result)
    finally:
        remove_output(command)


def take_turns(
    commands: Sequence[Command], repeats: int, warm: Command | None = None
) -> dict[str, Result]:
    """Run every command once, then every command again, so that noise hits all of them.

    Before each run earlier writes are flushed, and `warm` is run to bring the inputs into the
    page cache: a system that reclaims memory early has often dropped them again. A command that
    fails is not run again. Returns the results by the commands' labels.
    """
    results = {command.label: Result() for command in commands}
    for turn in range(repeats):
        for command in commands:
            result = results[command.label]
            if not result.error:
                run_alone(command, result, warm)
                took = result.error or f"{result.seconds[-1]:.2f} s"
                print(f"  {command.label}, run {turn + 1}: {took}", file=sys.stderr)
    return results
