"""`wsurg verify`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from weightsurgery.cli import options
from weightsurgery.formats import open_checkpoint
from weightsurgery.proof.verification import check_verification, verify
from weightsurgery.report.verification import LISTED, verification_tables

_MORE = "--all shows them"


def _verify(
    out: str,
    base: str | None,
    tuned: str | None,
    mask: str | None,
    weights: str | None,
    show_all: bool,
    workers: int,
    as_json: bool,
) -> None:
    context = click.get_current_context()
    if (base is None) != (tuned is None):
        raise click.UsageError("--base and --tuned go together", context)
    if base is None or tuned is None:
        options.refuse_typed(context, ["mask", "weights", "key"], "needs --base and --tuned")
        pair = {}
    else:
        pair = dict(zip(("base", "tuned"), options.open_all([base, tuned], weights), strict=True))
    if mask is not None:
        pair["mask"] = open_checkpoint(mask)
    with options.running(workers, inputs=list(pair.values())) as engine:
        report = verify(out, **pair, engine=engine)
    selection = report["selection"]
    if selection is not None and report["proved"] and not selection["known_by"]:
        options.warn([f"which dimensions were to be reset is not proved: {_why(selection)}"])
    options.present(
        report,
        lambda: verification_tables(report, limit=0 if show_all else LISTED, more=_MORE),
        as_json=as_json,
    )
    check_verification(report)


def _why(selection: Mapping[str, Any]) -> str:
    return f"{selection['not_by_recipe']}; --mask proves it, or `wsurg replay`"


command = options.Command(
    "verify",
    callback=_verify,
    help="""Check an output against its record.

    Every file and tensor of OUT is hashed again and read strictly; what is extra, missing or
    altered is named. Of what mix, purify and epur made, --base and --tuned prove more: each
    dimension has the bits of one of the two, and those are reset that the recorded steps, done
    again, reset; where these took more than BASE and TUNED, --mask proves which. The exit code is
    0 if all is as recorded and 10 if not.

    \b
    Examples:
      wsurg verify purified/
      wsurg verify mixed.safetensors --json
      wsurg verify purified/ --base base/ --tuned tuned/
    """,
    params=[
        click.Argument(["out"], metavar="OUT", type=click.Path()),
        click.Option(["--base"], metavar="PATH", help="Prove that what was reset is BASE's."),
        click.Option(["--tuned"], metavar="PATH", help="Prove that what was kept is TUNED's."),
        click.Option(["--mask"], metavar="PATH", help="Prove that this mask tells which is which."),
        options.WEIGHTS,
        click.Option(["--all", "show_all"], is_flag=True, help="Show every problem."),
        options.WORKERS,
        options.JSON,
    ],
)
# What BASE and TUNED are to other commands asks this one for a proof, which not every output has.
command.own = ("base", "tuned", "mask")
