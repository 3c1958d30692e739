"""What `wsurg fisher` says after it wrote its estimate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightsurgery.errors import shown
from weightsurgery.report.tables import Table, number, share

_PATHS = {
    "hooks": "in batches",
    "split": "in batches, their modules one example at a time",
    "loop": "one example at a time",
    "hutchinson": "by products with random vectors",
}
_LISTED = 20


def curvature_tables(out: str, summary: Mapping[str, Any]) -> list[Table]:
    """A summary as tables.

    Args:
        out: Where the estimate was written.
        summary: From `summarise`.
    """
    settings, largest = summary["settings"], summary["largest"]
    how = [
        f"{name.replace('_', '-')} {settings[name]}"
        for name in ("labels", "points", "samples", "negative", "seed")
        if name in settings
    ]
    counts = [f"{len(found)} {_PATHS[path]}" for path, found in summary["paths"].items()]
    rows = [
        ["output", shown(out)],
        ["examples", f"{number(settings['examples'])} ({', '.join(how)})"],
        ["tensors", ", ".join(counts)],
        ["mean", number(summary["mean"])],
        ["largest", _largest(largest)],
        ["exactly zero", share(summary["zeros"] / max(1, summary["dimensions"]))],
    ]
    if summary["negative"]:
        rows.append(["negative", share(summary["negative"] / summary["dimensions"])])
    slow = [[shown(name)] for name in summary["paths"].get("loop", ())]
    more = f"and {len(slow) - _LISTED} more; --json lists all" if len(slow) > _LISTED else ""
    return [
        Table("Tensors that were computed one example at a time", ("",), slow[:_LISTED], more),
        Table(f"wsurg fisher ({summary['estimator']})", ("", ""), rows),
    ]


def _largest(largest: Mapping[str, Any]) -> str:
    if not largest["tensor"]:
        return "-"
    return f"{number(largest['value'])} in {shown(largest['tensor'])}[{largest['index']}]"
