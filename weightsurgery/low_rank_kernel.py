"""The kernels of adapters: low-rank updates of a run of a matrix's elements."""

from __future__ import annotations

import numpy as np

from weightsurgery.buffers import empty
from weightsurgery.kernels import Block, Lanes, jit, jit_with

_COLUMNS = 1024  # of a row at a time: the sum and four rows of the right factor stay in the cache


@jit
def _row_segment(left: Lanes, right: Lanes, row: int, matrix: int, first: int, out: Lanes) -> None:
    """Out = left[row] @ right[matrix][:, first:], four ranks at a time, always in this order."""
    rank = left.shape[1]
    for c in range(out.size):
        out[c] = 0
    whole = rank // 4 * 4
    for k in range(0, whole, 4):
        a, b, c, d = left[row, k], left[row, k + 1], left[row, k + 2], left[row, k + 3]
        for i in range(out.size):
            j = first + i
            out[i] += (a * right[matrix, k, j] + b * right[matrix, k + 1, j]) + (
                c * right[matrix, k + 2, j] + d * right[matrix, k + 3, j]
            )
    for k in range(whole, rank):
        a = left[row, k]
        for i in range(out.size):
            out[i] += a * right[matrix, k, first + i]


@jit
def _add(
    values: Lanes, left: Lanes, right: Lanes, rows: int, start: int, scale: Lanes, out: Lanes
) -> None:
    width = right.shape[2]
    product = np.empty(_COLUMNS, left.dtype)
    done = 0
    while done < out.size:
        row, first = (start + done) // width, (start + done) % width
        count = min(_COLUMNS, width - first, out.size - done)
        _row_segment(left, right, row, row // rows, first, product[:count])
        for i in range(count):
            out[done + i] = values[done + i] + scale * product[i]
        done += count


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
    rows = max(1, left.shape[0] // right.shape[0])
    _add(values, left, right, rows, start, values.dtype.type(scale), out)
    return out


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


@jit_with(fastmath={"reassoc", "contract"})  # sums in vector lanes
def _largest_change(before: Lanes, expected: Lanes) -> float:
    largest = np.float32(0)
    for i in range(before.size):
        largest = max(largest, np.float32(abs(expected[i] - before[i])))
    return float(largest)


@jit_with(fastmath={"reassoc", "contract"})
def _residuals(
    before: Lanes, expected: Lanes, after: Lanes, half: float, floor: float, sums: Lanes
) -> None:
    change2, actual2, both, left2, allowed2, worst, moved = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(before.size):
        b, e, a = np.float64(before[i]), np.float64(expected[i]), np.float64(after[i])
        change, actual, left = e - b, a - b, abs(a - e)
        # The sum's rounding and the change's; then what sums of float32 in another order differ.
        allowed = half * (abs(e) + abs(change)) + 2.0**-22 * (abs(b) + abs(e)) + floor
        change2 += change * change
        actual2 += actual * actual
        both += change * actual
        left2 += left * left
        allowed2 += allowed * allowed
        worst = max(worst, left / allowed)
        moved += 1.0 if a != b else 0.0
    sums[0], sums[1], sums[2], sums[3] = change2, actual2, both, left2
    sums[4], sums[5], sums[6] = allowed2, worst, moved


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
    floor = smallest + 2.0**-20 * float(_largest_change(before, expected))
    _residuals(before, expected, after, half, floor, sums)
    if not np.isfinite(sums).all():  # a maximum does not see NaN
        sums[5] = np.nan
    return sums
