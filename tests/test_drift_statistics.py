"""The fused loop behind `diff` against plain numpy, on blocks of every dtype and awkward sizes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from tests import cases, reference
from weightsurgery.drift_kernel import BIN_SHIFT, BINS, TOTALS, drift_statistics
from weightsurgery.kernels import CHUNK

Array = np.ndarray[Any, Any]

PAIRS = list(itertools.product(cases.DTYPES.values(), repeat=2))
PAIR_IDS = [f"{a}-{b}" for a, b in itertools.product(cases.DTYPES, repeat=2)]
EACH_PAIR = pytest.mark.parametrize(("base", "tuned"), PAIRS, ids=PAIR_IDS)
EACH = pytest.mark.parametrize("dtype", cases.DTYPES.values(), ids=cases.DTYPES)
SHAPES = [(1, 1), (1, 3), (7, 13), (3, CHUNK - 1), (2, CHUNK), (3, CHUNK + 1), (1, 3 * CHUNK + 5)]
TOP = 5


def naive(base: Array, tuned: Array, width: int) -> dict[str, Any]:
    """Everything at once, in float64, from drifts taken in the arithmetic type."""
    b, t = reference.widened(base), reference.widened(tuned)
    wide = reference.arithmetic(base, tuned)
    with np.errstate(invalid="ignore", over="ignore"):
        drift = (t.astype(wide) - b.astype(wide)).astype(np.float64)
    finite = np.isfinite(drift)
    with np.errstate(over="ignore"):
        keys = np.abs(drift[finite]).astype(np.float32).view(np.uint32) >> np.uint32(BIN_SHIFT)
    b0, t0, d0 = (np.where(finite, x, 0) for x in (b, t, drift))
    rows = (d0**2).reshape(-1, width)
    return {
        "sum": d0.sum(),
        "drift2": d0 @ d0,
        "base2": b0 @ b0,
        "tuned2": t0 @ t0,
        "sign_flips": (np.sign(b0) * np.sign(t0) < 0).sum(),
        "largest": np.abs(d0).max(initial=0),
        **{f"base_{k}": f(b).sum() for k, f in (("nan", np.isnan), ("inf", np.isinf))},
        **{f"tuned_{k}": f(t).sum() for k, f in (("nan", np.isnan), ("inf", np.isinf))},
        "skipped": (~finite).sum(),
        "bins": np.bincount(keys, minlength=BINS),
        "rows": rows.sum(1),
        "columns": rows.sum(0),
        "places": [i for _, i in reference.largest({"": np.abs(d0)}, TOP)],
    }


def check(base: Array, tuned: Array, width: int) -> dict[str, float]:
    """Compare with the naive numbers; gives the totals."""
    found = drift_statistics(base, tuned, width=width, top=TOP, by_column=True)
    totals, bins, rows, columns, values, places = found
    expected = naive(base, tuned, width)
    total = dict(zip(TOTALS, map(float, totals), strict=True))
    for name in ("sign_flips", "base_nan", "base_inf", "tuned_nan", "tuned_inf", "skipped"):
        assert total[name] == expected[name], name
    assert total["largest"] == expected["largest"]
    for name in ("drift2", "base2", "tuned2"):
        assert total[name] == pytest.approx(expected[name], rel=1e-5), name
    spread = (expected["drift2"] * base.size) ** 0.5
    assert total["sum"] == pytest.approx(expected["sum"], rel=1e-5, abs=1e-6 * spread)
    assert bins.tolist() == expected["bins"].tolist()
    np.testing.assert_allclose(rows, expected["rows"], rtol=1e-5)
    np.testing.assert_allclose(columns, expected["columns"], rtol=1e-5)
    assert places[places >= 0].tolist() == expected["places"]
    assert (np.diff(values) <= 0).all()
    return total


def blocks(
    base: Any, tuned: Any, shape: tuple[int, int], scale: float = 1.0
) -> tuple[Array, Array]:
    rng = np.random.default_rng(shape[1])
    b = rng.normal(0, scale, shape).ravel().astype(np.float32)
    moved = rng.random(b.size) < 0.7
    t = b + moved * rng.normal(0, 0.1 * scale, b.size).astype(np.float32)
    return b.astype(base), t.astype(np.float32).astype(tuned)


@EACH_PAIR
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_numbers_equal_the_naive_ones(base: Any, tuned: Any, shape: tuple[int, int]) -> None:
    check(*blocks(base, tuned, shape), width=shape[1])


@EACH
@pytest.mark.parametrize("scale", [1e-30, 1e-21, 1e-16, 1e-5, 1e4, 1e17, 1e30])
def test_squares_that_leave_the_range_of_float32(dtype: Any, scale: float) -> None:
    wide = scale if dtype.itemsize > 2 or dtype == cases.BF16 else min(max(scale, 1e-5), 1e4)
    check(*blocks(dtype, dtype, (2, CHUNK + 3), wide), width=CHUNK + 3)


def test_a_drift_far_smaller_than_the_weights() -> None:
    base = np.where(np.arange(CHUNK) % 2 == 0, np.float32(1), np.float32(0))
    tuned = np.where(base == 0, np.float32(1e-21), base)
    assert check(base, tuned, width=CHUNK)["drift2"] == pytest.approx(CHUNK / 2 * 1e-42)


@EACH
@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        ([0.0, 1.0], [-0.0, 1.0], 1),
        ([-0.0, 1.0], [-0.0, 1.0], 0),
        ([np.nan, 1.0], [np.nan, 1.0], 0),
        ([np.nan, 1.0], [-np.nan, 1.0], 1),
        ([np.inf, 1.0], [np.inf, 2.0], 1),
    ],
    ids=["zero to negative zero", "negative zero", "equal NaN", "NaN of other sign", "infinity"],
)
def test_changed_counts_stored_bits(dtype: Any, before: Any, after: Any, changed: int) -> None:
    base, tuned = (np.array(values, np.float32).astype(dtype) for values in (before, after))
    totals = drift_statistics(base, tuned, width=2, top=0, by_column=False)[0]
    assert totals[TOTALS.index("changed")] == changed


@EACH
def test_a_block_against_itself(dtype: Any) -> None:
    base, _ = blocks(dtype, dtype, (3, 700))
    base[::50] = np.nan
    total = check(base, base.copy(), width=700)
    assert (total["drift2"], total["largest"], total["changed"]) == (0, 0, 0)


POISON = {
    "base NaN": (np.nan, 1.0),
    "tuned NaN": (1.0, np.nan),
    "both NaN": (np.nan, np.nan),
    "base infinite": (-np.inf, 1.0),
    "tuned infinite": (1.0, np.inf),
    "same infinity": (np.inf, np.inf),
    "NaN and infinity": (np.nan, np.inf),
}


@EACH
@pytest.mark.parametrize("kind", POISON)
@pytest.mark.parametrize(
    "places",
    [[0], [1], [0, 1, 2, 3], [CHUNK], [CHUNK - 1, 2 * CHUNK + 1]],
    ids=["first", "second", "four in a row", "second chunk", "two chunks"],
)
@pytest.mark.parametrize("still", [False, True], ids=["moved", "still"])
def test_what_is_not_finite_is_counted_and_left_out(
    dtype: Any, kind: str, places: list[int], still: bool
) -> None:
    base, tuned = blocks(dtype, dtype, (1, 2 * CHUNK + 3))
    if still:
        tuned = base.copy()
    for array, value in zip((base, tuned), POISON[kind], strict=True):
        array[places] = np.array(value, np.float32).astype(dtype)
    total = check(base, tuned, width=base.size)
    assert total["skipped"] == len(places)


@EACH
@pytest.mark.parametrize("count", [1, 4, 7, 8])
def test_left_out_where_all_the_others_moved(dtype: Any, count: int) -> None:
    """No drift is zero here, so that zeros put in the place of what is left out would show."""
    base, tuned = np.ones(9, dtype), np.full(9, 2, dtype)
    tuned[:count] = np.nan
    total = check(base, tuned, width=9)
    assert total["skipped"] == count


@EACH
def test_nothing_but_nan(dtype: Any) -> None:
    nan = np.full(2 * CHUNK, np.nan, np.float32).astype(dtype)
    total = check(nan, nan.copy(), width=CHUNK)
    assert total["skipped"] == total["base_nan"] == total["tuned_nan"] == nan.size


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64"])
def test_a_difference_that_overflows_is_left_out(dtype: str) -> None:
    """Finite weights, infinite drift; F16 cannot, for its drift is taken in float32."""
    huge = 1.5e308 if dtype == "F64" else 3e38
    base, tuned = blocks(*[cases.DTYPES[dtype]] * 2, (1, 9))
    base[2] = np.array(-huge).astype(cases.DTYPES[dtype])
    tuned[2] = np.array(huge).astype(cases.DTYPES[dtype])
    total = check(base, tuned, width=9)
    assert total["skipped"] == 1
    assert total["base_inf"] == total["tuned_inf"] == 0


@EACH
def test_ties_keep_the_first(dtype: Any) -> None:
    base = np.zeros(3 * CHUNK, dtype)
    tuned = base.copy()
    tuned[[5, 7, CHUNK + 1, CHUNK + 2, 2 * CHUNK, 2 * CHUNK + 9]] = [1, -2, 2, 1, -1, 1]
    *_, values, places = drift_statistics(base, tuned, width=base.size, top=TOP, by_column=False)
    assert places.tolist() == [7, CHUNK + 1, 5, CHUNK + 2, 2 * CHUNK]
    assert values.tolist() == [2, 2, 1, 1, 1]


@pytest.mark.parametrize("top", [0, 1, 3, 50])
def test_as_many_of_the_largest_as_are_asked_for_and_there(top: int) -> None:
    base, tuned = np.zeros(8, np.float32), np.array([0, 3, 0, -1, 2, 0, 0, 4], np.float32)
    *_, values, places = drift_statistics(base, tuned, width=8, top=top, by_column=False)
    assert places.tolist() == ([7, 1, 4, 3] + [-1] * 50)[:top]
    assert values.tolist() == ([4, 3, 2, 1] + [0] * 50)[:top]


@EACH
def test_an_empty_block(dtype: Any) -> None:
    nothing = np.zeros(0, dtype)
    totals, bins, rows, columns, _, places = drift_statistics(
        nothing, nothing, width=0, top=2, by_column=True
    )
    assert not totals.any()
    assert not bins.any()
    assert (rows.size, columns.size) == (0, 0)
    assert places.tolist() == [-1, -1]


@EACH
def test_read_only_blocks_are_taken(dtype: Any) -> None:
    base, tuned = blocks(dtype, dtype, (3, 5))
    before = base.tobytes(), tuned.tobytes()
    base.flags.writeable = tuned.flags.writeable = False
    check(base, tuned, width=5)
    assert (base.tobytes(), tuned.tobytes()) == before
