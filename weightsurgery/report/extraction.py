"""What an extracted adapter keeps, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightsurgery.errors import counted, shown
from weightsurgery.report.comparison import coverage_text
from weightsurgery.report.outcome import written
from weightsurgery.report.tables import Table, names, number, share


def extraction_tables(out: str, record: Mapping[str, Any], listed: int | None) -> list[Table]:
    """Matrices, those first of which least is kept; what is held whole or left out; the sum.

    Args:
        out: Where the adapter was written.
        record: The output's.
        listed: How many matrices to show; None for all.
    """
    report = record["report"]["adapter"]
    warnings = [[shown(warning)] for warning in record["warnings"]]
    return [
        *matrix_tables(report, listed),
        Table("Warnings", ("",), warnings),
        Table("wsurg extract-adapter", ("", ""), _summary(out, record, report)),
    ]


def matrix_tables(report: Mapping[str, Any], listed: int | None) -> list[Table]:
    """Matrices, those first of which least is kept; what is held whole or left out.

    Args:
        report: The adapter's `notes["adapter"]`.
        listed: How many matrices to show; None for all.
    """
    matrices = sorted(report["matrices"], key=lambda one: float(one["energy_kept"]))
    rows = [
        [
            shown(one["tensor"]),
            number(one["rank"]),
            share(one["energy_kept"]),
            number(one["drift"]),
            number(one["residual"]),
            share(one["relative_residual"]),
            one["method"],
            " × ".join(map(str, one["shape"])),
        ]
        for one in matrices[:listed]
    ]
    hidden = len(matrices) - len(rows)
    columns = (">rank", ">energy kept", ">drift", ">residual", ">relative", "method", "shape")
    return [
        Table(
            "Matrices, least energy kept first",
            ("tensor", *columns),
            rows,
            note=f"and {hidden} more; --all shows them" if hidden else "",
            optional=2,
        ),
        Table("Held whole", ("tensor", "why"), names(report["whole"])),
        Table(
            "Not in the adapter, though it differs", ("tensor", "why"), names(report["left_out"])
        ),
    ]


def _summary(out: str, record: Mapping[str, Any], report: Mapping[str, Any]) -> list[list[str]]:
    ranks = sorted({one["rank"] for one in report["matrices"]})
    numbers = counted(report["factor_parameters"], "number")
    kept = f"{share(report['energy_kept'])} of the squared norm of their drift"
    residual = f"{number(report['residual'])} of {number(report['drift'])}"
    coverage = coverage_text(record["alignment"]["coverage"])
    rows = [["output", written(out, record)], ["coverage", coverage]]
    if ranks:
        which = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        matrices = counted(len(report["matrices"]), "matrix", "matrices")
        rows.append(["factors", f"{matrices}, {which}, {numbers}"])
        rows.append(["kept", kept])
        rows.append(["residual", f"{residual} (norm of what is left, norm of the drift)"])
    rows.append(["unmoved", counted(report["unmoved"], "tensor")])
    return rows
