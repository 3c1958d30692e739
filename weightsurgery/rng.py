"""Counter-based random numbers: a pure function of (seed, tensor name, element index).

Element i of a tensor takes one 32-bit half of `mix(key + (i // 2 + 1)·γ)`, where `mix` and γ are
those of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014) and `key` is the BLAKE2b hash of seed and name. Nothing is carried from one element
to the next, so the order of the tensors, the sharding and the number of workers cannot matter.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from weightsurgery.kernels import jit


def key_of(seed: int, name: str) -> np.uint64:
    """The 64-bit key of a tensor's stream."""
    text = f"{seed}\0{name}".encode("utf-8", "surrogatepass")
    return np.uint64(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))


@jit
def _fill(key: np.uint64, start: int, out: NDArray[np.uint32]) -> None:
    first = start // 2
    for pair in range((out.size + 1) // 2):
        z = key + np.uint64(first + pair + 1) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
        out[2 * pair] = np.uint32(z)
        if 2 * pair + 1 < out.size:
            out[2 * pair + 1] = np.uint32(z >> np.uint64(32))


def random_bits(seed: int, name: str, start: int, count: int) -> NDArray[np.uint32]:
    """32 random bits for each of the elements [start, start + count) of a tensor.

    Example:
        >>> whole = random_bits(7, "w", 0, 10)
        >>> bool((random_bits(7, "w", 3, 4) == whole[3:7]).all())
        True
    """
    lead = start % 2  # streams advance by pairs: begin at the pair, drop its first half
    out = np.empty(count + lead, np.uint32)
    _fill(key_of(seed, name), start - lead, out)
    return out[lead:]


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
    if bound >= 2**32:
        return np.ones(count, np.bool_)
    return random_bits(seed, name, start, count) < np.uint32(bound)
