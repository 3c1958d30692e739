"""`wsurg inspect`."""

from __future__ import annotations

import click

from weightsurgery.cli import options
from weightsurgery.inspection import inspect
from weightsurgery.report.description import description_tables


def _inspect(
    path: str,
    weights: str | None,
    values: bool,
    workers: int,
    max_memory: int | None,
    as_json: bool,
) -> None:
    checkpoint = options.open_all([path], weights)[0]
    with options.running(workers, max_memory=max_memory, inputs=[checkpoint]) as engine:
        description = inspect(checkpoint, values=values, engine=engine)
    options.warn(description["warnings"])
    options.present(description, lambda: description_tables(description), as_json=as_json)


command = options.Command(
    "inspect",
    callback=_inspect,
    help="""Show what a checkpoint holds.

    Lists tensors with shape, dtype, parameters and bytes, sums by module and kind, metadata and
    side files. Only headers are read, unless --values asks for the weights.

    \b
    Examples:
      wsurg inspect model.safetensors
      wsurg inspect model/ --values
      wsurg inspect model/ --json | jq .parameters
    """,
    params=[
        click.Argument(["path"], metavar="PATH", type=click.Path()),
        options.WEIGHTS,
        click.Option(
            ["--values"], is_flag=True, help="Read the weights: L2 norm, NaN and infinity counts."
        ),
        options.WORKERS,
        options.MEMORY,
        options.JSON,
    ],
)
