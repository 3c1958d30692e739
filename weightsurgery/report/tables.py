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
        return [max(map(_width, cells)) for cells in zip(heads, *self.rows, strict=True)]


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
_NARROWEST = 12  # of a column of text, unless all of it is shorter


def fit(table: Table, width: int) -> Table:
    """A table as a terminal of that many characters can show it.

    Headings are broken at spaces first; then optional columns go, the last before the others; then
    names are broken at their dots. A table that is still too wide becomes a list, a line for each
    cell: no number is ever cut.
    """
    whole = table
    if _drawn(table.widths) > width:
        table = replace(table, columns=tuple(map(_short_head, table.columns, _cells(table))))
    widths = table.widths
    kept = len(widths)
    least = max(1, kept - table.optional)
    while kept > least and _drawn(widths[:kept]) > width:
        kept -= 1
    needed = [
        found if column.startswith(">") else min(found, _NARROWEST)
        for column, found in zip(table.columns[:kept], widths, strict=False)
    ]
    if _drawn(needed) > width:
        return _listed(whole)
    hidden = [column.removeprefix(">") for column in whole.columns[kept:]]
    # Other columns of text can be folded too, and get what the first leaves.
    others = sum(
        min(found, 2 * least) for found, least in zip(widths[1:kept], needed[1:], strict=True)
    )
    room = max(needed[0], width - others - _GAP * kept - 1)
    notes = [table.note] if table.note else []
    if hidden:
        notes.append(f"no room for {', '.join(hidden)}; a wider terminal, a pipe or --json has all")
    return replace(
        table,
        columns=table.columns[:kept],
        rows=[[_broken(first, room), *rest[: kept - 1]] for first, *rest in table.rows],
        note="\n".join(notes),
    )


def _drawn(widths: Sequence[int]) -> int:
    """Characters that rich takes for columns of these widths."""
    return sum(widths) + _GAP * len(widths) + 1


def _width(text: str) -> int:
    return max(map(len, text.split("\n")))


def _cells(table: Table) -> list[int]:
    """Characters that each column needs below its heading."""
    return [max(map(len, cells)) for cells in zip(*table.rows, strict=True)]


def _short_head(column: str, room: int) -> str:
    """A heading in lines of at most so many characters, or of one word each."""
    lines: list[str] = []
    for word in column.split(" "):
        if lines and len(lines[-1].removeprefix(">")) + 1 + len(word) <= room:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def _listed(table: Table) -> Table:
    """A row below another, and in a row a cell below another, each after its heading."""
    heads = [column.removeprefix(">") for column in table.columns]
    rows: list[list[str]] = []
    for row in table.rows:
        first = f"{heads[0]} {row[0]}" if table.columns[0].startswith(">") else row[0]
        named = zip(heads[1:], row[1:], strict=True)
        rows += [[first], *([f"  {head}: {cell}" if head else f"  {cell}"] for head, cell in named)]
    return replace(table, columns=("",), rows=rows, optional=0)


def _broken(name: str, room: int) -> str:
    """A name in lines of at most so many characters, broken after dots where it has some.

    Words are left to rich, which breaks them at spaces.
    """
    if " " in name:
        return name
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
