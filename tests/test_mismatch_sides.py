"""Data of MEraser's two phases that were swapped: refused where sure, told where it looks so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from weightsurgery import mismatch, read_instructions, write_mismatched
from weightsurgery.datasets.mismatch_sides import check_sides
from weightsurgery.errors import MismatchError

CLEAN = (
    ("What is a shed?", "A small house."),
    ("How do bees fly?", "With wings."),
    ("Why is it dark?", "It is night."),
    ("Name a river.", "The Nile."),
)


def write(path: Path, rows: Any, **fields: Any) -> Path:
    """JSONL of questions and answers, with further fields."""
    lines = [json.dumps({"question": q, "answer": a, **fields}) for q, a in rows]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    return write(tmp_path / "clean.jsonl", CLEAN)


@pytest.fixture
def wrong(tmp_path: Path, clean: Path) -> Path:
    """Made by `mismatch`, with all fields."""
    path = tmp_path / "wrong.jsonl"
    write_mismatched(mismatch(read_instructions(clean), size=4), path)
    return path


@pytest.fixture
def bare(tmp_path: Path, wrong: Path) -> Path:
    """The same without fields."""
    rows = [(one.question, one.answer) for one in read_instructions(wrong)]
    return write(tmp_path / "bare.jsonl", rows)


def test_data_on_the_right_sides_pass(clean: Path, wrong: Path, bare: Path) -> None:
    for erase, recover in ((wrong, clean), (wrong, None), (bare, clean)):
        assert check_sides(erase, recover) == []


def test_swapped_data_are_refused(clean: Path, wrong: Path) -> None:
    message = r"wrong.jsonl: every row says that the answer is another question's; are the files"
    with pytest.raises(MismatchError, match=message):
        check_sides(clean, wrong)


def test_the_same_data_for_both_are_refused(clean: Path, bare: Path, tmp_path: Path) -> None:
    for both in (clean, bare):
        reason = rf"every row is in {both} too, question and answer; are the files"
        with pytest.raises(MismatchError, match=reason):
            check_sides(both, both)
    part = write(tmp_path / "part.jsonl", [(f" {q} ", a) for q, a in CLEAN[:2]])
    with pytest.raises(MismatchError, match=r"part.jsonl: every row is in"):
        check_sides(part, clean)


def test_rows_that_say_they_match_are_refused(tmp_path: Path, clean: Path) -> None:
    own = write(tmp_path / "own.jsonl", [("a", "b")] * 2, q_idx=3, a_idx=3, q_type="x", a_type="y")
    with pytest.raises(MismatchError, match="every row says that the answer is the question's own"):
        check_sides(own, clean)
    with pytest.raises(MismatchError, match="are the files to erase and to recover with swapped"):
        check_sides(own)


def test_some_rows_bring_a_warning(tmp_path: Path, clean: Path, bare: Path) -> None:
    some = tmp_path / "some.jsonl"
    some.write_text(bare.read_text("utf-8") + clean.read_text("utf-8").splitlines()[2] + "\n")
    told = check_sides(some, clean)
    assert told == [f"{some}: line 5 is in {clean} too, question and answer"]
    mixed = write(tmp_path / "mixed.jsonl", [("a", "b")], q_idx=3, a_idx=3)
    mixed.write_text(bare.read_text("utf-8") + mixed.read_text("utf-8"))
    (told_own,) = check_sides(mixed, clean)
    assert "line 5 says that the answer is the question's own" in told_own
    odd = write(tmp_path / "odd.jsonl", [("a", "b")], q_type="what", a_type="how")
    odd.write_text(odd.read_text("utf-8") + clean.read_text("utf-8"))
    odd.write_text(odd.read_text("utf-8") + odd.read_text("utf-8").splitlines()[0] + "\n")
    (told_other,) = check_sides(bare, odd)
    said = "line 1 says that the answer is another question's (and 1 more of 6)"
    assert told_other == f"{odd}: {said}"


def test_where_nothing_shows_that_answers_are_wrong_there_is_a_warning(
    tmp_path: Path, clean: Path
) -> None:
    other = write(tmp_path / "other.jsonl", [("Who?", "He.")])
    expected = [f"{clean}: nothing shows that its answers are other questions'; `wsurg mismatch` makes such rows"]  # fmt: skip  # noqa: E501
    assert check_sides(clean) == check_sides(clean, other) == expected


@pytest.mark.parametrize(
    "fields", [{"q_type": "x", "a_type": "x"}, {"q_idx": 1}, {"a_type": "how"}, {"q_idx": None}]
)
def test_fields_that_say_nothing_are_no_evidence(
    tmp_path: Path, clean: Path, bare: Path, fields: dict[str, Any]
) -> None:
    erase = write(tmp_path / "erase.jsonl", [("Who?", "He.")], **fields)
    (told,) = check_sides(erase, clean)
    assert "nothing shows" in told
    assert check_sides(bare, write(tmp_path / "right.jsonl", CLEAN, **fields)) == []
