"""What `purify` and `epur` found, as tables: rows, layers, kinds of module, diagnostics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightsurgery.anatomy import natural_key
from weightsurgery.errors import shown
from weightsurgery.report.tables import Table, number, share

_LISTED = 20  # rows of the embedding
_TENSORS = 10  # with the heaviest tails


def purification_tables(record: Mapping[str, Any]) -> list[Table]:
    """Tables of a record's report; none where it has nothing of the kind."""
    report = record["report"]
    tables = [_rows(report["epur"])] if "epur" in report else []
    if "purify" not in report:
        return tables
    tables.append(_diagnostics(report["purify"].get("diagnostics", [])))
    # What was trained since has changed everywhere, so the counts from before are told.
    reset = report["purify"].get("reset") or record["changed_by"]
    return [
        *tables,
        _groups("Reset by layer", "layer", reset["layer"]),
        _groups("Reset by kind of module", "kind", reset["kind"]),
    ]


def _rows(found: Mapping[str, Any]) -> Table:
    rows = [
        [
            "-" if e["token"] is None else repr(shown(e["token"])),
            str(e["row"]),
            number(int(e["count"])),
            number(e["drift"]),
            number(e["score"]),
            number(e["z"]),
        ]
        for e in found["rows"][:_LISTED]
    ]
    hidden = len(found["rows"]) - len(rows)
    note = f"and {hidden} more; the record lists all. " if hidden else ""
    return Table(
        "Word-embedding rows reset, highest score first",
        ("token", ">row", ">count", ">drift", ">score", ">z-score"),
        rows,
        f"{note}{share(found['matched'])} of the vocabulary has a count.",
    )


def _diagnostics(entries: list[Mapping[str, Any]]) -> Table:
    heavy = sorted(
        (e for e in entries if e["tail_excess"] is not None), key=lambda e: -e["tail_excess"]
    )
    return Table(
        "Heaviest tails: drift that curvature does not explain",
        ("tensor", ">k", ">tail excess", ">KS"),
        [
            [shown(e["tensor"]), number(e["k"]), number(e["tail_excess"]), number(e["ks"])]
            for e in heavy[:_TENSORS]
        ],
        "Pure diffusion has tail excess 1 and KS 0.",
    )


def _groups(title: str, head: str, sums: Mapping[str, Mapping[str, int]]) -> Table:
    rows = [
        [
            shown(group) or "(none)",
            number(found["dimensions"]),
            number(found["changed"]),
            share(found["changed"] / found["dimensions"]),
        ]
        for group, found in sorted(sums.items(), key=lambda item: natural_key(item[0]))
        if found["dimensions"]
    ]
    return Table(title, (head, ">dimensions", ">reset", ">share"), rows)
