"""Exact global order statistics in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from weightsurgery.align import Pair
from weightsurgery.errors import NonFiniteError
from weightsurgery.kernels import Block, all_finite, histogram
from weightsurgery.stream import Engine, fold

_LOW_BITS = 16
_BINS = 1 << _LOW_BITS

Score = Callable[[Block, Block], Block]


def kth_largest(score: Score, pairs: Sequence[Pair], k: int, *, engine: Engine) -> float:
    """The k-th largest score over the eligible elements of all pairs, exactly.

    Non-negative float32 numbers order like their bit patterns. One pass counts the upper 16 bits,
    a second the lower 16 bits of the scores in the one bin that matters; memory is two
    histograms, whatever the model.

    Args:
        score: (base block, tuned block) to float32 scores, 0 or more.
        pairs: Where to look. Tied copies should be left out.
        k: 1 is the largest score, the number of eligible elements the smallest.
        engine: How to run the two passes.

    Returns:
        The score; +inf for k < 1, -inf for k beyond the number of elements.

    Raises:
        NonFiniteError: A score is NaN or infinite.
    """
    if k < 1:
        return float("inf")
    if k > sum(pair.eligible for pair in pairs):
        return float("-inf")
    high, above = _bin_of(_count(score, pairs, -1, engine), k)
    low, _ = _bin_of(_count(score, pairs, high, engine), k - above)
    return float(np.uint32(high << _LOW_BITS | low).view(np.float32))


def _count(score: Score, pairs: Sequence[Pair], prefix: int, engine: Engine) -> Block:
    def step(pair: Pair, _start: int, base: Block, tuned: Block) -> Block:
        # Adding zero turns -0.0, whose bits sort above infinity, into +0.0.
        scores = score(base, tuned) + np.float32(0)
        if not all_finite(scores):
            raise NonFiniteError(
                "the score is NaN or infinite",
                tensor=pair.name,
                hint="see `wsurg diff`, or leave the tensor out with --exclude",
            )
        counts = np.zeros(_BINS, np.int64)
        histogram(scores, _LOW_BITS, prefix, counts)
        return counts

    def combine(total: Block, _pair: Pair, _start: int, counts: Block) -> Block:
        total += counts
        return total

    what = "ranking, first pass" if prefix < 0 else "ranking, second pass"
    return fold(step, combine, np.zeros(_BINS, np.int64), pairs, engine=engine, what=what)


def _bin_of(counts: Block, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest, and how many lie in the bins above it."""
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, k))
    above = int(from_top[place - 1]) if place else 0
    return _BINS - 1 - place, above
