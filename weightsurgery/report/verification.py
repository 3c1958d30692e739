"""What `verify` and `replay` found, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightsurgery.errors import counted, shown
from weightsurgery.report.tables import Table, number


def verification_tables(report: Mapping[str, Any]) -> list[Table]:
    """What is not as recorded, and the verdict.

    Args:
        report: From `verify`.
    """
    rows = [
        [shown(p["file"]), shown(p["tensor"] or "-"), p["problem"], p["detail"]]
        for p in report["problems"]
    ]
    verdict = [
        ["files", number(report["files"])],
        ["tensors", number(report["tensors"])],
        ["bytes", number(report["bytes"])],
    ]
    selection = report["selection"]
    if selection is not None:
        for given in selection["inputs"]:
            same = "the recorded files" if given["same"] else "other files than those recorded"
            verdict.append([given["input"], f"{shown(given['given'])}: {same}"])
        changed = counted(selection["changed_dimensions"], "dimension")
        verdict.append(["not TUNED's bits", changed])
        if selection["mask"] is not None:
            verdict.append(["mask", shown(selection["mask"])])
    title = "The output is as recorded" if report["proved"] else "The output is NOT as recorded"
    return [
        Table("Not as the record says", ("file", "tensor", "problem", ""), rows),
        Table(title, ("", ""), verdict),
    ]


def replay_tables(report: Mapping[str, Any]) -> list[Table]:
    """Which files came out otherwise, and the verdict.

    Args:
        report: From `replay`.
    """
    rows = [[shown(d["file"]), d["recorded"] or "-", d["got"] or "-"] for d in report["differs"]]
    rows += [[f"the record's {key}", "-", "another"] for key in report["told_otherwise"]]
    verdict = [
        ["written", shown(report["out"])],
        ["files", number(report["files"])],
        ["inputs", ", ".join(shown(given["path"]) for given in report["inputs"])],
    ]
    same = report["identical"]
    title = "The same bytes as recorded" if same else "NOT the bytes that were recorded"
    return [
        Table("Other than recorded", ("", "recorded SHA-256", "this run's"), rows),
        Table(title, ("", ""), verdict),
    ]
