"""The compiled loops against numpy, bit for bit where bits are promised."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests import cases, reference
from weightsurgery.buffers import empty
from weightsurgery.kernels import (
    HALF,
    all_finite,
    choose,
    count_different,
    count_halves,
    magnitude_of_drift,
    same_float,
    to_dtype,
    to_float,
)
from weightsurgery.low_rank_kernel import add_low_rank, merge_low_rank

ALL16 = np.arange(1 << 16, dtype=np.uint16)
EACH = pytest.mark.parametrize("dtype", cases.DTYPES.values(), ids=cases.DTYPES)
PAIRS = list(itertools.product(cases.DTYPES.values(), repeat=2))
PAIR_IDS = [f"{a}-{b}" for a, b in itertools.product(cases.DTYPES, repeat=2)]
EACH_PAIR = pytest.mark.parametrize(("base", "tuned"), PAIRS, ids=PAIR_IDS)


def bits(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return array.view(f"u{array.itemsize}")


def extremes(dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Zeros, denormals, the largest numbers, infinities, NaNs: what arithmetic stumbles over."""
    size = 8 * dtype.itemsize
    mantissa = {"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52}[dtype.name]
    infinity = (1 << (size - 1)) - (1 << mantissa)
    one = [0, 1, (1 << mantissa) - 1, 1 << mantissa, infinity - 1, infinity]
    one += [infinity + 1, infinity | 1 << (mantissa - 1), infinity | 5 << (mantissa - 3)]
    both = [*one, *(b | 1 << (size - 1) for b in one)]
    return np.array(both, f"u{dtype.itemsize}").view(dtype)


# --- conversions ------------------------------------------------------------------------------


def test_every_bfloat16_is_widened_exactly() -> None:
    expected = ALL16.astype(np.uint32) << np.uint32(16)
    assert (bits(to_float(ALL16.view(cases.BF16))) == expected).all()


def test_every_float16_is_widened_exactly() -> None:
    halves = ALL16.view(np.float16)
    wide = to_float(halves)
    assert wide.dtype == np.float32
    assert (np.isnan(wide) == np.isnan(halves)).all()
    number = ~np.isnan(halves)
    assert (wide[number].astype(np.float64) == halves[number].astype(np.float64)).all()


@pytest.mark.parametrize("dtype", [np.dtype("f4"), np.dtype("f8")], ids=["F32", "F64"])
def test_wide_floats_stay_as_they_are(dtype: np.dtype[Any]) -> None:
    block = extremes(dtype)
    assert (bits(to_float(block)) == bits(block)).all()
    assert to_dtype(block, dtype) is block


@pytest.mark.parametrize("low", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], ids=hex)
def test_float32_is_rounded_to_every_bfloat16_as_ml_dtypes_does(low: int) -> None:
    values = (ALL16.astype(np.uint32) << np.uint32(16) | np.uint32(low)).view(np.float32)
    ours = to_dtype(values, cases.BF16)
    nan = np.isnan(values)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = values.astype(cases.BF16)
    assert (bits(ours)[~nan] == bits(expected)[~nan]).all()
    assert np.isnan(to_float(ours)[nan]).all()
    assert (bits(ours)[nan] >> 15 == (bits(values)[nan] >> 31).astype(np.uint16)).all()


def test_bfloat16_goes_to_float32_and_back() -> None:
    block = ALL16.view(cases.BF16)
    back = bits(to_dtype(to_float(block), cases.BF16))
    nan = np.isnan(to_float(block))
    assert (back[~nan] == ALL16[~nan]).all()
    assert (back[nan] == ALL16[nan] | 0x40).all()  # quieted, payload kept


