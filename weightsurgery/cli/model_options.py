"""Options of the commands that load a model into torch, and their progress bar."""

from __future__ import annotations

from contextlib import AbstractContextManager

import click

from weightsurgery.cli import options
from weightsurgery.stream import Progress

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


def batch_size(default: int | None, shown: str | bool = True) -> click.Option:
    """`--batch-size` with the command's own default, and what the help says of it."""
    return click.Option(
        ["--batch-size"],
        type=click.IntRange(1),
        default=default,
        show_default=shown,
        help="Examples at a time.",
    )


def counting() -> AbstractContextManager[Progress | None]:
    """A callback (what, done, total) that counts examples; None if stderr is no terminal."""
    # What follows a comma changes: a loss.
    return options.drawing("MofNCompleteColumn", key=lambda what: what.partition(",")[0])
