"""The rows of the benchmarks' table: what was measured, the bar, and whether it is met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .measure import Result

COLUMNS = ("benchmark", "seconds", "spread", "against", "seconds", "value", "bar", "MB", "")


@dataclass(frozen=True)
class Bar:
    """A limit for a value, and the unit of both."""

    kind: Literal["at most", "at least"]
    limit: float
    unit: str

    def met(self, value: float) -> bool:
        """Tell whether `value` keeps to the limit."""
        return value <= self.limit if self.kind == "at most" else value >= self.limit


@dataclass(frozen=True)
class Row:
    """One line of the table; a row without a value has not been measured."""

    name: str
    result: Result
    value: float | None
    bar: Bar
    rival: str = ""
    rival_result: Result | None = None

    @property
    def verdict(self) -> str:
        """'met', 'MISSED', 'FAILED', or 'not measured' where the rival is absent or failed."""
        if self.result.error:
            return "FAILED"
        if self.value is None:
            return "not measured"
        return "met" if self.bar.met(self.value) else "MISSED"

    def cells(self) -> tuple[str, ...]:
        """Return the texts of the columns."""
        rival = self.rival_result
        spread = self.result.spread
        return (
            self.name,
            seconds_text(self.result),
            "" if spread is None else f"{spread:+.0%}",
            self.rival,
            "" if rival is None else seconds_text(rival),
            "" if self.value is None else f"{self.value:.3g}{self.bar.unit}",
            f"{self.bar.kind} {self.bar.limit:.3g}{self.bar.unit}",
            f"{self.result.peak_bytes / 1e6:.0f}" if self.result.peak_bytes else "",
            self.verdict,
        )

    def as_json(self) -> dict[str, Any]:
        """Return the row for `--json`, every run included."""
        rival = self.rival_result
        return {
            "name": self.name,
            "rival": self.rival,
            "value": self.value,
            "bar": vars(self.bar),
            "verdict": self.verdict,
            "runs": vars(self.result),
            "rival_runs": None if rival is None else vars(rival),
        }


def seconds_text(result: Result) -> str:
    """Return the shortest run in seconds, or why there is none."""
    if result.best is None:
        return "failed" if result.seconds else result.error
    return f"{result.best:.3g}"


def faster(name: str, result: Result, rival: str, other: Result, at_least: float) -> Row:
    """Return the row that asks `result` to be so many times faster than `rival`."""
    value = other.best / result.best if other.best and result.best else None
    return Row(name, result, value, Bar("at least", at_least, "x faster"), rival, other)


def within(name: str, result: Result, rival: str, other: Result, at_most: float) -> Row:
    """Return the row that lets `result` take so many times the time of `rival`."""
    value = result.best / other.best if other.best and result.best else None
    return Row(name, result, value, Bar("at most", at_most, "x its time"), rival, other)


def table(rows: Sequence[Row]) -> str:
    """Return the rows as aligned text."""
    lines = [COLUMNS, *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def failures(rows: Sequence[Row]) -> list[str]:
    """Return what the commands that failed said, each once."""
    results = [(row.name, row.result) for row in rows]
    results += [(row.rival, row.rival_result) for row in rows if row.rival_result is not None]
    found = {f"{name}: {each.error}" for name, each in results if each.error and each.seconds}
    return sorted(found)
