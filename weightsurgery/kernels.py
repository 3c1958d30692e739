"""Fused single-pass loops over blocks: arrays in, arrays out; no names, no files.

All kernels take C-contiguous one-dimensional arrays, release the interpreter lock, and are
compiled once per machine (numba caches the machine code beside this file, or in the user's cache
directory when this one is read-only). Loops are cut into chunks of `CHUNK` elements that stay in
the first-level cache; sums are taken in the blocks' own precision within a chunk and in float64
over the chunks, so their rounding does not grow with the size of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import ml_dtypes
import numba
import numpy as np
from numba.extending import overload
from numpy.typing import NDArray

from weightsurgery.buffers import empty

Block = NDArray[Any]
Lanes = Any  # what compiled loops work on: numba has its own idea of types
Function = TypeVar("Function", bound=Callable[..., Any])

CHUNK = 2048
BIN_SHIFT = 18  # bins of |drift|: its float32 bits >> 18, so 8 exponent and 5 mantissa bits
BINS = 1 << (31 - BIN_SHIFT)


def jit_with(**options: Any) -> Callable[[Function], Function]:
    """`numba.njit` without the interpreter lock, cached on disk where that is possible."""
    options = {"nogil": True, "error_model": "numpy", **options}

    def compile_later(function: Function) -> Function:
        try:
            return cast(Function, numba.njit(cache=True, **options)(function))
        except RuntimeError:  # numba found no writable cache directory: compile in each process
            return cast(Function, numba.njit(**options)(function))

    return compile_later


jit = jit_with()


# --- dtypes -----------------------------------------------------------------------------------


@jit
def _widen(bits: Lanes, out: Lanes) -> None:
    for i in range(bits.size):
        out[i] = np.uint32(bits[i]) << np.uint32(16)


def to_float(block: Block) -> Block:
    """A block as float32, exactly (float64 for F64): what arithmetic is done in."""
    if block.dtype == ml_dtypes.bfloat16:
        out = empty(block.size, np.float32).reshape(block.shape)
        _widen(block.reshape(-1).view(np.uint16), out.reshape(-1).view(np.uint32))
        return out
    return _cast(block, np.float32) if block.dtype == np.float16 else block


def _cast(block: Block, dtype: Any) -> Block:
    # Overflow to infinity is right; and a signalling NaN is no reason to warn.
    with np.errstate(over="ignore", invalid="ignore"):
        return block.astype(dtype, copy=False)


@jit
def _narrow(bits: Lanes, out: Lanes) -> None:
    for i in range(bits.size):
        x = bits[i]
        # Round to nearest, ties to even; a NaN must not be rounded into infinity.
        rounded = (x + np.uint32(0x7FFF) + ((x >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        nan = (x & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        out[i] = np.uint16((x >> np.uint32(16)) | np.uint32(0x40)) if nan else np.uint16(rounded)


def to_dtype(values: Block, dtype: np.dtype[Any]) -> Block:
    """Values rounded once (to nearest, ties to even) to a stored dtype."""
    if values.dtype == dtype:
        return values
    if dtype == ml_dtypes.bfloat16:
        single = values if values.dtype == np.float32 else _round_to_odd(values)
        out = empty(values.size, dtype).reshape(values.shape)
        _narrow(single.reshape(-1).view(np.uint32), out.reshape(-1).view(np.uint16))
        return out
    return _cast(values, dtype)


def _round_to_odd(values: Block) -> Block:
    """float64 as float32, inexact ones with an odd last bit, so that rounding again is right."""
    single = _cast(values, np.float32)
    back, bits = single.astype(np.float64), single.view(np.uint32)
    bits -= np.abs(back) > np.abs(values)  # toward zero, one step; infinity becomes the largest
    bits |= (single.astype(np.float64) != values) & ~np.isnan(values)
    return single


def _bits(block: Block) -> Block:
    return block.reshape(-1).view(f"u{block.dtype.itemsize}")


def _value(x):  # type: ignore[no-untyped-def]  # numba wants both signatures equal, and bare
    """One stored element as a number."""
    return x


@overload(_value)
def _value_compiled(x):  # type: ignore[no-untyped-def]
    if x == numba.types.uint16:  # BF16: the upper half of a float32
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


def _comparable(base: Block, tuned: Block) -> tuple[Block, Block]:
    """Both blocks as compiled loops take them: BF16 by its bits, else of one float type."""
    if base.dtype != tuned.dtype or base.dtype == np.float16:
        base, tuned = same_float(base, tuned)
    if base.dtype == ml_dtypes.bfloat16:
        return base.view(np.uint16), tuned.view(np.uint16)
    return base, tuned


def same_float(base: Block, tuned: Block) -> tuple[Block, Block]:
    """Both blocks in the wider of the types their arithmetic is done in."""
    base, tuned = to_float(base), to_float(tuned)
    wide = np.result_type(base, tuned)
    return _cast(base, wide), _cast(tuned, wide)


@jit
def _subtract(base: Lanes, tuned: Lanes, out: Lanes) -> None:
    for i in range(base.size):
        out[i] = abs(_value(tuned[i]) - _value(base[i]))


def magnitude_of_drift(base: Block, tuned: Block) -> Block:
    """|tuned - base| as float32."""
    base, tuned = _comparable(base, tuned)
    out = empty(base.size, np.float32)
    _subtract(base.reshape(-1), tuned.reshape(-1), out)
    return out


# --- selection --------------------------------------------------------------------------------


@jit
def _choose(mask: Lanes, chosen: Lanes, other: Lanes, out: Lanes) -> None:
    for i in range(mask.size):
        a, b = chosen[i], other[i]  # both are read, so that the choice runs in vector lanes
        out[i] = a if mask[i] != 0 else b


def choose(mask: Block, chosen: Block, other: Block) -> Block:
    """`np.where(mask, chosen, other)` on the stored bits, in the dtype of `other`.

    Where `chosen` has another dtype its values are rounded once to that of `other`.
    """
    chosen = to_dtype(to_float(chosen), other.dtype) if chosen.dtype != other.dtype else chosen
    out = empty(other.size, other.dtype).reshape(other.shape)
    _choose(mask.reshape(-1).view(np.uint8), _bits(chosen), _bits(other), _bits(out))
    return out


@jit_with(fastmath={"reassoc"})  # float32 lanes count faster than integers, which numba widens
def _count_chunk(a: Lanes, b: Lanes) -> float:
    count = np.float32(0)
    for i in range(a.size):
        count += np.float32(1) if a[i] != b[i] else np.float32(0)
    return count


@jit
def _count_different(a: Lanes, b: Lanes) -> int:
    count = 0
    for start in range(0, a.size, CHUNK):
        count += int(_count_chunk(a[start : start + CHUNK], b[start : start + CHUNK]))
    return count


def count_different(a: Block, b: Block) -> int:
    """Number of elements whose stored bits differ; 0 if both are one array."""
    return 0 if a is b else int(_count_different(_bits(a), _bits(b)))


@jit
def _largest(bits: Lanes, magnitude: int) -> int:
    largest = bits.dtype.type(0)
    mask = bits.dtype.type(magnitude)
    for i in range(bits.size):
        largest = max(largest, bits[i] & mask)
    return largest


_INFINITY = {2: (0x7FFF, 0x7C00), 4: (0x7FFFFFFF, 0x7F800000), 8: (2**63 - 1, 0x7FF << 52)}


def all_finite(block: Block) -> bool:
    """True if a block of F16, BF16, F32 or F64 holds neither NaN nor infinity."""
    magnitude, infinity = _INFINITY[block.dtype.itemsize]
    if block.dtype == ml_dtypes.bfloat16:
        infinity = 0x7F80
    return int(_largest(_bits(block), magnitude)) < infinity


# --- order statistics -------------------------------------------------------------------------


HALF = 1 << 16  # values of the upper or the lower half of a float32's bits


@jit
def _count_upper(keys: Lanes, c0: Lanes, c1: Lanes, c2: Lanes, c3: Lanes) -> None:
    # Four counters in turn: the next increment need not wait for the store of the last.
    whole = keys.size // 4 * 4
    for i in range(0, whole, 4):
        c0[keys[i] >> np.uint32(16)] += np.uint32(1)
        c1[keys[i + 1] >> np.uint32(16)] += np.uint32(1)
        c2[keys[i + 2] >> np.uint32(16)] += np.uint32(1)
        c3[keys[i + 3] >> np.uint32(16)] += np.uint32(1)
    for i in range(whole, keys.size):
        c0[keys[i] >> np.uint32(16)] += np.uint32(1)


@jit
def _lower_bin(key: Lanes, upper: Any, other: Any) -> Any:
    # A choice, not a branch: which keys match is as good as random.
    return key & np.uint32(0xFFFF) if key >> np.uint32(16) == upper else other


@jit
def _count_lower(keys: Lanes, upper: Any, c0: Lanes, c1: Lanes, c2: Lanes, c3: Lanes) -> None:
    whole = keys.size // 4 * 4
    for i in range(0, whole, 4):
        other = np.uint32(HALF | (i >> 2 & 15))  # past the end, each time another place
        c0[_lower_bin(keys[i], upper, other)] += np.uint32(1)
        c1[_lower_bin(keys[i + 1], upper, other)] += np.uint32(1)
        c2[_lower_bin(keys[i + 2], upper, other)] += np.uint32(1)
        c3[_lower_bin(keys[i + 3], upper, other)] += np.uint32(1)
    for i in range(whole, keys.size):
        c0[_lower_bin(keys[i], upper, np.uint32(HALF))] += np.uint32(1)


def count_halves(scores: Block, upper: int | None) -> Block:
    """Count float32 scores by one half of their bits, which order like non-negative numbers.

    Args:
        scores: float32, without -0.0. NaN, infinity and negative numbers are counted too, in
            the bins from infinity's upwards.
        upper: None to count the upper halves, else count the lower halves of the scores whose
            upper half is this.

    Returns:
        int64 counts, `HALF` of them.
    """
    keys = scores.view(np.uint32)
    counts = empty(4 * (HALF + 16), np.uint32).reshape(4, -1)  # 16 more: see `drift_statistics`
    counts[:] = 0
    if upper is None:
        _count_upper(keys, *counts)
    else:
        _count_lower(keys, np.uint32(upper), *counts)
    return counts[:, :HALF].sum(0, dtype=np.int64)


# --- drift statistics -------------------------------------------------------------------------

# Where each total lies in the array that `drift_statistics` returns.
TOTALS = (
    *("sum", "drift2", "base2", "tuned2", "dot", "sign_flips", "changed", "largest"),
    *("base_nan", "base_inf", "tuned_nan", "tuned_inf", "skipped"),
)
_DRIFT2, _CHANGED, _LARGEST = 1, 6, 7
_LOW, _HIGH = 1e-30, 1e30  # sums of squares that float32 holds without loss
_BASE_NAN, _BASE_INF, _TUNED_NAN, _TUNED_INF, _SKIPPED = range(8, 13)


@jit_with(fastmath={"reassoc", "contract", "nsz"})  # sums in vector lanes; NaN stays NaN
def _add_chunk(
    base: Lanes, tuned: Lanes, old: Lanes, new: Lanes, magnitude: Lanes, totals: Lanes
) -> float:
    """Everything of one chunk in one loop, in the blocks' own precision."""
    zero, one = magnitude.dtype.type(0), magnitude.dtype.type(1)
    total = drift2 = base2 = tuned2 = dot = flips = changed = zero
    for i in range(base.size):
        b, t = _value(base[i]), _value(tuned[i])
        d = t - b
        magnitude[i] = abs(d)
        total += d
        drift2 += d * d
        base2 += b * b
        tuned2 += t * t
        dot += b * t
        flips += one if ((b < zero) & (t > zero)) | ((b > zero) & (t < zero)) else zero
        changed += one if old[i] != new[i] else zero  # bits: NaN equals itself, 0.0 is not -0.0
    totals[_CHANGED] += changed
    if not (_LOW < base2 < _HIGH and _LOW < tuned2 < _HIGH):
        return np.nan
    if not (drift2 == zero or _LOW < drift2 < _HIGH):
        return np.nan
    totals[0] += total
    totals[_DRIFT2] += drift2
    totals[2] += base2
    totals[3] += tuned2
    totals[4] += dot
    totals[5] += flips
    return drift2


