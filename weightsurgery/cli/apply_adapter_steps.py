"""What `wsurg apply-adapter` does besides the operator: it proves what was written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from weightsurgery.adapters.proof import verify_adapter
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.cli import options
from weightsurgery.formats import open_checkpoint

PARAMETERS: tuple[click.Parameter, ...] = (
    click.Option(
        ["--prove/--no-prove", "proving"],
        default=True,
        show_default=True,
        help="Read the result again and compare it with BASE and the adapters.",
    ),
)


def check(_context: click.Context) -> dict[str, Any]:
    """Nothing to refuse or settle."""
    return {}


def also_used(_given: Mapping[str, Any]) -> tuple[str, ...]:
    """No setting of the operator serves anything else."""
    return ()


def before(
    _inputs: Sequence[Checkpoint], _settings: Mapping[str, Any], _given: Mapping[str, Any]
) -> dict[str, Checkpoint]:
    """Nothing is made before."""
    return {}


def after(
    _inputs: Sequence[Checkpoint], result: Checkpoint, _given: Mapping[str, Any]
) -> Checkpoint:
    """The result as it is."""
    return result


def prove(inputs: Sequence[Checkpoint], given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read what was written, and compare it with what BASE and the adapters give.

    Args:
        inputs: BASE and the adapters.
        given: The command's parameters.
    """
    if not given["proving"]:
        return None
    base, *adapters = inputs
    merged = open_checkpoint(given["out"])
    read = (*inputs, merged)
    with options.running(given["workers"], max_memory=given["max_memory"], inputs=read) as engine:
        return verify_adapter(base, adapters, merged, weight=given["weight"], engine=engine)
