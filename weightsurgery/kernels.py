"""Fused single-pass loops over blocks: arrays in, arrays out; no names, no files.

All kernels take C-contiguous one-dimensional arrays, release the interpreter lock, and are
compiled once per machine (numba caches the machine code beside this file, or in the user's cache
directory when this one is read-only). Loops are cut into chunks of `CHUNK` elements that stay in
the first-level cache, and sums go to float64 at the end of each chunk, so their rounding does not
grow with the size of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import ml_dtypes
import numba
import numpy as np
from numba.extending import overload
from numpy.typing import NDArray

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
        out = np.empty(block.shape, np.float32)
        _widen(block.reshape(-1).view(np.uint16), out.reshape(-1).view(np.uint32))
        return out
    return block.astype(np.float32) if block.dtype == np.float16 else block


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
    if dtype == ml_dtypes.bfloat16 and values.dtype == np.float32:
        out = np.empty(values.shape, dtype)
        _narrow(values.reshape(-1).view(np.uint32), out.reshape(-1).view(np.uint16))
        return out
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(dtype)


def _bits(block: Block) -> Block:
    return block.reshape(-1).view(f"u{block.dtype.itemsize}")


def same_float(base: Block, tuned: Block) -> tuple[Block, Block]:
    """Both blocks in the wider of the types their arithmetic is done in."""
    base, tuned = to_float(base), to_float(tuned)
    wide = np.result_type(base, tuned)
    return base.astype(wide, copy=False), tuned.astype(wide, copy=False)


def magnitude_of_drift(base: Block, tuned: Block) -> Block:
    """|tuned - base| as float32."""
    base, tuned = same_float(base, tuned)
    return to_dtype(np.abs(tuned - base), np.dtype(np.float32))


# --- selection --------------------------------------------------------------------------------


@jit
def _choose(mask: Lanes, chosen: Lanes, other: Lanes, out: Lanes) -> None:
    for i in range(mask.size):
        out[i] = chosen[i] if mask[i] else other[i]


def choose(mask: Block, chosen: Block, other: Block) -> Block:
    """`np.where(mask, chosen, other)` on the stored bits, in the dtype of `other`.

    Where `chosen` has another dtype its values are rounded once to that of `other`.
    """
    chosen = to_dtype(to_float(chosen), other.dtype) if chosen.dtype != other.dtype else chosen
    out = np.empty_like(other)
    _choose(mask.reshape(-1), _bits(chosen), _bits(other), _bits(out))
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


@jit
def _histogram(keys: Lanes, shift: int, prefix: int, counts: Lanes) -> None:
    # prefix < 0: count the bits above `shift`; else the bits below, where those above match.
    width = np.uint32(shift)
    low = np.uint32((1 << shift) - 1)
    for i in range(keys.size):
        if prefix < 0:
            counts[keys[i] >> width] += 1
        elif keys[i] >> width == np.uint32(prefix):
            counts[keys[i] & low] += 1


def histogram(scores: Block, shift: int, prefix: int, counts: Block) -> None:
    """Count non-negative float32 scores by their bit patterns, which order like the numbers.

    Args:
        scores: float32, finite, no negative zero.
        shift: Number of low bits.
        prefix: -1 to count the high bits, else count the low bits of the scores whose high bits
            are `prefix`.
        counts: int64 accumulator, changed in place.
    """
    _histogram(scores.view(np.uint32), shift, prefix, counts)


# --- drift statistics -------------------------------------------------------------------------

# Where each total lies in the array that `drift_statistics` returns.
TOTALS = (
    *("sum", "drift2", "base2", "tuned2", "dot", "sign_flips", "changed", "largest"),
    *("base_nan", "base_inf", "tuned_nan", "tuned_inf", "skipped"),
)
_DRIFT2, _CHANGED, _LARGEST = 1, 6, 7
_BASE_NAN, _BASE_INF, _TUNED_NAN, _TUNED_INF, _SKIPPED = range(8, 13)


def _value(x):  # type: ignore[no-untyped-def]  # numba wants both signatures equal, and bare
    """One stored element as a number."""
    return x


@overload(_value)
def _value_compiled(x):  # type: ignore[no-untyped-def]
    if x == numba.types.uint16:  # BF16: the upper half of a float32
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


@jit
def _load(base: Lanes, tuned: Lanes, x: Lanes, y: Lanes, drift: Lanes) -> None:
    for i in range(base.size):
        x[i] = _value(base[i])
        y[i] = _value(tuned[i])
        drift[i] = y[i] - x[i]


@jit_with(fastmath={"reassoc", "contract", "nsz"})  # lets sums run in vector lanes; NaN stays NaN
def _sums(x: Lanes, y: Lanes, drift: Lanes) -> tuple[float, float, float, float, float, float]:
    total = drift2 = base2 = tuned2 = dot = flips = 0.0
    for i in range(drift.size):
        a, b, d = np.float64(x[i]), np.float64(y[i]), np.float64(drift[i])
        total += d
        drift2 += d * d
        base2 += a * a
        tuned2 += b * b
        dot += a * b
        flips += 1.0 if ((a < 0.0) & (b > 0.0)) | ((a > 0.0) & (b < 0.0)) else 0.0
    return total, drift2, base2, tuned2, dot, flips


@jit
def _magnitudes(drift: Lanes, mask: int, magnitude: Lanes) -> int:
    # On bits: non-negative numbers order like their bit patterns, and integers run in lanes.
    largest = mask & magnitude.dtype.type(0)
    for i in range(drift.size):
        bits = drift[i] & mask
        magnitude[i] = bits
        largest = max(largest, bits)
    return largest


@jit
def _drop_nonfinite(x: Lanes, y: Lanes, drift: Lanes, totals: Lanes) -> int:
    dropped = np.uint32(0)
    for i in range(drift.size):
        totals[_BASE_NAN] += np.isnan(x[i])
        totals[_BASE_INF] += np.isinf(x[i])
        totals[_TUNED_NAN] += np.isnan(y[i])
        totals[_TUNED_INF] += np.isinf(y[i])
        if not np.isfinite(drift[i]):
            dropped += np.uint32(1)
            x[i] = y[i] = drift[i] = 0
    totals[_SKIPPED] += dropped
    return dropped


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
def _add_bins(magnitude: Lanes, bins: Lanes) -> None:
    # Four counters in turn: the next increment need not wait for the store of the last.
    whole = magnitude.size // 4 * 4
    for i in range(0, whole, 4):
        bins[0, _bin(magnitude[i])] += np.uint32(1)
        bins[1, _bin(magnitude[i + 1])] += np.uint32(1)
        bins[2, _bin(magnitude[i + 2])] += np.uint32(1)
        bins[3, _bin(magnitude[i + 3])] += np.uint32(1)
    for i in range(whole, magnitude.size):
        bins[0, _bin(magnitude[i])] += np.uint32(1)


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
def _add_columns(drift: Lanes, columns: Lanes) -> None:
    for i in range(drift.size):
        columns[i] += np.float64(drift[i]) * np.float64(drift[i])


@jit
def _drift_statistics(
    base: Lanes,
    tuned: Lanes,
    scratch: Lanes,
    bits: Lanes,
    mask: int,
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
            x, y, drift = scratch[0, :size], scratch[1, :size], scratch[2, :size]
            _load(base[part], tuned[part], x, y, drift)
            sums = _sums(x, y, drift)
            if not np.isfinite(sums[1] + sums[2] + sums[3]):
                bins[0, 0] -= _drop_nonfinite(x, y, drift, totals)
                sums = _sums(x, y, drift)
            for i in range(len(sums)):
                totals[i] += sums[i]
            rows[row] += sums[_DRIFT2]
            totals[_CHANGED] += _count_chunk(base[part], tuned[part])
            bits[4, 0] = _magnitudes(bits[2, :size], mask, bits[3, :size])
            largest = scratch[4, 0]
            totals[_LARGEST] = max(totals[_LARGEST], largest)
            _add_bins(bits[3, :size], bins)
            if values.size and largest > values[values.size - 1]:
                _keep_largest(scratch[3, :size], start, values, places)
            if columns.size:
                _add_columns(drift, columns[start - row * width : stop - row * width])


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
    if base.dtype != tuned.dtype or base.dtype == np.float16:
        base, tuned = same_float(base, tuned)
    real = np.float64 if base.dtype == np.float64 else np.float32
    if base.dtype == ml_dtypes.bfloat16:
        base, tuned = base.view(np.uint16), tuned.view(np.uint16)
    totals, bins = np.zeros(len(TOTALS)), np.zeros((4, BINS), np.uint32)
    rows = np.zeros(base.size // width if width else 0)
    columns = np.zeros(width if by_column else 0)
    values, places = np.zeros(top), np.full(top, -1, np.int64)
    scratch = np.empty((5, CHUNK), real)  # base, tuned, drift, |drift|, its maximum
    bits = scratch.view(f"u{scratch.itemsize}")
    mask = bits.dtype.type(np.iinfo(bits.dtype).max >> 1)  # all but the sign
    _drift_statistics(
        *(base, tuned, scratch, bits, mask, width, totals, bins, rows, columns, values, places)
    )
    return totals, bins.sum(0, dtype=np.int64), rows, columns, values, places
