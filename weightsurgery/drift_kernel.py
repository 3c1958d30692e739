"""The kernel of `diff`: every statistic of a pair of blocks in one pass.

Loops are cut into chunks of `CHUNK` elements that stay in the first-level cache; sums are taken in
the blocks' own precision within a chunk and in float64 over the chunks, so their rounding does
not grow with the size of a tensor.
"""

from __future__ import annotations

import numba
import numpy as np
from numba.extending import overload

from weightsurgery.buffers import empty
from weightsurgery.kernels import (
    CHUNK,
    Block,
    Lanes,
    bits_of,
    comparable,
    jit,
    jit_with,
    value_of,
)

BIN_SHIFT = 18  # bins of |drift|: its float32 bits >> 18, so 8 exponent and 5 mantissa bits
BINS = 1 << (31 - BIN_SHIFT)
_ROOM = 512  # elements

# Where each total lies in the array that `drift_statistics` returns.
TOTALS = (
    *("sum", "drift2", "base2", "tuned2", "sign_flips", "changed", "largest"),
    *("base_nan", "base_inf", "tuned_nan", "tuned_inf", "skipped"),
)
_DRIFT2, _CHANGED, _LARGEST = 1, 5, 6
_LOW, _HIGH = 1e-30, 1e30  # sums of squares that float32 holds without loss
_BASE_NAN, _BASE_INF, _TUNED_NAN, _TUNED_INF, _SKIPPED = range(7, 12)


@jit_with(forceinline=True)
def _peak(bits: Lanes) -> int:
    # On bits: non-negative numbers order like their bit patterns, and integers run in lanes.
    largest = bits[0]
    for i in range(bits.size):
        largest = max(largest, bits[i])
    return largest


@jit_with(forceinline=True)
def _is_safe(total: Lanes, bits: Lanes) -> bool:
    """Whether a sum of squares is exact enough; nothing is lost in a sum of zeros alone."""
    return _LOW < total < _HIGH or (total == 0 and _peak(bits) == 0)


def _signs_differ(x, y):  # type: ignore[no-untyped-def]  # numba wants both signatures equal
    """Whether the first bits of two stored elements differ."""
    return (x ^ y) >> (8 * x.itemsize - 1) != 0


@overload(_signs_differ)
def _signs_differ_compiled(x, y):  # type: ignore[no-untyped-def]  # noqa: ARG001
    # Signed and of the width of the numbers: other ways to ask do not run in lanes, or slower.
    if x == numba.types.uint16:
        return lambda x, y: np.int32((np.uint32(x) ^ np.uint32(y)) << np.uint32(16)) < 0
    signed = np.int32 if x == numba.types.uint32 else np.int64
    return lambda x, y: signed(x ^ y) < 0


@jit_with(
    forceinline=True, fastmath={"reassoc", "contract", "nsz"}
)  # sums in vector lanes; NaN stays NaN
def _add_chunk(
    base: Lanes,
    tuned: Lanes,
    old: Lanes,
    new: Lanes,
    magnitude: Lanes,
    bits: Lanes,
    totals: Lanes,
) -> float:
    """Everything of one chunk in one loop, in the blocks' own precision."""
    zero, one = magnitude.dtype.type(0), magnitude.dtype.type(1)
    total = drift2 = base2 = tuned2 = flips = changed = zero
    for i in range(base.size):
        b, t = value_of(base[i]), value_of(tuned[i])
        d = t - b
        magnitude[i] = abs(d)
        total += d
        drift2 += d * d
        base2 += b * b
        tuned2 += t * t
        flips += one if _signs_differ(old[i], new[i]) & (b != zero) & (t != zero) else zero
        changed += one if old[i] != new[i] else zero  # bits: NaN equals itself, 0.0 is not -0.0
    totals[_CHANGED] += changed
    if not (_is_safe(base2, old) and _is_safe(tuned2, new) and _is_safe(drift2, bits)):
        return np.nan
    totals[0] += total
    totals[_DRIFT2] += drift2
    totals[2] += base2
    totals[3] += tuned2
    totals[4] += flips
    return drift2


@jit
def _add_chunk_carefully(base: Lanes, tuned: Lanes, magnitude: Lanes, totals: Lanes) -> float:
    """The same for a chunk whose squares leave the range of its precision, or are not finite."""
    drift2 = 0.0
    for i in range(base.size):
        raw_b, raw_t = value_of(base[i]), value_of(tuned[i])
        b, t = np.float64(raw_b), np.float64(raw_t)
        totals[_BASE_NAN] += np.isnan(b)
        totals[_BASE_INF] += np.isinf(b)
        totals[_TUNED_NAN] += np.isnan(t)
        totals[_TUNED_INF] += np.isinf(t)
        if not np.isfinite(raw_t - raw_b):
            totals[_SKIPPED] += 1
            magnitude[i] = 0
            continue
        d = np.float64(raw_t - raw_b)
        totals[0] += d
        drift2 += d * d
        totals[2] += b * b
        totals[3] += t * t
        totals[4] += (b < 0.0 and t > 0.0) or (b > 0.0 and t < 0.0)
    totals[_DRIFT2] += drift2
    return drift2


def _bin(bits):  # type: ignore[no-untyped-def]
    """The histogram bin of a magnitude given by its bits."""
    return np.float32(bits.view(f"f{bits.itemsize}")).view(np.uint32) >> BIN_SHIFT


