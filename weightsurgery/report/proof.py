"""The proof of a merge, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weightsurgery.errors import counted, shown
from weightsurgery.report.tables import Table, number

LISTED = 20  # tensors shown unless all are asked for


def proof_tables(report: Mapping[str, Any], *, limit: int, more: str) -> list[Table]:
    """What is wrong, tensor by tensor, and the verdict.

    Args:
        report: From `verify_adapter`.
        limit: How many tensors are listed at most; 0 lists all.
        more: What lists all, for the note that says that there are more.
    """
    wrong = [one for one in report["tensors"] if one["verdict"] not in ("proved", "untouched")]
    rows = [
        [shown(one["tensor"]), one["verdict"], *(_cell(one.get(key)) for key in _NUMBERS)]
        for one in wrong[: limit or None]
    ]
    hidden = len(wrong) - len(rows)
    adapted = [one for one in report["tensors"] if one["adapted"]]
    proved = sum(one["verdict"] == "proved" for one in adapted)
    worst = [one["worst"] for one in adapted if "worst" in one]
    verdict = [
        ["proved", f"{number(proved)} of {counted(len(adapted), 'adapted tensor')}"],
        ["untouched", counted(report["untouched"], *_UNTOUCHED)],
        ["worst element", _worst(worst)],
    ]
    columns = ("tensor", "verdict", ">change", ">residual", ">bound", ">scale")
    title = "The merge is proved" if report["proved"] else "The merge is NOT proved"
    return [
        Table(
            "Not what BASE and the adapters give",
            columns,
            rows,
            note=f"and {hidden:,} more; {more}" if hidden else "",
        ),
        Table(title, ("", ""), verdict),
    ]


def _worst(found: Sequence[float | None]) -> str:
    numbers = [one for one in found if one is not None]
    if len(numbers) < len(found):
        return "NaN or infinity"
    return f"{max(numbers, default=0.0):.2g} of what rounding explains"


_UNTOUCHED = ("other has BASE's bytes", "others have BASE's bytes")
_NUMBERS = ("change", "residual", "bound", "scale")


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