def test_halfway_between_neighbours_goes_to_the_even_one() -> None:
    lower = ALL16[:0x7BFF].view(np.float16).astype(np.float64)
    upper = ALL16[1:0x7C00].view(np.float16).astype(np.float64)
    middle = ((lower + upper) / 2).astype(np.float32)
    even = (ALL16[:0x7BFF] + 1) & 0xFFFE
    assert (bits(to_dtype(middle, np.dtype(np.float16))) == even).all()


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        (65519.996, "F16", 65504.0),
        (65520.0, "F16", np.inf),
        (3.3961775e38, "BF16", np.inf),
        (3.3961772e38, "BF16", 3.3895314e38),
        (-1e-46, "F32", -0.0),
        (3.5e38, "F32", np.inf),
    ],
)
def test_overflow_and_underflow(value: float, dtype: str, expected: float) -> None:
    source = np.array([value], np.float64 if dtype == "F32" else np.float32)
    found = to_dtype(source, cases.DTYPES[dtype]).astype(np.float32)
    assert (bits(found) == bits(np.array([expected], np.float32))).all()


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_float64_is_rounded_once(dtype: str) -> None:
    """Just beside a tie: going through float32 first would land on the tie, then go to even."""
    rng = np.random.default_rng(3)
    kind = cases.DTYPES[dtype]
    stored = rng.normal(0, 1, 200).astype(np.float32).astype(kind)
    apart = {"F16": 2.0**-11, "BF16": 2.0**-8, "F32": 2.0**-24}[dtype]
    ties = reference.widened(stored) + apart * np.exp2(np.floor(np.log2(abs(stored.astype("f8")))))
    values = np.concatenate([ties, ties * (1 + 2.0**-45), ties * (1 - 2.0**-45)])
    assert (bits(to_dtype(values, kind)) == bits(reference.rounded(values, kind))).all()


@EACH_PAIR
def test_both_blocks_in_the_wider_float(base: Any, tuned: Any) -> None:
    one, other = same_float(np.ones(3, base), np.full(3, 2, tuned))
    wide = np.float64 if np.dtype("f8") in (base, tuned) else np.float32
    assert (one.dtype, other.dtype) == (wide, wide)
    assert (one.tolist(), other.tolist()) == ([1.0] * 3, [2.0] * 3)


# --- selection --------------------------------------------------------------------------------


@EACH
def test_a_choice_copies_bits(dtype: np.dtype[Any]) -> None:
    one, other = extremes(dtype), extremes(dtype)[::-1].copy()
    mask = np.arange(one.size) % 3 == 0
    expected = np.where(mask, bits(one), bits(other))
    assert (bits(choose(mask, one, other)) == expected).all()
    assert (bits(choose(~np.zeros_like(mask), one, other)) == bits(one)).all()
    assert (bits(choose(np.zeros_like(mask), one, other)) == bits(other)).all()


@EACH_PAIR
def test_a_choice_rounds_once_to_the_other_dtype(base: Any, tuned: Any) -> None:
    rng = np.random.default_rng(5)
    b = rng.normal(0, 1, 99).astype(np.float32).astype(base)
    t = rng.normal(0, 1, 99).astype(np.float32).astype(tuned)
    mask = rng.random(99) < 0.5
    found = choose(mask, b, t)
    assert found.dtype == tuned
    assert (bits(found) == bits(reference.chosen(mask, b, t))).all()


@pytest.mark.parametrize("kind", [*cases.DTYPES.values(), np.dtype("i8"), np.dtype("u1")], ids=str)
@pytest.mark.parametrize("size", [0, 1, 2047, 2048, 5001])
def test_differing_elements_are_counted_by_bits(kind: np.dtype[Any], size: int) -> None:
    rng = np.random.default_rng(size)
    raw = rng.integers(0, 256, size * kind.itemsize, np.uint8).view(kind)
    other = raw.copy()
    chosen = rng.random(size) < 0.3
    bits(other)[chosen] ^= bits(other).dtype.type(1)
    assert count_different(raw, other) == chosen.sum()
    assert count_different(raw, raw.copy()) == count_different(raw, raw) == 0


@EACH
def test_zeros_of_two_signs_differ_and_equal_nans_do_not(dtype: np.dtype[Any]) -> None:
    assert count_different(np.zeros(3, dtype), -np.zeros(3, dtype)) == 3
    nan = np.full(3, np.nan, dtype)
    assert count_different(nan, nan.copy()) == 0


