"""How a command ends that made one checkpoint: written and told, or its plan shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from weightsurgery.checkpoint import Checkpoint
from weightsurgery.cli import options
from weightsurgery.formats import save
from weightsurgery.formats.plan import make_plan
from weightsurgery.report.outcome import plan_tables
from weightsurgery.report.tables import Table
from weightsurgery.stream import Engine


def write(
    made: Checkpoint,
    out: str,
    tables: Callable[[str, Mapping[str, Any]], list[Table]],
    *,
    as_json: bool,
    **settings: Any,
) -> None:
    """Save a checkpoint, and show its record.

    Args:
        made: The checkpoint.
        out: Where to write.
        tables: Makes them from `out` and the record.
        as_json: Print the record itself.
        settings: Of `save`.
    """
    with options.running(0, inputs=[made]) as engine:
        record = save(made, out, engine=engine, **settings)
    options.present({"out": out, **record}, lambda: tables(out, record), as_json=as_json)


def show_plan(
    planned: Checkpoint,
    out: str,
    told: Mapping[str, Any],
    tables: list[Table],
    *,
    as_json: bool,
    **settings: Any,
) -> None:
    """Show what `write` would write, and what would be done before.

    Args:
        planned: A checkpoint of the same tensors.
        out: Where it would be written.
        told: Further keys of the JSON.
        tables: The same for people.
        as_json: Print JSON.
        settings: Of `make_plan`.
    """
    options.warn(list(planned.warnings))
    plan = make_plan(planned, out, engine=Engine(), **settings).to_json()
    options.present({**plan, **told}, lambda: [*plan_tables(plan, None), *tables], as_json=as_json)
