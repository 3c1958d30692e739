"""Progress on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import click

from weightsurgery.stream import Progress

Lines = Literal["none", "some", "steps"]  # printed where no bar can be drawn
_BAR, _NUMBER = 12, 11  # characters of a line that a bar, and each number beside it, should have
_PAUSE = 10.0  # seconds between two of "some" lines: a log stays short, and one sees that it works


@contextmanager
def drawing(
    *amounts: str, key: Callable[[str], str], lines: Lines = "none"
) -> Iterator[Progress | None]:
    """A callback (what, done, total) that draws on stderr, or prints where that is no terminal.

    Args:
        amounts: Rich's columns that tell how much is done.
        key: What is the same for all reports of one bar.
        lines: What to print where there is no terminal: a line for each step that is done, some
            as `printing` chooses them, or none; with none the callback is None there.
    """
    if not sys.stderr.isatty():
        pause = 0.0 if lines == "steps" else _PAUSE
        yield None if lines == "none" else printing(key, pause)
        return
    with _bars(amounts) as bars:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            if key(what) not in tasks:
                tasks[key(what)] = bars.add_task(what, total=total)
            bars.update(tasks[key(what)], description=what, completed=done, total=total)

        yield progress


def _bars(amounts: Sequence[str]) -> Any:
    """Rich's bars, each behind what it is about, or below it where a line has no room for both."""
    from rich import progress as drawn
    from rich.console import Console
    from rich.table import Column
    from rich.text import Text

    described = drawn.TextColumn("{task.description}", markup=False)
    # The bar alone gives way: numbers are neither cut nor broken.
    numbers = [
        getattr(drawn, name)(table_column=Column(no_wrap=True))
        for name in (*amounts, "TimeRemainingColumn")
    ]
    beside = _BAR + _NUMBER * len(numbers)
    console = Console(stderr=True)

    class Bars(drawn.Progress):
        def get_renderables(self) -> Iterator[Any]:
            longest = max((len(task.description) for task in self.tasks), default=0)
            kept = numbers if beside <= console.width + _BAR // 2 else numbers[:1]
            self.columns = (drawn.BarColumn(), *kept)
            if longest + beside <= console.width:
                self.columns = (described, *self.columns)
                yield self.make_tasks_table(self.tasks)
                return
            for task in self.tasks:
                yield Text(task.description)
                yield self.make_tasks_table([task])

    return Bars(console=console, transient=True)


def printing(
    key: Callable[[str], str], pause: float, *, clock: Callable[[], float] = time.monotonic
) -> Progress:
    """A callback that prints lines: of each piece of work the first, the last, and some between.

    Args:
        key: What is the same for all reports of one piece of work; where less is done than before,
            another one has begun.
        pause: Seconds from one line to the next between the first and the last.
        clock: Seconds since any moment.
    """
    work, last, told = "", 0, -math.inf

    def progress(what: str, done: int, total: int) -> None:
        nonlocal work, last, told
        if key(what) != work or done < last:
            work, last, told = key(what), 0, -math.inf
        if done > last and (done == total or clock() - told >= pause):
            click.echo(f"{what}: {done:,} of {total:,}", err=True)
            told = clock()
        work, last = ("", 0) if done == total else (work, done)

    return progress
