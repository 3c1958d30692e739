"""`wsurg diff`."""

from __future__ import annotations

import shutil
import sys
from typing import Any

import click

from weightsurgery.cli import options
from weightsurgery.comparison import diff, drift
from weightsurgery.formats import save
from weightsurgery.gates import check_gates, parse_gate
from weightsurgery.report.comparison import comparison_csv, comparison_tables
from weightsurgery.report.tables import show
from weightsurgery.statistics import METRICS

_LISTED = 20  # tensors shown unless --all is given


def _diff(
    base: str,
    tuned: str,
    top: int,
    show_all: bool,
    drift_out: str | None,
    overwrite: bool,
    allow_nonfinite: bool,
    fail_if: tuple[str, ...],
    as_csv: bool,
    as_json: bool,
    workers: int,
    max_memory: int | None,
    **names: Any,
) -> None:
    if as_csv and as_json:
        raise click.UsageError("--csv and --json exclude each other", click.get_current_context())
    gates = [parse_gate(text) for text in fail_if]
    pair = options.open_pair(base, tuned, **names)
    with options.running(workers, max_memory=max_memory, inputs=pair) as engine:
        report = diff(*pair, top=top, engine=engine)
        if drift_out is not None:
            delta = drift(*pair, allow_nonfinite=allow_nonfinite)
            save(delta, drift_out, overwrite=overwrite, engine=engine)
    options.warn(report.warnings)
    try:
        if as_json:
            options.print_json(report.to_json())
        elif as_csv:
            click.echo(comparison_csv(report), nl=False)
        else:
            width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
            show(comparison_tables(report, limit=0 if show_all else _LISTED, width=width))
    finally:
        check_gates(report, gates)  # the verdict counts even if nobody reads the report


command = click.Command(
    "diff",
    callback=_diff,
    help=f"""Show what moved between BASE and TUNED.

    One pass over both inputs gives, for each tensor, layer, kind of module and the whole model:
    share of changed dimensions, L2 and relative L2 of the drift δ = TUNED - BASE, max |δ|, mean,
    standard deviation, cosine, sign flips, quantiles of |δ|, NaN and infinity counts; and lists
    the dimensions, rows (neurons), columns and word-embedding rows that moved most.

    --fail-if takes '[GLOB:] METRIC OPERATOR NUMBER' and makes the exit code 10 when it is true of
    the model (or of a tensor that matches GLOB). Metrics: {", ".join(METRICS)}.

    \b
    Examples:
      wsurg diff base.safetensors tuned.safetensors
      wsurg diff base/ tuned/ --top 20 --json > report.json
      wsurg diff base/ tuned/ --drift drift.safetensors
      wsurg diff base/ tuned/ --fail-if 'relative_l2 > 0.1' --fail-if '*.bias: max_abs > 1'
    """,
    params=[
        click.Argument(["base"], metavar="BASE"),
        click.Argument(["tuned"], metavar="TUNED"),
        click.Option(
            ["--top"],
            type=click.IntRange(0),
            default=10,
            show_default=True,
            help="How many dimensions, rows, columns and tokens of largest drift to list.",
        ),
        click.Option(
            ["--all", "show_all"],
            is_flag=True,
            help=f"List all tensors, not the {_LISTED} that moved most.",
        ),
        click.Option(
            ["--drift", "drift_out"],
            metavar="OUT",
            help="Also write the drift as a .safetensors file (a second pass).",
        ),
        click.Option(["--overwrite"], is_flag=True, help="Replace --drift's OUT if it exists."),
        click.Option(
            ["--allow-nonfinite"], is_flag=True, help="Let NaN and infinity into --drift's OUT."
        ),
        click.Option(
            ["--fail-if"],
            multiple=True,
            metavar="CONDITION",
            help="Exit with code 10 if this is true; repeatable.",
        ),
        click.Option(["--csv", "as_csv"], is_flag=True, help="Print one CSV line for each tensor."),
        options.JSON,
        options.WEIGHTS,
        *options.NAMES,
        options.WORKERS,
        options.MEMORY,
    ],
)
