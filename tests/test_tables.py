"""Tables on a narrow terminal, and numbers in their cells."""

from __future__ import annotations

import re
import sys

import pytest

from weightsurgery.report.outcome import outcome_tables
from weightsurgery.report.tables import Table, fit, show

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


@pytest.mark.parametrize(
    "text", ["|δ| at 50, 90, 99, 99.9 %", f"config.json: {'removed it, ' * 9}"]
)
def test_words_are_not_broken_at_dots(text: str) -> None:
    assert fit(Table("t", ("", ""), [[text, "value " * 9]]), 40).rows[0][0] == text


def test_headings_are_broken_before_a_column_goes() -> None:
    table = Table("t", ("name", ">mean of all", ">n"), [["abc", "1.5", "2"]], optional=1)
    assert fit(table, 26) == table
    assert fit(table, 25).columns == ("name", ">mean\nof\nall", ">n")
    assert fit(table, 19).note == ""


def test_what_is_too_wide_for_a_table_is_listed() -> None:
    columns = (">line", "text", "", ">share of all", ">prompts")
    table = Table("t", columns, [["1", NAME, "plain", "100.00 %", "123,456,789"]], note="so.")
    found = fit(table, 40)
    assert found.columns == ("",)
    assert found.note == "so."
    rows = ["line 1", f"  text: {NAME}", "  plain", "  share of all: 100.00 %"]
    assert [row[0] for row in found.rows] == [*rows, "  prompts: 123,456,789"]


REAL = {
    "stages": Table(
        "Measured",
        ("stage", ">scale", ">fingerprints said", ">95 % interval", ">perplexity"),
        [["before", "-", "100.00 %", "60.97 to 100.00", "32.02"]],
    ),
    "fingerprints": Table(
        "Fingerprints",
        (">line", "target", "said", "by base", "output"),
        [["1", "violet harbour", "yes", "no", "and " * 20], ["2", "x" * 48, "no", "no", "y"]],
    ),
    "names": Table("Names", ("tensor", "reason"), [[NAME, "has another shape"], ["n" * 90, "x"]]),
    "settings": Table("Asked", ("", ""), [["output", "p/" * 60], ["asked", "rank 16, " * 9]]),
    "modules": Table(
        "Modules",
        ("module", ">tensors", ">parameters", ">bytes"),
        [[NAME * 2, "1", "1,234,567,890", "2.20 GB"]],
        optional=2,
    ),
}


@pytest.mark.parametrize("width", [20, 30, 40, 50, 60, 80, 200])
@pytest.mark.parametrize("name", REAL)
def test_nothing_is_lost_in_a_narrow_terminal(
    name: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = REAL[name]
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show([table])
    drawn = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert max(map(len, drawn.splitlines())) <= width
    assert "…" not in drawn
    told = re.search(r"no room for (.*?); a", " ".join(drawn.split()))
    hidden = told[1].split(", ") if told else []
    shown = [i for i, column in enumerate(table.columns) if column.removeprefix(">") not in hidden]
    for row in table.rows:
        for i in shown:
            letters = "".join(row[i].split())  # perhaps in several lines, with others beside them
            if table.columns[i].startswith(">"):
                assert letters in "".join(drawn.split())
            assert all(drawn.count(letter) >= letters.count(letter) for letter in set(letters))


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