@overload(_bin)
def _bin_compiled(bits):  # type: ignore[no-untyped-def]
    if bits == numba.types.uint32:
        return lambda bits: bits >> np.uint32(BIN_SHIFT)
    return lambda bits: (
        np.float32(np.uint64(bits).view(np.float64)).view(np.uint32) >> np.uint32(BIN_SHIFT)
    )


@jit_with(forceinline=True)
def _add_bins(bits: Lanes, bins0: Lanes, bins1: Lanes, bins2: Lanes, bins3: Lanes) -> None:
    # Four counters in turn: the next increment need not wait for the store of the last.
    whole = bits.size // 4 * 4
    for i in range(0, whole, 4):
        bins0[_bin(bits[i])] += np.uint32(1)
        bins1[_bin(bits[i + 1])] += np.uint32(1)
        bins2[_bin(bits[i + 2])] += np.uint32(1)
        bins3[_bin(bits[i + 3])] += np.uint32(1)
    for i in range(whole, bits.size):
        bins0[_bin(bits[i])] += np.uint32(1)


@jit
def _keep_largest(magnitude: Lanes, first: int, values: Lanes, places: Lanes) -> None:
    last = values.size - 1
    for i in range(magnitude.size):
        if magnitude[i] > values[last]:  # not >=: of equal drifts the first in the tensor stays
            j = last
            while j > 0 and values[j - 1] < magnitude[i]:
                values[j] = values[j - 1]
                places[j] = places[j - 1]
                j -= 1
            values[j] = magnitude[i]
            places[j] = first + i


@jit_with(forceinline=True, fastmath={"contract"})
def _add_columns(magnitude: Lanes, columns: Lanes) -> None:
    for i in range(magnitude.size):
        columns[i] += np.float64(magnitude[i]) * np.float64(magnitude[i])


@jit
def _drift_statistics(
    base: Lanes,
    tuned: Lanes,
    old: Lanes,
    new: Lanes,
    magnitude: Lanes,
    bits: Lanes,
    width: int,
    totals: Lanes,
    bins: Lanes,
    histogram: Lanes,
    rows: Lanes,
    columns: Lanes,
    values: Lanes,
    places: Lanes,
) -> None:
    for row in range(rows.size):
        for start in range(row * width, (row + 1) * width, CHUNK):
            stop = min(start + CHUNK, (row + 1) * width)
            part, size = slice(start, stop), stop - start
            drift2 = _add_chunk(
                base[part],
                tuned[part],
                old[part],
                new[part],
                magnitude[:size],
                bits[:size],
                totals,
            )
            if np.isnan(drift2):
                drift2 = _add_chunk_carefully(base[part], tuned[part], magnitude[:size], totals)
            rows[row] += drift2
            bits[CHUNK] = _peak(bits[:size])
            if bits[CHUNK] == 0:  # nothing moved in this chunk
                bins[0, 0] += np.uint32(size)
                continue
            largest = magnitude[CHUNK]
            totals[_LARGEST] = max(totals[_LARGEST], largest)
            _add_bins(bits[:size], bins[0], bins[1], bins[2], bins[3])
            if values.size and largest > values[values.size - 1]:
                _keep_largest(magnitude[:size], start, values, places)
            if columns.size:
                _add_columns(magnitude[:size], columns[start - row * width : stop - row * width])
    for i in range(histogram.size):
        for counter in range(bins.shape[0]):
            histogram[i] += np.int64(bins[counter, i])
    histogram[0] -= np.int64(totals[_SKIPPED])  # they were counted as zero


def drift_statistics(
    base: Block, tuned: Block, *, width: int, top: int, by_column: bool
) -> tuple[Block, Block, Block, Block, Block, Block]:
    """Everything `diff` wants of one pair of blocks, in one pass.

    Pairs whose drift is not finite are counted (`skipped`) and left out of every sum.

    Args:
        base: Block of the base tensor, any arithmetic dtype.
        tuned: The same elements of the tuned tensor.
        width: Elements in a row; divides the size of the block.
        top: How many of the largest drifts to keep.
        by_column: Whether to sum over the columns too.

    Returns:
        totals (float64, as named in `TOTALS`), histogram of |drift| (int64, `BINS`), sum of
        squared drift by row and by column (float64), and the `top` largest |drift| in falling
        order with their places in the block (-1 where there are fewer).
    """
    same = base.dtype == tuned.dtype
    old, new = bits_of(base), bits_of(tuned)
    base, tuned = comparable(base, tuned)
    if not same:  # there are no stored bits to compare: compare the values'
        old, new = bits_of(base), bits_of(tuned)
    real = np.float64 if base.dtype == np.float64 else np.float32
    totals = np.zeros(len(TOTALS))
    # 16 more, or equal bins of the four counters share their address bits and wait on each other.
    bins, histogram = empty(4 * (BINS + 16), np.uint32).reshape(4, -1), np.zeros(BINS, np.int64)
    bins[:] = 0
    rows = np.zeros(base.size // width if width else 0)
    columns = np.zeros(width if by_column else 0)
    values, places = np.zeros(top), np.full(top, -1, np.int64)
    # Room on both sides: the compiled loop compares addresses, and sums in lanes or not where
    # arrays lie close together, which would make the last bits a matter of chance.
    magnitude = np.empty(_ROOM + CHUNK + 1 + _ROOM, real)[_ROOM:-_ROOM]
    bits = magnitude.view(f"u{magnitude.itemsize}")  # its last place serves to read a peak
    _drift_statistics(
        *(base, tuned, old, new, magnitude, bits, width),
        *(totals, bins, histogram, rows, columns, values, places),
    )
    return totals, histogram, rows, columns, values, places
