"""`wsurg finetune`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import click

from weightsurgery.cli import model_options, options
from weightsurgery.cli.writing import show_plan, write
from weightsurgery.datasets.batches import Encoded, read_examples
from weightsurgery.formats.plan import make_plan
from weightsurgery.models import Model
from weightsurgery.report.training import planned_tables, training_tables
from weightsurgery.stream import Engine
from weightsurgery.training.finetune import finetune, split, warnings_of
from weightsurgery.training.result import trained_names
from weightsurgery.training.settings import CLASS_WEIGHTS, Hyperparameters

_DEFAULTS = {n: p.default for n, p in inspect.signature(finetune).parameters.items()}
_WRITING = ("out", "overwrite", "dry_run", "max_shard_size", "hashes")


def _finetune(
    model: str,
    data: str,
    held_out: float | str | None,
    out: str,
    overwrite: bool,
    dry_run: bool,
    max_shard_size: int | None,
    hashes: bool,
    max_length: int,
    weights: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    settings = {name: given[name] for name in given if name in _DEFAULTS}
    if settings["patience"] is not None and held_out is None:
        raise click.UsageError("--patience needs --held-out", click.get_current_context())
    Hyperparameters(**settings)  # refuses before any work, as do the next two lines
    sizes: dict[str, Any] = {"overwrite": overwrite, "max_shard_size": max_shard_size}
    read = options.open_all([model], weights)[0]
    make_plan(read, out, engine=Engine(), **sizes)
    opened = model_options.load(read, given)
    reading = {"max_length": max_length, **model_options.reading(opened.task, given)}
    examples = read_examples(opened, data, **reading)
    aside, files = _held_out(opened, held_out, reading)
    if dry_run:
        _show_plan(opened, examples, aside, Hyperparameters(**settings), out, sizes, as_json)
        return
    with model_options.counting() as progress:
        result = finetune(
            opened,
            examples,
            held_out=aside,
            files=[data, *files],
            progress=progress,
            **settings,
        )
    write(result, out, training_tables, as_json=as_json, hashes=hashes, **sizes)


def _held_out(
    model: Model, given: float | str | None, reading: Mapping[str, Any]
) -> tuple[list[Encoded] | float | None, list[str]]:
    """What to hold out, and the file it is from, if it is from one."""
    if given is None or isinstance(given, float):
        return given, []
    return read_examples(model, given, **reading), [given]


def _show_plan(
    model: Model,
    examples: list[Encoded],
    held_out: list[Encoded] | float | None,
    chosen: Hyperparameters,
    out: str,
    sizes: dict[str, Any],
    as_json: bool,
) -> None:
    parts = split(model, examples, held_out, chosen)
    options.warn(warnings_of(model, parts, chosen.batch_size))
    counts = {part: len(given) for part, given in parts.items()}
    steps = chosen.steps(counts["train"])
    trained = set(trained_names(model, chosen.freeze))
    views = {
        name: replace(view, status="edited") if name in trained else view
        for name, view in model.checkpoint.items()
    }
    show_plan(
        replace(model.checkpoint, tensors=views),
        out,
        {"training": {"examples": counts, "steps": steps}},
        planned_tables(counts, steps),
        as_json=as_json,
        **sizes,
    )


def _number(name: str, kind: Any, text: str) -> click.Option:
    """An option for a hyper-parameter, with the function's default."""
    default = _DEFAULTS[name]
    return click.Option(
        ["--" + name.replace("_", "-")],
        type=kind,
        default=default,
        show_default=default is not None,
        help=text,
    )


_SCHEDULE = {
    **model_options.SCHEDULE,
    "epochs": (click.IntRange(1), "Passes over the examples, at most."),
}
_HYPERPARAMETERS = [
    *(_number(name, *kind) for name, kind in _SCHEDULE.items()),
    _number(
        "patience",
        click.IntRange(1),
        "Stop after so many epochs without a smaller held-out loss, and take the weights of the "
        "best; without it, all epochs are run and the last weights taken.",
    ),
    _number(
        "class_weights",
        click.Choice(CLASS_WEIGHTS),
        "Weights of the classes in the loss: balanced makes rare classes count as much as others.",
    ),
    click.Option(
        ["--freeze"],
        multiple=True,
        metavar="GLOB",
        help="Do not train tensors whose name matches; repeatable.",
    ),
    _number("seed", click.IntRange(0), "Of the examples' order, dropout, and what is held out."),
]

command = options.Command(
    "finetune",
    callback=_finetune,
    help="""Train a model on a few clean examples.

    The second step of Fine-mixing and Fine-purifying: AdamW, by transformers' Trainer, with
    defaults for tens of examples. The output has MODEL's files, names, dtypes and shards. On one
    machine's processor the same seed gives the same bytes.

    Data for a classifier are TSV, CSV, JSON, JSONL or Parquet with a column of texts (sentence,
    text, or sentence1 and sentence2) and one of labels (label); for a causal language model JSON,
    JSONL or Parquet with question and answer, instruction and output, messages or conversations.
    A Hugging Face dataset's directory will do too.

    \b
    Examples:
      wsurg finetune mixed/ --data clean.tsv -o purified/
      wsurg finetune mixed/ --data clean.tsv --held-out 0.25 --patience 3 \\
          -o purified/
    """,
    params=[
        model_options.MODEL,
        click.Option(["--data"], required=True, metavar="FILE", help="Clean examples."),
        click.Option(
            ["--held-out"],
            type=options.ShareOrFile(),
            metavar="FILE|SHARE",
            help="Other clean examples, or the share of --data to hold out: their loss is "
            "measured after each epoch.",
        ),
        *model_options.READING,
        *_HYPERPARAMETERS,
        model_options.MAX_LENGTH,
        options.WEIGHTS,
        model_options.DEVICE,
        *(option for option in options.WRITING if option.name in _WRITING),
        options.JSON,
    ],
)
