"""How a command ends that made one checkpoint: it is written, and what was done is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from weightsurgery.checkpoint import Checkpoint
from weightsurgery.cli import options
from weightsurgery.formats import save
from weightsurgery.report.tables import Table, show


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
    if as_json:
        options.print_json({"out": out, **record})
    else:
        show(tables(out, record))
