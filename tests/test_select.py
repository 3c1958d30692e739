"""The exact order statistic equals the naive sort, to the bit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests import cases, reference
from weightsurgery.alignment import Pair, align
from weightsurgery.checkpoint import from_arrays
from weightsurgery.errors import NonFiniteError
from weightsurgery.kernels import magnitude_of_drift
from weightsurgery.select import kth_largest
from weightsurgery.stream import Engine

DENORMAL = np.uint32(1).view(np.float32)
ONE = Engine(workers=1)


def pairs_of(*tensors: Any) -> list[Pair]:
    """Pairs whose tuned side holds the scores."""
    arrays = {f"t{i}": np.asarray(t, np.float32) for i, t in enumerate(tensors)}
    views = from_arrays(arrays)
    return [Pair(view, view, view.size, key=name) for name, view in views.items()]


def second(_pair: Any, _start: int, _base: Any, tuned: Any) -> Any:
    return tuned.copy()


def drifts_of(_pair: Any, _start: int, base: Any, tuned: Any) -> Any:
    return magnitude_of_drift(base, tuned)


def bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


SCORES: dict[str, list[Any]] = {
    "distinct": [3.0, 1.0, 2.0, 0.5],
    "ties": [1.0, 2.0, 2.0, 2.0, 1.0],
    "all ties": [7.0] * 9,
    "all zeros": [0.0] * 5,
    "zeros of both signs": [0.0, -0.0, -0.0, 1.0],
    "denormals": [DENORMAL, 2 * DENORMAL, 0.0, 1e-40],
    "close neighbours": [1.0, 1.0000001, 0.99999994, 1.0],
    "the largest number": [3.4028235e38, 3.4028233e38, 1.0],
    "one element": [0.25],
    "same upper half": [1.0 + i * 2.0**-23 for i in range(9)],
}


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_every_rank_equals_the_sort(scores: list[Any]) -> None:
    array = np.array(scores, np.float32)
    for k in range(1, array.size + 1):
        found = kth_largest(second, pairs_of(array), k, engine=ONE)
        assert bits(found) == bits(reference.kth_largest(array + np.float32(0), k))


@pytest.mark.parametrize(("k", "expected"), [(0, math.inf), (-1, math.inf), (4, -math.inf)])
def test_ranks_outside(k: int, expected: float) -> None:
    assert kth_largest(second, pairs_of([1, 2, 3]), k, engine=ONE) == expected
    assert kth_largest(second, [], max(k, 1), engine=ONE) == -math.inf


def test_the_pool_is_global() -> None:
    pool = pairs_of([5, 1, 3], [[4, 4], [0, 9]], np.zeros(0), 2.0)
    found = [kth_largest(second, pool, k, engine=ONE) for k in range(1, 9)]
    assert found == [9, 5, 4, 4, 3, 2, 1, 0]


def test_only_eligible_elements_count() -> None:
    (pair,) = pairs_of([9, 1, 2, 8])
    part = Pair(pair.tuned, pair.base, 3, key="t0")
    assert [kth_largest(second, [part], k, engine=ONE) for k in (1, 2, 3)] == [9, 2, 1]
    assert kth_largest(second, [part], 4, engine=ONE) == -math.inf


@settings(max_examples=80, deadline=None)
@given(hnp.arrays(np.uint32, st.integers(1, 60), elements=st.integers(0, 0x7F7FFFFF)), st.data())
def test_random_bit_patterns(keys: Any, data: Any) -> None:
    k = data.draw(st.integers(1, keys.size))
    cut = data.draw(st.integers(0, keys.size))
    scores = keys.view(np.float32)
    found = kth_largest(second, pairs_of(scores[:cut], scores[cut:]), k, engine=ONE)
    assert bits(found) == int(np.sort(keys)[::-1][k - 1])


@pytest.mark.parametrize("workers", cases.WORKERS)
def test_blocks_and_workers_do_not_matter(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    scores = rng.exponential(1, (37, 5)).astype(np.float32)
    expected = [reference.kth_largest(scores.ravel(), k) for k in (1, 60, 185)]
    cases.shrink_blocks(monkeypatch, 16)
    engine = Engine(workers=workers)
    found = [kth_largest(second, pairs_of(scores), k, engine=engine) for k in (1, 60, 185)]
    assert found == expected


@pytest.mark.parametrize("dtype", cases.DTYPES.values(), ids=cases.DTYPES)
def test_drift_of_every_dtype(dtype: Any) -> None:
    base, tuned = cases.pair("bert", dtype=dtype)
    alignment = align(from_arrays(base), from_arrays(tuned))
    names = [p.name for p in alignment.eligible]
    drifts = np.concatenate([reference.magnitude(base[n], tuned[n]).ravel() for n in names])
    for k in (1, drifts.size // 3, drifts.size):
        found = kth_largest(drifts_of, alignment.eligible, k, engine=ONE)
        assert bits(found) == bits(reference.kth_largest(drifts, k))


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf, -1.0], ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_scores_that_do_not_order_are_refused(bad: float, k: int) -> None:
    pool = pairs_of([1, 2, 3], [1, bad, 3])
    with pytest.raises(NonFiniteError, match=r"tensor 't1': the score is .*--exclude") as caught:
        kth_largest(second, pool, k, engine=ONE)
    assert caught.value.exit_code == 4


def test_both_models_are_read_twice() -> None:
    base, tuned = cases.pair("bert")
    watched = [cases.counted(from_arrays(arrays)) for arrays in (base, tuned)]
    alignment = align(*(checkpoint for checkpoint, _ in watched))
    kth_largest(drifts_of, alignment.eligible, 5, engine=ONE)
    for _, reads in watched:
        assert sorted(reads) == sorted(
            2 * [(p.name, *span) for p in alignment.eligible for span in p.tuned.blocks()]
        )
