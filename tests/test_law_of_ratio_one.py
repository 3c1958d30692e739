"""What transformers loads from an output is the edit of what it loads from BASE and TUNED.

`python -m tests.law_table` prints the same as a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.architectures import ARCHITECTURES
from tests.law import CHECKS, judge
from tests.law_table import CASES
from tests.limits import failing
from tests.stored import EXCEPTIONS, SAME_NAMES, Unstorable, Zoo

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of torch's, about tiny models
]

# One of each kind: what runs in `tox`.
FAST = {
    "bert": ("v4/tuned", "bin/tuned"),
    "gpt2": ("wrapped/base",),
    "gpt-neox": ("inner/tuned",),
    "llama": ("sharded/tuned",),
    "llama-tied": ("bin/tuned",),
    "mixtral": ("inner/base",),
    "bart": ("bin/base",),
}
_SHORT = ("bert", "gpt2", "llama-tied", "mixtral", "mamba", "bart", "wav2vec2", "qwen2-5-vl")


def _cases() -> Iterator[Any]:
    slow, long = pytest.mark.slow, pytest.mark.long
    for name in ARCHITECTURES:
        for case in CASES:
            marks: tuple[Any, ...] = () if name in _SHORT else (long,)
            marks = () if case in FAST.get(name, ()) else (slow, *marks)
            yield pytest.param(name, *case.split("/"), id=f"{name}/{case}", marks=marks)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Each architecture's models are built once."""
    return Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.mark.parametrize(("name", "way", "side"), list(_cases()))
def test_the_law(zoo: Zoo, name: str, way: str, side: str) -> None:
    try:
        verdicts = list(judge(zoo, name, way, side))
    except Unstorable as error:
        known = str(error).startswith(EXCEPTIONS.get((name, way), SAME_NAMES))
        (pytest.skip if known else pytest.fail)(str(error))
    judged = [verdict.check for verdict in verdicts]
    assert judged == list(CHECKS[:2] if way == "sharded" else CHECKS)
    wrong = {one.check: one.detail for one in verdicts if not one.holds}
    assert wrong.keys() == failing(name, f"{way}/{side}", judged), wrong


def test_every_way_of_storing_is_in_the_fast_selection() -> None:
    ways = {case.split("/")[0] for cases in FAST.values() for case in cases}
    assert ways == {case.split("/")[0] for case in CASES} - {"saved"}
    assert all(case in CASES for cases in FAST.values() for case in cases)
