"""`wsurg verify-adapter`."""

from __future__ import annotations

from typing import Any

import click

from weightsurgery.adapters.proof import check_proof, verify_adapter
from weightsurgery.cli import name_options, options
from weightsurgery.report.proof import LISTED, proof_tables


def _verify(
    base: str,
    adapters: tuple[str, ...],
    merged: str,
    weights: str | None,
    workers: int,
    name_map: tuple[str, ...],
    show_all: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    settings["name_map"] = name_options.read_map(name_map)
    read = options.open_all((base, *adapters, merged), weights)
    with options.running(workers, inputs=read) as engine:
        report = verify_adapter(read[0], read[1:-1], read[-1], **settings, engine=engine)
    options.present(
        report,
        lambda: proof_tables(report, limit=0 if show_all else LISTED, more="--all shows them"),
        as_json=as_json,
    )
    check_proof(report)


command = options.Command(
    "verify-adapter",
    callback=_verify,
    help="""Check that MERGED is BASE with its adapters folded in.

    Whoever merged is not trusted: every element is computed again and compared, within what
    rounding explains; what no adapter touches must have BASE's bytes. The exit code is 0 if the
    merge is proved and 10 if it is not; the table says which tensors are unchanged, wrong in scale
    or sign, or something else.

    \b
    Examples:
      wsurg verify-adapter base/ adapter/ merged/
      wsurg verify-adapter base/ adapter/ merged/ --all
      wsurg verify-adapter base/ adapter/ merged/ --json
    """,
    params=[
        click.Argument(["base"], metavar="BASE", type=click.Path()),
        click.Argument(
            ["adapters"], metavar="ADAPTER...", type=click.Path(), nargs=-1, required=True
        ),
        click.Argument(["merged"], metavar="MERGED", type=click.Path()),
        click.Option(
            ["--weight"],
            type=float,
            multiple=True,
            metavar="NUMBER",
            help="What an adapter's change was multiplied by; one for each.",
        ),
        *name_options.ADAPTER_NAMES,
        options.WEIGHTS,
        click.Option(
            ["--allow-nonfinite"],
            is_flag=True,
            help="Take NaN and infinity for right where BASE and the adapters give them.",
        ),
        options.WORKERS,
        click.Option(["--all", "show_all"], is_flag=True, help="Show every tensor that is wrong."),
        options.JSON,
    ],
)
