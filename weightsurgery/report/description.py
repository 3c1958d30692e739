"""The tables of `wsurg inspect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weightsurgery.errors import shown
from weightsurgery.report.tables import Table, number, share, size


def description_tables(description: Mapping[str, Any]) -> list[Table]:
    """A description from `inspect` as tables, the summary last, where a terminal shows it."""
    tensors = description["tensors"]
    measured = [k for k in ("l2", "nan", "infinite") if any(k in e for e in tensors)]
    parts = [folder or "." for folder in description["parts"]]
    files = [*description["files"], *description["side_files"]]
    return [
        Table(
            "Tensors",
            ("tensor", "dtype", "shape", ">parameters", ">bytes", *(f">{k}" for k in measured)),
            [
                [
                    shown(e["tensor"]),
                    e["dtype"],
                    " × ".join(map(str, e["shape"])) or "scalar",
                    number(e["parameters"]),
                    size(e["bytes"]),
                    *(number(e.get(k)) for k in measured),
                ]
                for e in tensors
            ],
            optional=len(measured),
        ),
        _groups("By module", "module", description["modules"], description["bytes"]),
        _groups("By kind of module", "kind", description["kinds"], description["bytes"]),
        Table(
            "Metadata",
            ("key", "value"),
            [[shown(k), shown(v)] for k, v in description["metadata"].items()],
        ),
        Table("Files", ("file", ">bytes"), [[shown(f["file"]), size(f["bytes"])] for f in files]),
        Table(
            "Left out when a model is made from this one",
            ("file", "reason"),
            [[shown(e["file"]), e["reason"]] for e in description["left_out"]],
        ),
        Table(
            shown(description["name"]),
            ("", ""),
            [
                ["model type", shown(description["model_type"] or "-")],
                *([["parts", ", ".join(map(shown, parts))]] if parts else []),
                ["tensors", number(len(tensors))],
                ["parameters", number(description["parameters"])],
                ["bytes", size(description["bytes"])],
                ["dtypes", ", ".join(_dtype(e) for e in description["dtypes"]) or "-"],
            ],
        ),
    ]


def _groups(title: str, head: str, groups: Sequence[Mapping[str, Any]], total: int) -> Table:
    rows = [
        [
            shown(e["name"]),
            number(e["tensors"]),
            number(e["parameters"]),
            size(e["bytes"]),
            share(e["bytes"] / total if total else None),
        ]
        for e in groups
    ]
    return Table(title, (head, ">tensors", ">parameters", ">bytes", ">share"), rows)


def _dtype(entry: Mapping[str, Any]) -> str:
    return f"{entry['name']} × {entry['tensors']}"
