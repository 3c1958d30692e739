"""The tables of `wsurg diff`."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from weightsurgery.comparison import DiffReport
from weightsurgery.coverage import percent
from weightsurgery.errors import counted, shown
from weightsurgery.report.tables import Table, names, number, share
from weightsurgery.statistics import METRICS, QUANTILE_ERROR

_COLUMNS: tuple[str, ...] = (
    *(">rel. L2", ">L2", ">changed", ">max |δ|", ">mean δ", ">std δ", ">cosine", ">flips"),
    *(">q50 |δ|", ">q90", ">q99", ">q99.9"),
)
_HIDDEN = (
    "tensor of smaller drift is not shown; --all shows it",
    "tensors of smaller drift are not shown; --all shows them",
)
_FEWEST = 2  # statistics beside a name, however narrow the terminal


def comparison_tables(report: DiffReport, *, limit: int) -> list[Table]:
    """A report as tables, the summary last, where a terminal shows it.

    Args:
        report: From `diff`.
        limit: Tensors listed at most; 0 lists all.
    """
    shown_tensors = report.tensors[: limit or None]
    hidden = len(report.tensors) - len(shown_tensors)
    more = counted(hidden, *_HIDDEN) if hidden else ""

    def table(
        title: str, head: str, entries: Sequence[Mapping[str, Any]], key: str, note: str = ""
    ) -> Table:
        rows = [[shown(e[key]) or "(none)", *_cells(e)] for e in entries]
        return Table(title, (head, *_COLUMNS), rows, note, len(_COLUMNS) - _FEWEST)

    return [
        table("Tensors, largest relative drift first", "tensor", shown_tensors, "tensor", more),
        *_top_tables(report),
        table("By layer", "layer", report.layers, "layer"),
        table("By kind of module", "kind", report.kinds, "kind"),
        *alignment_tables(report.alignment, report.other, kept="Not compared"),
        _nonfinite_table(report),
        _summary(report),
    ]


def _cells(entry: Mapping[str, Any]) -> list[str]:
    before, after = ("max_abs", "mean", "std"), ("sign_flips", "q50", "q90", "q99", "q99.9")
    cells = [number(entry["relative_l2"]), number(entry["l2"]), share(entry["changed_share"])]
    cells += [number(entry[name]) for name in before]
    return [*cells, _cosine(entry["cosine"]), *(number(entry[name]) for name in after)]


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"  # four digits would call most models equal


def _top_tables(report: DiffReport) -> list[Table]:
    top = report.top
    known = any(e["token"] is not None for e in top["tokens"])
    return [
        Table(
            "Dimensions of largest drift",
            ("tensor", ">index", ">base", ">tuned", ">δ"),
            [
                [shown(e["tensor"]), str(e["index"]), *(number(e[k]) for k in _OLD_AND_NEW)]
                for e in top["dimensions"]
            ],
        ),
        Table(
            "Rows (neurons) of largest drift",
            ("tensor", ">row", ">L2"),
            [[shown(e["tensor"]), str(e["row"]), number(e["l2"])] for e in top["rows"]],
        ),
        Table(
            "Columns of largest drift",
            ("tensor", ">column", ">L2"),
            [[shown(e["tensor"]), str(e["column"]), number(e["l2"])] for e in top["columns"]],
        ),
        Table(
            "Word-embedding rows of largest drift",
            ("token", ">id", ">L2"),
            [[_token(e["token"]), str(e["row"]), number(e["l2"])] for e in top["tokens"]],
            "" if known else "No tokenizer lies beside TUNED, which would give the tokens.",
        ),
    ]


_OLD_AND_NEW = ("base", "tuned", "drift")


def _token(token: str | None) -> str:
    return "-" if token is None else repr(shown(token))


def alignment_tables(
    alignment: Mapping[str, Any],
    other: Sequence[Mapping[str, Any]] = (),
    *,
    kept: str = "Kept from TUNED",
) -> list[Table]:
    """What did not pair, and why; nothing where everything did.

    Args:
        alignment: The report of `Alignment.to_json`.
        other: Tensors compared as bytes, with how many elements differ.
        kept: What to call the tensors that are TUNED's own.
    """
    prefix = alignment["prefix"]
    found = [[repr(prefix["text"]), prefix["on"].upper()]] if prefix else []
    partly = [{"tensor": e["tensor"], "reason": e["reason"]} for e in alignment["partly_eligible"]]
    tied = alignment["tied"]
    notes = [{"tensor": e["tensor"], "reason": e["note"]} for e in alignment["notes"]]
    differing = [
        {
            "tensor": e["tensor"],
            "reason": counted(e["changed"], "element differs", "elements differ"),
        }
        for e in other
        if e["changed"]
    ]
    return [
        Table("Names paired by a prefix", ("prefix", "only in names of"), found),
        Table(kept, ("tensor", "reason"), names(alignment["kept_from_tuned"])),
        Table("Paired in part", ("tensor", "which"), names(partly)),
        Table(
            "Tied in TUNED", ("tensor", "to"), [[shown(e["tensor"]), shown(e["to"])] for e in tied]
        ),
        Table("Only in BASE", ("tensor", "reason"), names(alignment["only_in_base"])),
        Table("Notes", ("tensor", "note"), names(notes)),
        Table("Not floating, and different", ("tensor", "how"), names(differing)),
    ]


def coverage_text(coverage: Mapping[str, Any]) -> str:
    """Coverage in a line: the share, how tensors were paired, and what was left out of it.

    Args:
        coverage: The report of `Coverage.to_json`.
    """
    heads = coverage["task_heads"]
    besides = f", not counting {heads:,} in task heads" if heads else ""
    known = coverage["architecture"]
    by = shown(known) if known else "architecture unknown: paired by names"
    return f"{percent(coverage['share'])} of TUNED's parameters{besides} ({by})"


def _nonfinite_table(report: DiffReport) -> Table:
    kinds = ("base_nan", "base_inf", "tuned_nan", "tuned_inf")
    rows = [
        [shown(entry["tensor"]), *(number(entry[kind]) for kind in kinds)]
        for entry in report.tensors
        if any(entry[kind] for kind in kinds)
    ]
    heads = (">NaN in BASE", ">Inf in BASE", ">NaN in TUNED", ">Inf in TUNED")
    return Table("NaN and infinity", ("tensor", *heads), rows)


def _summary(report: DiffReport) -> Table:
    model = report.model
    rows = [
        ["tensors compared", f"{len(report.tensors):,} ({_equal(report):,} bit-equal)"],
        ["coverage", coverage_text(report.alignment["coverage"])],
        ["dimensions", number(model["count"])],
        ["changed", f"{number(model['changed'])} ({share(model['changed_share'])})"],
        ["L2 of the drift", number(model["l2"])],
        ["relative L2", number(model["relative_l2"])],
        ["max |δ|", number(model["max_abs"])],
        ["mean, std of δ", f"{number(model['mean'])}, {number(model['std'])}"],
        ["cosine", _cosine(model["cosine"])],
        ["sign flips", number(model["sign_flips"])],
        ["|δ| at 50, 90, 99, 99.9 %", ", ".join(number(model[f"q{q}"]) for q in _QUANTILES)],
    ]
    title = f"Model: {shown(report.base)} → {shown(report.tuned)}"
    equal = bool(report.tensors) and _equal(report) == len(report.tensors)
    same = not any(entry["changed"] for entry in report.other)
    verdict = "All tensors compared are equal, bit for bit." if equal and same else ""
    note = f"Quantiles are within {share(QUANTILE_ERROR)}."
    return Table(title, ("", ""), rows, verdict or note)


_QUANTILES = ("50", "90", "99", "99.9")


def _equal(report: DiffReport) -> int:
    return sum(entry["bit_equal"] for entry in report.tensors)


def comparison_csv(report: DiffReport) -> str:
    """One line for each tensor, with every metric."""
    text = io.StringIO()
    columns = ("tensor", "layer", "kind", "dtype", "shape", *METRICS, "bit_equal")
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for entry in report.tensors:
        shape = "x".join(map(str, entry["shape"]))
        writer.writerow({**entry, "tensor": shown(entry["tensor"]), "shape": shape})
    return text.getvalue()
