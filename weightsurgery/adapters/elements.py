"""A run of merged elements beside what they should be: what rounding explains, and what is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from weightsurgery.adapters.updates import Update
from weightsurgery.kernels import Block, same_float, to_dtype, to_float
from weightsurgery.low_rank_kernel import residual_sums

_SURELY = 0.9  # of an element's change
_BF16, _F16, _F64 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float64)
_HALF_STEP = {_BF16: 2.0**-8, _F16: 2.0**-11, _F64: 2.0**-53}
_SMALLEST = {_BF16: 2.0**-134, _F16: 2.0**-25, _F64: 0.0}


def compare(
    before: Block,
    after: Block,
    start: int,
    updates: Sequence[Update],
    *,
    allow_nonfinite: bool = False,
) -> Block:
    """What a proof sums up over the blocks of a tensor.

    Args:
        before: Block of BASE.
        after: The same of MERGED.
        start: Index of the first element.
        updates: What adapters do to the tensor, in order.
        allow_nonfinite: NaN or infinity is right where it is expected.

    Returns:
        The seven numbers of `residual_sums`, and how many elements rounding cannot have left as
        they were, if all are.
    """
    half = _HALF_STEP.get(after.dtype, 2.0**-24)
    smallest = _SMALLEST.get(after.dtype, 2.0**-150)
    if before.dtype == after.dtype and not updates:  # untouched: bytes count, not values
        bits = f"u{before.dtype.itemsize}"
        different = int(np.count_nonzero(before.view(bits) != after.view(bits)))
        return np.array([0.0, 0.0, 0.0, 0.0, 0.0, np.inf if different else 0.0, different, 0.0])
    old, new = same_float(before, after)
    expected = to_float(before).astype(old.dtype, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        for update in updates:
            expected = update.apply(expected, start)
    given = old
    sums = residual_sums(old, expected, new, half, smallest)
    if allow_nonfinite and not np.isfinite(sums).all():
        old, expected, new = _without_alike(old, expected, new, after.dtype)
        sums = residual_sums(old, expected, new, half, smallest)
    if len(updates) > 1 and not sums[5] <= 1:
        room = _room_on_the_way(given, updates, start, half, smallest)
        sums[4:6] = _within(room, np.abs(new - expected))
    return np.append(sums, _count_due(old, expected, after.dtype) if sums[6] == 0 else 0.0)


def _room_on_the_way(
    values: Block, updates: Sequence[Update], start: int, half: float, smallest: float
) -> Block:
    """What rounding may leave of each element where the sum is rounded after every update.

    The terms are those of `residual_sums`, for each update: where updates cancel each other,
    what is rounded on the way is larger than the result.
    """
    order = 4 * float(np.finfo(values.dtype).epsneg)
    room = np.zeros(values.size)
    with np.errstate(over="ignore", invalid="ignore"):
        for update in updates:
            after = update.apply(values, start)
            change, both = np.abs(after - values), np.abs(values) + np.abs(after)
            largest = np.max(change, initial=0, where=np.isfinite(change))
            room += half * (np.abs(after) + change) + order * both + 2.0**-20 * largest + smallest
            values = after
    return room


def _within(room: Block, left: Block) -> tuple[float, float]:
    """Σ room², and the largest of what is left in rooms: NaN where there is one."""
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.divide(left, room, out=np.zeros_like(room), where=left != 0)
    return float(np.sum(np.where(left == 0, 0.0, room) ** 2)), float(np.max(shares, initial=0))


def _count_due(before: Block, expected: Block, dtype: np.dtype[Any]) -> int:
    """How many elements move by any rounding, with a tenth of their change to spare."""
    with np.errstate(over="ignore", invalid="ignore"):
        least = (before + _SURELY * (expected - before)).astype(before.dtype)
        return int(np.count_nonzero(to_float(to_dtype(least, dtype)) != before))


def _without_alike(
    old: Block, expected: Block, new: Block, dtype: np.dtype[Any]
) -> tuple[Block, Block, Block]:
    """The three with 0 wherever NaN or the same infinity is expected and found."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = to_float(to_dtype(expected, dtype)).astype(new.dtype, copy=False)
    found = np.where(np.isnan(rounded), np.isnan(new), rounded == new)
    alike = found & ~np.isfinite(rounded)
    zero = new.dtype.type(0)
    start = np.where(alike | ~np.isfinite(old), zero, old)  # what it is measured from; our choice
    return start, np.where(alike, zero, expected), np.where(alike, zero, new)
