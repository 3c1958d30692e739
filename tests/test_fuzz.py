"""A little fuzzing in every run of the tests, always the same; `tests/fuzz` goes on for longer."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings

from tests.fuzz.shapes import shape_of
from tests.fuzz.targets import SEEDS, TARGETS, run

# Some open, write and compare whole models.
TRIES = {"weights": 600, "sealed-record": 60, "record": 100, "settings": 60, "config": 100}


@pytest.mark.parametrize("target", TARGETS)
def test_only_errors_of_ours_come_out(
    target: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    outcomes = set()

    @settings(max_examples=TRIES.get(target, 200), deadline=None, database=None, derandomize=True)
    @given(data=shape_of(target))
    def tried(data: bytes) -> None:
        outcomes.add(run(target, folder, data))

    tried()
    assert outcomes == {True, False}  # or nothing was tried


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_changed_was_accepted_before(target: str, tmp_path: Path) -> None:
    for seed in SEEDS[target]():
        assert run(target, tmp_path, seed)
