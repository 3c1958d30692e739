"""Options of the commands that load a model into torch, and their progress bar."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import click

from weightsurgery.checkpoint import Checkpoint
from weightsurgery.cli import options
from weightsurgery.cli.progress import Lines, drawing
from weightsurgery.datasets.labels import LABEL_KINDS
from weightsurgery.stream import Progress
from weightsurgery.tasks import CLASSIFICATION
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
TEXT_COLUMN = click.Option(
    ["--text-column"],
    multiple=True,
    metavar="NAME",
    help="Column of the text, if it has no usual name; give two for pairs. For a causal model, the "
    "field of the question.",
)
LABEL_COLUMN = click.Option(
    ["--label-column"],
    default="",
    metavar="NAME",
    help="Column of the label, if it has no usual name. For a causal model, the field of the "
    "answer.",
)
LABEL_KIND = click.Option(
    ["--label-kind"],
    type=click.Choice(LABEL_KINDS),
    default="auto",
    show_default=True,
    help="Kind of the labels in the data: label ids or label names, where names are numbers too.",
)
TEMPLATE_ARGS = click.Option(
    ["--chat-template-arg", "template_args"],
    multiple=True,
    metavar="NAME=VALUE",
    help="Variable of the chat template, such as enable_thinking=false; repeatable.",
)
READING = (TEXT_COLUMN, LABEL_COLUMN, LABEL_KIND, TEMPLATE_ARGS)
"""Options of every command that reads clean examples."""
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

    loaded = click.get_current_context().meta
    if __name__ not in loaded:
        model = load(tuned, given)
        told = reading(model.task, given)
        examples = read_examples(model, given["data"], max_length=given["max_length"], **told)
        loaded[__name__] = model, examples
    model, examples = loaded[__name__]
    return model, examples


def load(checkpoint: Checkpoint, given: Mapping[str, Any]) -> Model:
    """A model on the command's device, with the variables of --chat-template-arg.

    Args:
        checkpoint: What was opened.
        given: The command's parameters.
    """
    from weightsurgery.datasets.prompts import with_template_args
    from weightsurgery.models import load_model

    variables = template_args(given)
    model = load_model(checkpoint, device=given["device"])
    return with_template_args(model, variables) if variables else model


def template_args(given: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of --chat-template-arg: true, false, null, numbers, or else texts.

    Args:
        given: The command's parameters.
    """
    known = {"True": True, "False": False, "None": None}  # as Python and Jinja spell them
    found = {}
    for pair in given.get("template_args", ()):
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise click.UsageError(
                f"--chat-template-arg '{pair}'; expected NAME=VALUE, such as enable_thinking=false",
                click.get_current_context(),
            )
        try:
            found[name] = known[text] if text in known else json.loads(text)
        except (ValueError, RecursionError):
            found[name] = text
    return found


def reading(task: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """How to read the data, as `read_examples` takes it.

    Args:
        task: The model's.
        given: The command's parameters.
    """
    if task != CLASSIFICATION:
        context = click.get_current_context()
        options.refuse_typed(context, ["label_kind"], "is for classifiers")
    names = ("text_column", "label_column", "label_kind")
    return {**{name: given[name] for name in names}, "note": options.note}


def counting(lines: Lines = "some") -> AbstractContextManager[Progress | None]:
    """A callback (what, done, total) that counts examples.

    Args:
        lines: What is printed where stderr is no terminal.
    """
    # What follows a comma changes: a loss.
    return drawing("MofNCompleteColumn", key=lambda what: what.partition(",")[0], lines=lines)
