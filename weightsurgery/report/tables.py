"""Tables: drawn by rich on a terminal, aligned plain text everywhere else."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from weightsurgery.errors import shown


@dataclass(frozen=True)
class Table:
    """Rows of text under headings.

    Attributes:
        title: Shown above.
        columns: Headings; one that begins with ">" is aligned to the right.
        rows: Cells, already formatted.
        note: Shown below, "" for nothing.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    note: str = ""


def show(tables: Sequence[Table]) -> None:
    """Print tables to stdout; those without rows are left out."""
    present = [table for table in tables if table.rows]
    if sys.stdout.isatty():
        _show_rich(present)
    else:
        print("\n\n".join(_plain(table) for table in present))


def _plain(table: Table) -> str:
    heads = [column.removeprefix(">") for column in table.columns]
    widths = [max(map(len, cells)) for cells in zip(heads, *table.rows, strict=True)]
    right = [column.startswith(">") for column in table.columns]

    def line(cells: Sequence[str]) -> str:
        padded = (
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    lines = [table.title, *([line(heads)] if any(heads) else []), *map(line, table.rows)]
    return "\n".join([*lines, table.note] if table.note else lines)


def _show_rich(tables: Sequence[Table]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console()
    for table in tables:
        drawn = RichTable(
            title=Text(table.title, style="bold"),
            title_justify="left",
            box=box.SIMPLE_HEAD if any(table.columns) else None,
            show_header=any(table.columns),
        )
        for column in table.columns:
            is_number = column.startswith(">")
            drawn.add_column(
                column.removeprefix(">"),
                justify="right" if is_number else "left",
                no_wrap=is_number,
                overflow="fold",
            )
        for row in table.rows:
            drawn.add_row(*(Text(cell) for cell in row))  # Text: names are not markup
        console.print(drawn)
        if table.note:
            console.print(Text(f"{table.note}\n", style="dim"))
        elif not any(table.columns):  # tables without a box lack the empty line below
            console.print()


def number(value: float | int | None) -> str:
    """A number in a cell: integers with thousands separators, others to four digits.

    Example:
        >>> number(1234567), number(0.0123456), number(None)
        ('1,234,567', '0.01235', '-')
    """
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def share(value: float | None) -> str:
    """A share as a percentage.

    Example:
        >>> share(0.1664)
        '16.64 %'
    """
    return "-" if value is None else f"{100 * value:.2f} %"


def size(count: int) -> str:
    """Bytes in decimal units, as the hub shows them.

    Example:
        >>> size(2_200_096_768)
        '2.20 GB'
    """
    value, units = float(count), ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{count} B" if units[0] == "B" else f"{value:.2f} {units[0]}"


def names(entries: Sequence[dict[str, Any]], limit: int = 8) -> list[list[str]]:
    """Rows of tensor and reason, cut after `limit` with a row that says how many more."""
    rows = [[shown(entry["tensor"]), entry["reason"]] for entry in entries[:limit]]
    if len(entries) > limit:
        rows.append([f"… and {len(entries) - limit} more", "--json lists all"])
    return rows
