"""Exact global order statistics in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from weightsurgery.alignment import Pair
from weightsurgery.errors import NonFiniteError
from weightsurgery.kernels import HALF, Block, count_halves
from weightsurgery.stream import Engine, fold

_INFINITY = 0x7F80  # upper half of its bits; those of NaN and of negative numbers are above

Score = Callable[[Block, Block], Block]


def kth_largest(score: Score, pairs: Sequence[Pair], k: int, *, engine: Engine) -> float:
    """The k-th largest score over the eligible elements of all pairs, exactly.

    Non-negative float32 numbers order like their bit patterns. One pass counts the upper 16 bits,
    a second the lower 16 bits of the scores in the one bin that matters; memory is two
    histograms, whatever the model.

    Args:
        score: (base block, tuned block) to a fresh array of float32 scores, 0 or more.
        pairs: Where to look. Tied copies should be left out.
        k: 1 is the largest score, the number of eligible elements the smallest.
        engine: How to run the two passes.

    Returns:
        The score; +inf for k < 1, -inf for k beyond the number of elements.

    Raises:
        NonFiniteError: A score is NaN, infinite or negative.
    """
    if k < 1:
        return float("inf")
    if k > sum(pair.eligible for pair in pairs):
        return float("-inf")
    upper, above = _bin_of(_count(score, pairs, None, engine), k)
    lower, _ = _bin_of(_count(score, pairs, upper, engine), k - above)
    return float(np.uint32(upper << 16 | lower).view(np.float32))


def _count(score: Score, pairs: Sequence[Pair], upper: int | None, engine: Engine) -> Block:
    def step(pair: Pair, _start: int, base: Block, tuned: Block) -> Block:
        scores = score(base, tuned)
        scores += np.float32(0)  # -0.0, whose bits sort above infinity, becomes +0.0
        counts = count_halves(scores, upper)
        if upper is None and counts[_INFINITY:].any():
            raise NonFiniteError(
                "the score is NaN, infinite or negative",
                tensor=pair.name,
                hint="see `wsurg diff`, or leave the tensor out with --exclude",
            )
        return counts

    def combine(total: Block, _pair: Pair, _start: int, counts: Block) -> Block:
        total += counts
        return total

    what = "ranking, first pass" if upper is None else "ranking, second pass"
    return fold(step, combine, np.zeros(HALF, np.int64), pairs, engine=engine, what=what)


def _bin_of(counts: Block, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest, and how many lie in the bins above it."""
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, k))
    above = int(from_top[place - 1]) if place else 0
    return HALF - 1 - place, above
