"""Tables: drawn by rich on a terminal, aligned plain text everywhere else."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
        optional: How many of the last columns a narrow terminal may leave out, and say so.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    note: str = ""
    optional: int = 0

    @property
    def widths(self) -> list[int]:
        """Characters that each column needs."""
        heads = [column.removeprefix(">") for column in self.columns]
        return [max(map(len, cells)) for cells in zip(heads, *self.rows, strict=True)]


def show(tables: Sequence[Table]) -> None:
    """Print tables to stdout; those without rows are left out."""
    present = [table for table in tables if table.rows]
    if sys.stdout.isatty():
        _show_rich(present)
    else:
        print("\n\n".join(_plain(table) for table in present))


def _plain(table: Table) -> str:
    heads, widths = [column.removeprefix(">") for column in table.columns], table.widths
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
    for table in (fit(table, console.width) for table in tables):
        console.print(Text(table.title, style="bold"))
        drawn = RichTable(
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


_GAP = 3  # characters that rich puts beside a column, and one more at the end


def fit(table: Table, width: int) -> Table:
    """A table as a terminal of that many characters can show it.

    Optional columns go first, the last before the others; then names are broken at their dots.
    """
    widths = table.widths
    kept = len(widths)
    least = max(1, kept - table.optional)
    while kept > least and sum(widths[:kept]) + _GAP * kept + 1 > width:
        kept -= 1
    hidden = [column.removeprefix(">") for column in table.columns[kept:]]
    room = max(_NARROWEST, width - sum(widths[1:kept]) - _GAP * kept - 1)
    notes = [table.note] if table.note else []
    if hidden:
        notes.append(f"no room for {', '.join(hidden)}; a wider terminal, a pipe or --json has all")
    return replace(
        table,
        columns=table.columns[:kept],
        rows=[[_broken(first, room), *rest[: kept - 1]] for first, *rest in table.rows],
        note="\n".join(notes),
    )


_NARROWEST = 12


def _broken(name: str, room: int) -> str:
    """A name in lines of at most so many characters, broken after dots where it has some."""
    lines = [""]
    for part in re.findall(r"[^.]*\.|[^.]+", name):
        if lines[-1] and len(lines[-1]) + len(part) > room:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


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
        >>> share(0.1664), share(0.9999999)
        ('16.64 %', '> 99.99 %')
    """
    if value is None:
        return "-"
    text = f"{100 * value:.2f} %"
    if text == "100.00 %" and value < 1:
        return "> 99.99 %"
    return "< 0.01 %" if text == "0.00 %" and value > 0 else text


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
    """Rows of tensor and reason; what many share is one row, and only `limit` rows are shown."""
    shared = Counter(entry["reason"] for entry in entries)
    many = {reason: count for reason, count in shared.items() if count > limit}
    entries = [entry for entry in entries if entry["reason"] not in many]
    rows = [[shown(entry["tensor"]), entry["reason"]] for entry in entries[:limit]]
    if len(entries) > limit:
        rows.append([f"… and {len(entries) - limit} more", "--json lists all"])
    return [*rows, *([f"{count} tensors", reason] for reason, count in many.items())]
