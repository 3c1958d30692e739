"""Options of the commands that load a model into torch, and their progress bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

MODEL = click.Argument(["model"], metavar="MODEL")
DEVICE = click.Option(
    ["--device"],
    default="auto",
    show_default=True,
    help="Where to compute: cpu, cuda, cuda:1, mps; auto takes an accelerator if there is one.",
)
MAX_LENGTH = click.Option(
    ["--max-length"],
    type=click.IntRange(2),
    default=128,
    show_default=True,
    help="Tokens after which a text is cut.",
)


def batch_size(default: int) -> click.Option:
    """`--batch-size` with the command's own default."""
    return click.Option(
        ["--batch-size"],
        type=click.IntRange(1),
        default=default,
        show_default=True,
        help="Examples at a time.",
    )


@contextmanager
def counting() -> Iterator[Callable[[str, int, int], None] | None]:
    """A callback (what, done, total) that draws on stderr; None if that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            kind = what.partition(",")[0]  # what follows a comma changes: a loss
            if kind not in tasks:
                tasks[kind] = bar.add_task(what, total=total)
            bar.update(tasks[kind], description=what, completed=done, total=total)

        yield progress