@EACH
def test_all_finite(dtype: np.dtype[Any]) -> None:
    for value in extremes(dtype):
        for place in (0, 1, 30):
            block = np.ones(31, dtype)
            block[place] = value
            assert all_finite(block) == bool(np.isfinite(reference.widened(block)).all())
    assert all_finite(np.zeros(0, dtype))


@EACH_PAIR
def test_magnitude_of_drift(base: Any, tuned: Any) -> None:
    rng = np.random.default_rng(6)
    b = np.concatenate([rng.normal(0, 1, 33).astype(np.float32).astype(base), extremes(base)])
    t = np.concatenate([rng.normal(0, 1, 33).astype(np.float32).astype(tuned), extremes(tuned)])
    with np.errstate(invalid="ignore", over="ignore"):
        expected = reference.magnitude(b, t)
    found = magnitude_of_drift(b, t)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


@EACH
def test_a_product_is_merged_in_one_pass_as_in_three(dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(3)
    stored = np.concatenate([rng.normal(0, 1, 3000).astype(dtype), extremes(dtype)])
    left, right = rng.normal(size=(60, 5)), rng.normal(size=(1, 5, 51))
    if dtype != np.float64:
        left, right = left.astype(np.float32), right.astype(np.float32)
    for scale in (0.0, 0.5, 1e38):
        with np.errstate(over="ignore", invalid="ignore"):
            found = merge_low_rank(stored, left, right, 7, scale)
            sums = add_low_rank(to_float(stored), left, right, 7, scale)
            expected = to_dtype(sums, dtype)
        assert found.dtype == dtype
        np.testing.assert_array_equal(bits(found), bits(expected))


# --- counting ---------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.uint32, st.integers(0, 40)))
def test_halves_are_counted(keys: np.ndarray[Any, Any]) -> None:
    scores = keys.view(np.float32)
    upper = np.bincount(keys >> np.uint32(16), minlength=HALF)
    assert (count_halves(scores, None) == upper).all()
    for half in np.unique(keys >> np.uint32(16))[:3]:
        inside = keys[keys >> np.uint32(16) == half] & np.uint32(0xFFFF)
        assert (count_halves(scores, int(half)) == np.bincount(inside, minlength=HALF)).all()


@EACH
def test_read_only_blocks_are_taken(dtype: np.dtype[Any]) -> None:
    block = np.arange(5).astype(dtype)
    other = (block + block).astype(dtype)
    mask = np.arange(5) % 2 == 0
    expected = [to_float(block), choose(mask, block, other), magnitude_of_drift(block, other)]
    for array in (block, other, mask):
        array.flags.writeable = False
    found = [to_float(block), choose(mask, block, other), magnitude_of_drift(block, other)]
    assert all((a == b).all() for a, b in zip(found, expected, strict=True))
    assert count_different(block, other) == 4
    assert all_finite(block)
    wide = np.arange(5, dtype=np.float32)
    wide.flags.writeable = False
    assert (to_dtype(wide, dtype).astype("f8") == np.arange(5)).all()
    assert count_halves(wide, None).sum() == 5


# --- memory -----------------------------------------------------------------------------------


def test_memory_is_used_again_only_when_its_last_view_is_gone() -> None:
    first = empty(1 << 15, np.uint16)
    first[:] = 7
    address = first.ctypes.data
    part = first[5:9].view(np.uint8).data  # what `save` hands to the writer
    del first
    second = empty(1 << 15, np.uint16)
    assert second.ctypes.data != address
    second[:] = 0
    assert part.tolist() == [7, 0] * 4
    del part
    third = empty(1 << 14, np.float32)
    assert third.ctypes.data == address


@pytest.mark.parametrize("count", [0, 1, 1 << 14, 3 << 14, 1 << 23])
def test_memory_has_the_size_that_was_asked(count: int) -> None:
    block = empty(count, np.float32)
    assert block.shape == (count,)
    assert block.dtype == np.float32
    assert block.flags.writeable
    assert block.flags.c_contiguous
