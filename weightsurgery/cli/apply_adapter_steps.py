"""What `wsurg apply-adapter` does besides the operator: it proves what was written."""

from __future__ import annotations

from typing import Any

import click

from weightsurgery.adapters.proof import check_proof, verify_adapter
from weightsurgery.cli import name_options, options
from weightsurgery.cli.companion import Companion, Given, Inputs
from weightsurgery.formats import open_checkpoint
from weightsurgery.report.outcome import outcome_tables
from weightsurgery.report.proof import LISTED, proof_tables
from weightsurgery.report.tables import Table

_PROVE = click.Option(
    ["--prove/--no-prove", "proving"],
    default=True,
    show_default=True,
    help="Read the result again and compare it with BASE and the adapters.",
)


def _prove(inputs: Inputs, given: Given) -> dict[str, Any]:
    """Read what was written, and compare it with what BASE and the adapters give."""
    if not given["proving"]:
        return {}
    base, *adapters = inputs
    merged = open_checkpoint(given["out"])
    read = (*inputs, merged)
    settings = {name: given[name] for name in ("weight", "strip_prefix", "allow_nonfinite")}
    settings["name_map"] = name_options.read_map(given["name_map"])
    with options.running(given["workers"], max_memory=given["max_memory"], inputs=read) as engine:
        proof = verify_adapter(base, adapters, merged, **settings, engine=engine)
    return {"proof": proof}


def _tables(out: str, told: Given) -> list[Table]:
    """What was written, and the proof if there is one."""
    tables = outcome_tables(out, told)
    if "proof" not in told:
        return tables
    more = "`wsurg verify-adapter --all` shows them"
    return [*tables, *proof_tables(told["proof"], limit=LISTED, more=more)]


def _judge(told: Given) -> None:
    """Refuse a merge that is not proved.

    Raises:
        GateError: It is not.
    """
    if "proof" in told:
        check_proof(told["proof"])


COMPANION = Companion(parameters=(_PROVE,), found=_prove, tables=_tables, judge=_judge)
