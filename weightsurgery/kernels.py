"""Fused single-pass loops over blocks: arrays in, arrays out; no names, no files.

All kernels take C-contiguous one-dimensional arrays, release the interpreter lock, and are
compiled once per machine (numba caches the machine code beside this file, or in the user's cache
directory when this one is read-only).
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

CHUNK = 2048  # elements that stay in the first-level cache


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
def bfloat16_bits(x: Any) -> Any:
    """The bits of a float32, given by its own, rounded to BF16; for compiled loops."""
    # Round to nearest, ties to even; a NaN must not be rounded into infinity.
    rounded = (x + np.uint32(0x7FFF) + ((x >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    nan = (x & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16((x >> np.uint32(16)) | np.uint32(0x40)) if nan else np.uint16(rounded)


@jit
def _narrow(bits: Lanes, out: Lanes) -> None:
    for i in range(bits.size):
        out[i] = bfloat16_bits(bits[i])


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


def bits_of(block: Block) -> Block:
    """The stored bits of a block, flat, as unsigned integers of the same size."""
    return block.reshape(-1).view(f"u{block.dtype.itemsize}")


def value_of(x):  # type: ignore[no-untyped-def]  # numba wants both signatures equal, and bare
    """One stored element as a number."""
    return x


@overload(value_of)
def _value_of_compiled(x):  # type: ignore[no-untyped-def]
    if x == numba.types.uint16:  # BF16: the upper half of a float32
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


def store(out, i, x):  # type: ignore[no-untyped-def]
    """Put a number among stored elements; BF16, given by its bits, rounds a float32 once."""
    out[i] = x


@overload(store)
def _store_compiled(out, i, x):  # type: ignore[no-untyped-def]  # noqa: ARG001
    if out.dtype == numba.types.uint16:

        def store_rounded(out, i, x):  # type: ignore[no-untyped-def]
            out[i] = bfloat16_bits(np.float32(x).view(np.uint32))

        return store_rounded

    def store_number(out, i, x):  # type: ignore[no-untyped-def]
        out[i] = x

    return store_number


def comparable(base: Block, tuned: Block) -> tuple[Block, Block]:
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
        out[i] = abs(value_of(tuned[i]) - value_of(base[i]))


def magnitude_of_drift(base: Block, tuned: Block) -> Block:
    """|tuned - base| as float32."""
    base, tuned = comparable(base, tuned)
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
    _choose(mask.reshape(-1).view(np.uint8), bits_of(chosen), bits_of(other), bits_of(out))
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
    return 0 if a is b else int(_count_different(bits_of(a), bits_of(b)))


@jit
def _carries(words: Lanes, exponent: int, step: int) -> int:
    seen = np.uint64(0)
    for i in range(words.size):
        seen |= (words[i] & np.uint64(exponent)) + np.uint64(step)
    return seen


_EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000, "float64": 0x7FF << 52}


def all_finite(block: Block) -> bool:
    """True if a block of F16, BF16, F32 or F64 holds neither NaN nor infinity."""
    exponent, bits = _EXPONENTS[block.dtype.name], bits_of(block)
    step = exponent & -exponent  # added to an exponent of ones alone it carries to the sign's bit
    # Several elements in a word of 64 bits; numba would widen smaller integers one by one.
    size = 8 * bits.itemsize
    each = sum(1 << place for place in range(0, 64, size))
    whole = bits.size - bits.size % (64 // size)
    carried = _carries(bits[:whole].view(np.uint64), exponent * each, step * each)
    rest = bits[whole:] & bits.dtype.type(exponent)
    return int(carried) & (each << (size - 1)) == 0 and not (rest == exponent).any()


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
    counts = empty(4 * (HALF + 16), np.uint32).reshape(4, -1)  # 16 more: see drift_kernel.py
    counts[:] = 0
    if upper is None:
        _count_upper(keys, *counts)
    else:
        _count_lower(keys, np.uint32(upper), *counts)
    return counts[:, :HALF].sum(0, dtype=np.int64)
