"""Tables on a narrow terminal, and numbers in their cells."""

from __future__ import annotations

import pytest

from weightsurgery.report.outcome import outcome_tables
from weightsurgery.report.tables import Table, fit

NAME = "encoder.layer.3.attention.self.value.bias"
WIDE = Table("t", ("tensor", ">a", ">b", ">c"), [[NAME, "1" * 8, "2" * 8, "3" * 8]], "so.", 2)


def drawn(table: Table) -> int:
    """Characters that rich takes for a table: three beside each column, and one more."""
    longest = max(len(line) for row in table.rows for line in row[0].split("\n"))
    return longest + sum(table.widths[1:]) + 3 * len(table.columns) + 1


@pytest.mark.parametrize(("width", "columns"), [(200, 4), (78, 4), (77, 3), (66, 2), (30, 2)])
def test_optional_columns_go_first_then_names_are_broken(width: int, columns: int) -> None:
    table = fit(WIDE, width)
    assert len(table.columns) == len(table.rows[0]) == columns
    hidden = ", ".join(["b", "c"][columns - 2 :])
    said = f"\nno room for {hidden}; a wider terminal, a pipe or --json has all" if hidden else ""
    assert table.note == f"so.{said}"
    assert table.rows[0][0].replace("\n", "") == NAME
    assert drawn(table) <= width


def test_a_table_that_fits_is_left_alone() -> None:
    assert fit(WIDE, 1000) == WIDE


def test_names_are_broken_after_dots_only() -> None:
    lines = fit(WIDE, 35).rows[0][0].split("\n")
    assert lines == ["encoder.layer.3.", "attention.self.", "value.bias"]


def test_the_outcome_tells_what_was_asked() -> None:
    settings = {
        "ratio": 0.9,
        "select": "drift",
        "seed": 0,
        "ratio_for": (("*.bias", 0.0),),
        "include": (),
        "exclude": ("*word*", "*norm*"),
        "keep_mismatched": True,
        "allow_nonfinite": False,
    }
    record = {
        "recipe": {"operator": "mix", "settings": settings},
        "outputs": {},
        "tensors": {},
        "left_out": [],
        "report": {},
        "warnings": [],
        "alignment": None,
        "effective_share": None,
    }
    rows = dict(outcome_tables("out", record)[-1].rows)
    assert rows["asked"] == (
        "ratio 0.9 (reserve 0.1), select drift, seed 0, ratio-for *.bias=0.0, "
        "exclude *word* *norm*, keep-mismatched"
    )
