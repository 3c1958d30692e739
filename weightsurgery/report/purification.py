"""What `purify` and `epur` found, as tables: rows, layers, kinds of module, diagnostics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from weightsurgery.anatomy import kind_of, layer_of, natural_key
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
    if record["recipe"].get("operator") != "purify":
        return tables  # what was trained since has changed everywhere
    return [
        *tables,
        _groups(record, "Reset by layer", "layer", layer_of),
        _groups(record, "Reset by kind of module", "kind", kind_of),
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


def _groups(record: Mapping[str, Any], title: str, head: str, group: Callable[[str], str]) -> Table:
    """Changed dimensions of the edited tensors, summed by group."""
    copies = {entry["tensor"] for entry in record["alignment"]["tied"]}
    sums: dict[str, tuple[int, int]] = {}
    for name, entry in record["tensors"].items():
        if entry["status"] != "edited" or name in copies:
            continue
        size = 1
        for dimension in entry["shape"]:
            size *= dimension
        changed, total = sums.get(group(name), (0, 0))
        sums[group(name)] = (changed + entry["changed"], total + size)
    rows = [
        [shown(key) or "(none)", number(total), number(changed), share(changed / total)]
        for key, (changed, total) in sorted(sums.items(), key=lambda item: natural_key(item[0]))
        if total
    ]
    return Table(title, (head, ">dimensions", ">reset", ">share"), rows)
