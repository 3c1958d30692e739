"""The kernels of adapters: low-rank updates of a run of a matrix's elements."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from weightsurgery.buffers import empty
from weightsurgery.kernels import (
    Block,
    Lanes,
    jit,
    jit_with,
    store,
    to_dtype,
    to_float,
    value_of,
)

_COLUMNS = 1024  # of a row at a time: two sums and four rows of the right factor stay in the cache


@jit
def _add_rank(one: Lanes, two: Lanes, row: Lanes, sum1: Lanes, sum2: Lanes) -> None:
    for i in range(row.size):
        sum1[i] += one * row[i]
        sum2[i] += two * row[i]


@jit
def _add_four_ranks(
    one: Lanes, two: Lanes, rows: tuple[Lanes, Lanes, Lanes, Lanes], sum1: Lanes, sum2: Lanes
) -> None:
    a1, b1, c1, d1 = one[0], one[1], one[2], one[3]
    a2, b2, c2, d2 = two[0], two[1], two[2], two[3]
    row0, row1, row2, row3 = rows
    for i in range(row0.size):
        w, x, y, z = row0[i], row1[i], row2[i], row3[i]
        sum1[i] += (a1 * w + b1 * x) + (c1 * y + d1 * z)
        sum2[i] += (a2 * w + b2 * x) + (c2 * y + d2 * z)


@jit
def _add_scaled(values: Lanes, scale: Lanes, product: Lanes, out: Lanes) -> None:
    for i in range(values.size):
        store(out, i, value_of(values[i]) + scale * product[i])


@jit
def _products(
    one: Lanes, two: Lanes, right: Lanes, first: int, last: int, sum1: Lanes, sum2: Lanes
) -> None:
    """One @ right[:, first:last] and two @ the same: each number of `right` is read once."""
    sum1[:], sum2[:] = 0, 0
    whole = one.size // 4 * 4
    for k in range(0, whole, 4):
        rows = (
            right[k, first:last],
            right[k + 1, first:last],
            right[k + 2, first:last],
            right[k + 3, first:last],
        )
        _add_four_ranks(one[k : k + 4], two[k : k + 4], rows, sum1, sum2)
    for k in range(whole, one.size):
        _add_rank(one[k], two[k], right[k, first:last], sum1, sum2)


@jit
def _add(
    values: Lanes, left: Lanes, right: Lanes, rows: int, start: int, scale: Lanes, out: Lanes
) -> None:
    width = right.shape[2]
    sums = np.empty((2, _COLUMNS), left.dtype)
    done = 0
    while done < out.size:
        row, begin = (start + done) // width, (start + done) % width
        end = min(width, begin + out.size - done)
        matrix = row // rows
        # A row that is not whole, or the last, has no partner but itself.
        paired = begin == 0 and out.size - done >= 2 * width and (row + 1) // rows == matrix
        other, ahead = (row + 1, width) if paired else (row, 0)
        for first in range(begin, end, _COLUMNS):
            last = min(end, first + _COLUMNS)
            sum1, sum2 = sums[0, : last - first], sums[1, : last - first]
            _products(left[row], left[other], right[matrix], first, last, sum1, sum2)
            i, j = done + first - begin, done + last - begin
            _add_scaled(values[i:j], scale, sum1, out[i:j])
            if paired:
                i, j = i + ahead, j + ahead
                _add_scaled(values[i:j], scale, sum2, out[i:j])
        done += end - begin + ahead


def add_low_rank(values: Block, left: Block, right: Block, start: int, scale: float) -> Block:
    """Values + scale · (left @ right), for a run of the elements, matrix after matrix.

    Args:
        values: Elements from `start` on, float32 or float64.
        left: All rows of all matrices, shape (matrices × rows, rank), of the same dtype.
        right: Shape (matrices, rank, columns), of the same dtype.
        start: Index of the first element.
        scale: Of the product.

    Returns:
        The sums, in the same dtype; each product is summed in it in one fixed order, scaled, and
        added once.
    """
    out = empty(values.size, values.dtype)
    _add(values, left, right, _rows(left, right), start, values.dtype.type(scale), out)
    return out


def merge_low_rank(stored: Block, left: Block, right: Block, start: int, scale: float) -> Block:
    """The same sum of stored elements, rounded once to their dtype.

    Args:
        stored: Elements from `start` on, of any floating dtype.
        left: As for `add_low_rank`, float32 (float64 for F64).
        right: As for `add_low_rank`, of the same dtype.
        start: Index of the first element.
        scale: Of the product.

    Returns:
        What `to_dtype(add_low_rank(to_float(stored), ...), stored.dtype)` gives, in one pass
        for BF16.
    """
    if stored.dtype != ml_dtypes.bfloat16:
        return to_dtype(add_low_rank(to_float(stored), left, right, start, scale), stored.dtype)
    out = empty(stored.size, stored.dtype)
    bits = stored.view(np.uint16), out.view(np.uint16)
    _add(bits[0], left, right, _rows(left, right), start, left.dtype.type(scale), bits[1])
    return out


def _rows(left: Block, right: Block) -> int:
    """Rows of one matrix of a stack."""
    return max(1, int(left.shape[0]) // int(right.shape[0]))


@jit
def _squares(values: Lanes, start: int, width: int, by_column: bool, out: Lanes) -> None:
    for i in range(values.size):
        x = np.float64(values[i])
        place = (start + i) % width if by_column else (start % width + i) // width
        out[place] += x * x


def squared_lines(values: Block, start: int, width: int, *, by_column: bool) -> Block:
    """Sum of squares of each row that a run of a matrix touches, or of each column; float64.

    Args:
        values: Elements from `start` on, float32 or float64.
        start: Index of the first element in the matrix.
        width: Elements in a row.
        by_column: Sum over columns in place of rows; the result then has one for each column.
    """
    rows = (start % width + values.size + width - 1) // width
    out = np.zeros(width if by_column else rows)
    _squares(values, start, width, by_column, out)
    return out


# The bits of numbers that are not negative order like the numbers, with NaN above all: a maximum
# of bits runs in vector lanes and does not lose a NaN.


@jit
def _largest_change(before: Lanes, expected: Lanes) -> Any:
    largest = np.uint32(0)
    for i in range(before.size):
        largest = max(largest, np.float32(abs(expected[i] - before[i])).view(np.uint32))
    return largest


@jit_with(fastmath={"reassoc", "contract"})  # sums in vector lanes
def _residuals(
    before: Lanes,
    expected: Lanes,
    after: Lanes,
    half: float,
    order: float,
    floor: float,
    sums: Lanes,
) -> Any:
    change2, actual2, both, left2, allowed2, moved = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    worst = np.int64(0)
    for i in range(before.size):
        b, e, a = np.float64(before[i]), np.float64(expected[i]), np.float64(after[i])
        change, actual, left = e - b, a - b, abs(a - e)
        # The sum's rounding and the change's; then what sums in another order differ.
        allowed = half * (abs(e) + abs(change)) + order * (abs(b) + abs(e)) + floor
        change2 += change * change
        actual2 += actual * actual
        both += change * actual
        left2 += left * left
        allowed2 += allowed * allowed
        worst = max(worst, np.float64(abs(left / allowed)).view(np.int64))
        moved += 1.0 if a != b else 0.0
    sums[0], sums[1], sums[2], sums[3] = change2, actual2, both, left2
    sums[4], sums[6] = allowed2, moved
    return worst


def residual_sums(
    before: Block, expected: Block, after: Block, half: float, smallest: float
) -> Block:
    """What is left of a merge when the expected one is taken away.

    Args:
        before: Block of the base, float32 or float64.
        expected: What the merge should give, before rounding.
        after: What it gave.
        half: Half a rounding step of the stored dtype, relative.
        smallest: The same for numbers next to zero, absolute.

    Returns:
        float64: Σ change², Σ actual², Σ change · actual, Σ residual², Σ tolerance², the largest
        residual in tolerances (NaN where there is one), and the number of elements that moved.
    """
    sums = np.zeros(7)
    largest = np.uint32(_largest_change(before, expected)).view(np.float32)
    floor = smallest + 2.0**-20 * float(largest)
    order = 4 * float(np.finfo(before.dtype).epsneg)
    worst = _residuals(before, expected, after, half, order, floor, sums)
    sums[5] = np.int64(worst).view(np.float64)
    if not np.isfinite(sums).all():
        sums[5] = np.nan
    return sums
