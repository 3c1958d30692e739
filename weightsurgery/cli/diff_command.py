"""`wsurg diff`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from weightsurgery.cli import name_options, options
from weightsurgery.comparison import DiffReport, diff, drift
from weightsurgery.errors import SurgeryError, shown
from weightsurgery.formats import save
from weightsurgery.formats.plan import make_plan
from weightsurgery.gates import COUNTS, gate_results, parse_gate, refuse_failed
from weightsurgery.report.comparison import comparison_csv, comparison_tables
from weightsurgery.report.tables import show
from weightsurgery.statistics import METRICS

_LISTED = 20  # tensors shown unless --all or --top is given


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
    hashes: bool,
    **names: Any,
) -> None:
    _check_usage(click.get_current_context())
    gates = [parse_gate(text) for text in fail_if]
    pair = options.open_pair(base, tuned, **names)
    with options.running(workers, max_memory=max_memory, inputs=pair) as engine:
        delta = None if drift_out is None else drift(*pair, allow_nonfinite=allow_nonfinite)
        if delta is not None and drift_out is not None:
            make_plan(delta, drift_out, overwrite=overwrite, engine=engine)  # refuses before work
        report = diff(*pair, top=top, engine=engine)
        failure: SurgeryError | None = None
        if delta is not None and drift_out is not None:
            try:
                save(delta, drift_out, overwrite=overwrite, hashes=hashes, engine=engine)
            except SurgeryError as error:
                failure = error  # raised when the report, which is whole, has been shown
    if delta is not None and failure is None:
        click.echo(f"the drift is in {shown(drift_out)}, its record beside it", err=True)
    options.warn(report.warnings)
    results: list[dict[str, Any]] = []
    try:
        results = gate_results(report, gates)
        report = replace(report, gates=results)
    finally:  # a condition that cannot be judged should not cost the report
        try:
            _show(report, limit=_limit(top, show_all), as_csv=as_csv, as_json=as_json)
        finally:  # the verdict counts even if nobody reads the report
            if failure is not None:
                raise failure
            refuse_failed(results)


def _check_usage(context: click.Context) -> None:
    given = context.params
    if given["as_csv"] and given["as_json"]:
        raise click.UsageError("--csv and --json exclude each other", context)
    if given["drift_out"] is not None:
        return
    for name in ("overwrite", "allow_nonfinite", "hashes"):
        # In wsurg.toml they may be meant for other commands.
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            flag = "--hash/--no-hash" if name == "hashes" else "--" + name.replace("_", "-")
            raise click.UsageError(f"{flag} is for --drift's OUT; give --drift too", context)


def _limit(top: int, show_all: bool) -> int:
    """How many tensors are listed; 0 lists all. A --top of 0 spares other tables, not this one."""
    if show_all:
        return 0
    source = click.get_current_context().get_parameter_source("top")
    return top if top and source is not click.core.ParameterSource.DEFAULT else _LISTED


def _show(report: DiffReport, *, limit: int, as_csv: bool, as_json: bool) -> None:
    if as_json:
        options.print_json(report.to_json())
    elif as_csv:
        click.echo(comparison_csv(report), nl=False)
    else:
        show(comparison_tables(report, limit=limit))


command = options.Command(
    "diff",
    callback=_diff,
    help=f"""Show what moved between BASE and TUNED.

    One pass over both inputs gives, for each tensor, layer, kind of module and the whole model:
    share of changed dimensions, L2 and relative L2 of the drift δ = TUNED - BASE, max |δ|, mean,
    standard deviation, cosine, sign flips, quantiles of |δ|, NaN and infinity counts; and lists
    the dimensions, rows (neurons), columns and word-embedding rows that moved most.

    --fail-if takes '[GLOB:] METRIC OPERATOR NUMBER' and makes the exit code 10 when it is true of
    the model (or of a tensor that matches GLOB). Metrics: {", ".join((*METRICS, *COUNTS))}.

    \b
    Examples:
      wsurg diff base.safetensors tuned.safetensors
      wsurg diff base/ tuned/ --top 20 --json > report.json
      wsurg diff base/ tuned/ --drift drift.safetensors
      wsurg diff base/ tuned/ --fail-if 'relative_l2 > 0.1' \\
          --fail-if '*.bias: max_abs > 1' \\
          --fail-if 'unpaired > 0'
    """,
    params=[
        click.Argument(["base"], metavar="BASE", type=click.Path()),
        click.Argument(["tuned"], metavar="TUNED", type=click.Path()),
        click.Option(
            ["--top"],
            type=click.IntRange(0),
            default=10,
            show_default=True,
            help="How many dimensions, rows, columns and tokens of largest drift to list; so many "
            f"tensors too, if it is given and not 0, and else {_LISTED}.",
        ),
        click.Option(
            ["--all", "show_all"],
            is_flag=True,
            help="List all tensors, not only those that moved most.",
        ),
        click.Option(
            ["--drift", "drift_out"],
            type=click.Path(),
            metavar="OUT",
            help="Also write the drift as a .safetensors file (a second pass).",
        ),
        click.Option(["--overwrite"], is_flag=True, help="Replace --drift's OUT if it exists."),
        click.Option(
            ["--allow-nonfinite"], is_flag=True, help="Let NaN and infinity into --drift's OUT."
        ),
        options.HASH,
        click.Option(
            ["--fail-if"],
            multiple=True,
            metavar="CONDITION",
            help="Exit with code 10 if this is true; repeatable.",
        ),
        click.Option(["--csv", "as_csv"], is_flag=True, help="Print one CSV line for each tensor."),
        options.JSON,
        options.WEIGHTS,
        *name_options.NAMES,
        options.WORKERS,
        options.MEMORY,
    ],
)
