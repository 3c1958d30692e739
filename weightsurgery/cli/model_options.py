"""Options of the commands that load a model into torch, and their progress bar."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import click

from weightsurgery.checkpoint import Checkpoint
from weightsurgery.cli.progress import Lines, drawing
from weightsurgery.stream import Progress
from weightsurgery.training.settings import SCHEDULERS, Hyperparameters

if TYPE_CHECKING:
    from weightsurgery.datasets.batches import Encoded
    from weightsurgery.models import Model

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
POINTS = click.Option(
    ["--points"],
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="For the Fisher of --data: average over so many points between BASE and TUNED.",
)
EPOCHS = click.Option(
    ["--epochs"],
    type=click.IntRange(1),
    default=Hyperparameters.epochs,
    show_default=True,
    help="Of fine-tuning: passes over the examples.",
)
LEARNING_RATE = click.Option(
    ["--learning-rate"],
    type=float,
    default=Hyperparameters.learning_rate,
    show_default=True,
    help="Of fine-tuning's first step.",
)
# Of every training, but its seed, which is of more in some: a type, and what the help says.
SCHEDULE: Mapping[str, tuple[Any, str]] = {
    "epochs": (click.IntRange(1), "Passes over the examples."),
    "learning_rate": (float, "Of the first step after the warm-up."),
    "batch_size": (click.IntRange(1), "Examples in a batch."),
    "accumulation": (click.IntRange(1), "Batches in a step."),
    "scheduler": (click.Choice(SCHEDULERS), "How the learning rate goes on: to 0, or constant."),
    "warmup": (float, "Share of the steps in which the learning rate rises from 0."),
    "weight_decay": (float, "AdamW's, not on biases and norms."),
    "max_grad_norm": (float, "Scale longer gradients to this norm; 0 leaves them."),
    "label_smoothing": (float, "Share of the label that is spread over all labels."),
}


def batch_size(default: int | None, shown: str | bool = True) -> click.Option:
    """`--batch-size` with the command's own default, and what the help says of it."""
    return click.Option(
        ["--batch-size"],
        type=click.IntRange(1),
        default=default,
        show_default=shown,
        help="Examples at a time.",
    )


def prepare(tuned: Checkpoint, given: Mapping[str, Any]) -> tuple[Model, list[Encoded]]:
    """TUNED as a model, and the examples of --data; loaded once in a run.

    Args:
        tuned: What --tuned and --weights opened.
        given: The command's parameters.
    """
    from weightsurgery.datasets.batches import read_examples
    from weightsurgery.models import load_model

    loaded = click.get_current_context().meta
    if __name__ not in loaded:
        model = load_model(tuned, device=given["device"])
        examples = read_examples(model, given["data"], max_length=given["max_length"])
        loaded[__name__] = model, examples
    model, examples = loaded[__name__]
    return model, examples


def counting(lines: Lines = "some") -> AbstractContextManager[Progress | None]:
    """A callback (what, done, total) that counts examples.

    Args:
        lines: What is printed where stderr is no terminal.
    """
    # What follows a comma changes: a loss.
    return drawing("MofNCompleteColumn", key=lambda what: what.partition(",")[0], lines=lines)