@jit
def _add_chunk_carefully(base: Lanes, tuned: Lanes, magnitude: Lanes, totals: Lanes) -> float:
    """The same for a chunk whose squares leave the range of its precision, or are not finite."""
    drift2 = 0.0
    for i in range(base.size):
        raw_b, raw_t = _value(base[i]), _value(tuned[i])
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
        totals[4] += b * t
        totals[5] += (b < 0.0 and t > 0.0) or (b > 0.0 and t < 0.0)
    totals[_DRIFT2] += drift2
    return drift2


@jit
def _peak(bits: Lanes) -> int:
    # On bits: non-negative numbers order like their bit patterns, and integers run in lanes.
    largest = bits[0]
    for i in range(bits.size):
        largest = max(largest, bits[i])
    return largest


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


@jit
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


@jit
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
                base[part], tuned[part], old[part], new[part], magnitude[:size], totals
            )
            if np.isnan(drift2):
                drift2 = _add_chunk_carefully(base[part], tuned[part], magnitude[:size], totals)
            rows[row] += drift2
            if _peak(bits[:size]) == 0:  # nothing moved in this chunk
                bins[0, 0] += np.uint32(size)
                continue
            bits[CHUNK] = _peak(bits[:size])
            largest = magnitude[CHUNK]
            totals[_LARGEST] = max(totals[_LARGEST], largest)
            _add_bins(bits[:size], bins[0], bins[1], bins[2], bins[3])
            if values.size and largest > values[values.size - 1]:
                _keep_largest(magnitude[:size], start, values, places)
            if columns.size:
                _add_columns(magnitude[:size], columns[start - row * width : stop - row * width])


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
    old, new = _bits(base), _bits(tuned)
    base, tuned = _comparable(base, tuned)
    if not same:  # there are no stored bits to compare: compare the values'
        old, new = _bits(base), _bits(tuned)
    real = np.float64 if base.dtype == np.float64 else np.float32
    totals = np.zeros(len(TOTALS))
    # 16 more, or equal bins of the four counters share their address bits and wait on each other.
    bins = np.zeros((4, BINS + 16), np.uint32)
    rows = np.zeros(base.size // width if width else 0)
    columns = np.zeros(width if by_column else 0)
    values, places = np.zeros(top), np.full(top, -1, np.int64)
    magnitude = np.empty(CHUNK + 1, real)  # the last place serves to read a peak's bits
    bits = magnitude.view(f"u{magnitude.itemsize}")
    _drift_statistics(
        *(base, tuned, old, new, magnitude, bits, width),
        *(totals, bins, rows, columns, values, places),
    )
    histogram = bins[:, :BINS].sum(0, dtype=np.int64)
    histogram[0] -= int(totals[_SKIPPED])  # they were counted as zero
    return totals, histogram, rows, columns, values, places
