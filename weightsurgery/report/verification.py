"""What `verify` and `replay` found, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from weightsurgery.coverage import percent
from weightsurgery.errors import counted, first_few, shown
from weightsurgery.report.comparison import coverage_text
from weightsurgery.report.tables import Table, number

LISTED = 20  # problems shown unless all are asked for
_SAME = {
    True: "the recorded files",
    False: "other files than those recorded",
    None: "recorded without a hash",
}
_REMEDY = "give --mask, or replay it"


def verification_tables(report: Mapping[str, Any], *, limit: int, more: str) -> list[Table]:
    """What is not as recorded, and the verdict.

    Args:
        report: From `verify`.
        limit: How many problems are listed at most; 0 lists all.
        more: What lists all, for the note that says that there are more.
    """
    problems = report["problems"]
    rows = [
        [shown(p["file"]), shown(p["tensor"] or "-"), p["problem"], p["detail"]]
        for p in problems[: limit or None]
    ]
    hidden = len(problems) - len(rows)
    verdict = [
        ["files", number(report["files"])],
        ["tensors", number(report["tensors"])],
        ["bytes", number(report["bytes"])],
        *_selected(report["selection"], report["proved"]),
    ]
    whole = "as recorded" if report["selection"] is None else "what its record, BASE and TUNED give"
    title = f"The output is {'' if report['proved'] else 'NOT '}{whole}{_how_much(report)}"
    return [
        Table(
            "What is wrong",
            ("file", "tensor", "problem", "detail"),
            rows,
            note=f"and {hidden:,} more; {more}" if hidden else "",
        ),
        Table(title, ("", ""), verdict),
    ]


def _how_much(report: Mapping[str, Any]) -> str:
    """Which part of TUNED the proof is about, where that is not all but task heads."""
    coverage = {} if report["selection"] is None else report["selection"]["coverage"]
    if not coverage:
        return ""
    if coverage["unpaired"] or coverage["partly_paired"]:
        share = percent(coverage["share"])
        return f", for {share} of TUNED's parameters; BASE has no counterpart for the rest"
    return ", except for task heads that BASE lacks" if coverage["task_heads"] else ""


def _selected(selection: Mapping[str, Any] | None, proved: bool) -> Iterator[list[str]]:
    """What the proof with BASE and TUNED says of the two, and by what the dimensions are known."""
    if selection is None:
        return
    for given in selection["inputs"]:
        yield [given["input"], f"{shown(given['given'])}: {_SAME[given['same']]}"]
    yield ["coverage", coverage_text(selection["coverage"])]
    alone = {e["tensor"]: e["reason"] for e in selection["coverage"]["unpaired"]}
    if alone:
        names = first_few([f"'{shown(name)}'" for name in alone])
        text = f"{counted(len(alone), 'tensor')}, compared only with TUNED: {names}"
        yield ["not in BASE", text]
    renamed = selection["renamed"]
    if renamed:
        old, new = next(iter(renamed.items()))
        text = f"the record renames {counted(len(renamed), 'tensor')} of BASE"
        yield ["names", f"{text}, first {shown(old)} to {shown(new)}"]
    if proved:
        yield ["reset", counted(selection["changed_dimensions"], "dimension")]
        known = selection["known_by"]
        mask = shown(selection["mask"] or "")
        texts = {"recipe": "the recorded steps, done again", "mask": f"the mask {mask}"}
        told = " and ".join(texts[name] for name in known)
        if not selection["statements"]:
            same = all(given["same"] for given in selection["inputs"])
            why = selection["not_by_recipe"] if same else "an input is another file"
            yield ["card, record", f"what they tell was NOT compared: {why}"]
        yield ["known by", told or f"NOT proved: {selection['not_by_recipe']}; {_REMEDY}"]


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
