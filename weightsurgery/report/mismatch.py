"""Mismatched data, and the check of them, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightsurgery.errors import counted, shown
from weightsurgery.report.tables import Table, number

_SHOWN = 20  # violations


def mismatch_tables(report: Mapping[str, Any]) -> list[Table]:
    """What was paired."""
    types = [
        [shown(one["type"]), number(one["questions"]), number(one["taken"]), number(one["given"])]
        for one in report["types"]
    ]
    rows = [
        ["output", f"{shown(report['out'])}, {counted(report['size'], 'row')}"],
        ["data", f"{shown(report['data'])}, {report['rows']:,} rows"],
        ["answers", f"{report['answers']:,} different ones"],
        ["seed", str(report["seed"])],
    ]
    return [
        _pairs(report["pairs"]),
        Table("Types", ("type", ">questions", ">taken", ">answers given"), types),
        Table("wsurg mismatch", ("", ""), rows),
    ]


def mismatch_check_tables(report: Mapping[str, Any]) -> list[Table]:
    """What a check saw."""
    found = report["violations"]
    bad = [[str(one["line"]), one["reason"]] for one in found[:_SHOWN]]
    if len(found) > _SHOWN:
        bad.append(["…", f"and {len(found) - _SHOWN:,} more; --json has all"])
    types = [[shown(kind), number(count)] for kind, count in report["types"].items()]
    rows = [
        ["rows", number(report["rows"])],
        ["checked", report["checked"]],
        ["violations", number(len(found))],
    ]
    return [
        _pairs(report["pairs"]),
        Table("Questions by type", ("type", ">questions"), types),
        Table("Violations", (">line", "reason"), bad),
        Table(f"wsurg mismatch --check {shown(report['file'])}", ("", ""), rows),
    ]


def _pairs(pairs: list[Mapping[str, Any]]) -> Table:
    rows = [[shown(p["q_type"]), shown(p["a_type"]), number(p["count"])] for p in pairs]
    return Table("Pairs of types", ("question", "answer", ">rows"), rows)
