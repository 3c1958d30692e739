"""What `wsurg apply-adapter` does besides the operator: it proves what was written."""

from __future__ import annotations

from typing import Any

import click

from weightsurgery.adapters.proof import verify_adapter
from weightsurgery.cli import options
from weightsurgery.cli.companion import Companion, Given, Inputs
from weightsurgery.formats import open_checkpoint

_PROVE = click.Option(
    ["--prove/--no-prove", "proving"],
    default=True,
    show_default=True,
    help="Read the result again and compare it with BASE and the adapters.",
)


def _prove(inputs: Inputs, given: Given) -> dict[str, Any] | None:
    """Read what was written, and compare it with what BASE and the adapters give."""
    if not given["proving"]:
        return None
    base, *adapters = inputs
    merged = open_checkpoint(given["out"])
    read = (*inputs, merged)
    settings = {name: given[name] for name in ("weight", "allow_nonfinite")}
    with options.running(given["workers"], max_memory=given["max_memory"], inputs=read) as engine:
        return verify_adapter(base, adapters, merged, **settings, engine=engine)


COMPANION = Companion(parameters=(_PROVE,), prove=_prove)
