"""Counter-based random numbers: a pure function of (seed, tensor name, element index).

Element i of a tensor takes one 32-bit half of `mix(key + (i // 2 + 1)·γ)`, where `mix` and γ are
those of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014) and `key` is the BLAKE2b hash of seed and name. Nothing is carried from one element
to the next, so the order of the tensors, the sharding and the number of workers cannot matter.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightsurgery.buffers import empty
from weightsurgery.kernels import jit


def key_of(seed: int, name: str) -> np.uint64:
    """The 64-bit key of a tensor's stream."""
    text = f"{seed}\0{name}".encode("utf-8", "surrogatepass")
    return np.uint64(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))


@jit
def _mix(key: Any, pair: Any) -> Any:
    z = key + np.uint64(pair + 1) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@jit
def _fill(key: Any, first: int, out: Any) -> None:
    for i in range(out.size):
        out[i] = _mix(key, first + i)


@jit
def _fill_mask(key: Any, first: int, bound: Any, out: Any) -> None:
    for i in range(out.size // 2):
        z = _mix(key, first + i)
        out[2 * i] = (z & np.uint64(0xFFFFFFFF)) < bound
        out[2 * i + 1] = (z >> np.uint64(32)) < bound


def random_bits(seed: int, name: str, start: int, count: int) -> NDArray[np.uint32]:
    """32 random bits for each of the elements [start, start + count) of a tensor.

    Example:
        >>> whole = random_bits(7, "w", 0, 10)
        >>> bool((random_bits(7, "w", 3, 4) == whole[3:7]).all())
        True
    """
    first, lead, pairs = _pairs(start, count)
    out = empty(pairs, np.uint64)
    _fill(key_of(seed, name), first, out)
    return out.view("<u4")[lead : lead + count]


def _pairs(start: int, count: int) -> tuple[int, int, int]:
    """First pair, elements of it to drop, and number of pairs that cover a run of elements."""
    return start // 2, start % 2, (start % 2 + count + 1) // 2


def random_mask(seed: int, name: str, start: int, count: int, share: float) -> NDArray[np.bool_]:
    """Each element independently True with probability `share`, to a resolution of 2**-32.

    Masks are nested: what is True at one share is True at every larger one.

    Args:
        seed: Any integer.
        name: The tensor's name.
        start: Index of the first element, in row-major order.
        count: Number of elements.
        share: Probability, 0 to 1; 0 gives no True and 1 nothing else.

    Returns:
        Boolean array of shape (count,).
    """
    bound = round(share * 2.0**32)
    first, lead, pairs = _pairs(start, count)
    mask = empty(2 * pairs, np.bool_)
    _fill_mask(key_of(seed, name), first, np.uint64(bound), mask)
    return mask[lead : lead + count]
