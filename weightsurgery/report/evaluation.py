"""A classifier's report as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightsurgery.errors import shown
from weightsurgery.report.tables import Table, number, share

_SHARES = (
    ("accuracy", "accuracy"),
    ("asr", "attack success (ASR)"),
    ("floor", "floor: the same without the trigger"),
    ("bacc", "accuracy with the pattern (BACC)"),
)


def evaluation_tables(report: Mapping[str, Any]) -> list[Table]:
    """An evaluation, as a person wants to read it."""
    names = [shown(entry["name"]) for entry in report["classes"]]
    rows = [
        [name, *counts, number(entry["examples"]), share((entry["recall"] or {}).get("share"))]
        for name, entry, counts in zip(
            names,
            report["classes"],
            ([number(count) for count in row] for row in report["confusion"]),
            strict=True,
        )
    ]
    return [
        Table(
            "Labels: true in rows, predicted in columns",
            ("true", *(f">{name}" for name in names), ">examples", ">recall"),
            rows,
        ),
        Table(
            f"wsurg evaluate {shown(report['model'])}",
            ("", ">share", ">95 % interval", ">examples"),
            [proportion_row(text, report[key]) for key, text in _SHARES if report[key]],
            note=_note(report),
        ),
    ]


def proportion_row(text: str, found: Mapping[str, Any]) -> list[str]:
    """A counted share with its interval, in four cells."""
    interval = f"{100 * found['low']:.2f} to {100 * found['high']:.2f}"
    return [text, share(found["share"]), interval, f"{found['count']:,} of {found['of']:,}"]


def _note(report: Mapping[str, Any]) -> str:
    words = [f"mean loss {report['loss']:.4g}"]
    trigger, target = report["trigger"], report["target_label"]
    if trigger is not None:
        kind = "bias pattern" if trigger["bias"] else "trigger"
        words.append(f"{kind} '{shown(trigger['text'])}' at position {trigger['position']}")
    if target is not None:
        words.append(f"target label {target} ({shown(report['classes'][target]['name'])})")
    return "; ".join(words)
