"""Exact global order statistics in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from weightsurgery.alignment import Pair
from weightsurgery.errors import NonFiniteError
from weightsurgery.kernels import HALF, Block, count_halves
from weightsurgery.stream import BlockFunction, Engine, fold

_INFINITY = 0x7F80  # upper half of its bits; those of NaN and of negative numbers are above

Score = BlockFunction
Observe = Callable[[Pair, Block], None]


def kth_largest(
    score: Score,
    pairs: Sequence[Pair],
    k: int,
    *,
    engine: Engine,
    observe: Observe | None = None,
) -> float:
    """The k-th largest score over the eligible elements of all pairs, exactly.

    Non-negative float32 numbers order like their bit patterns. One pass counts the upper 16 bits,
    a second the lower 16 bits of the scores in the one bin that matters; memory is two
    histograms, whatever the model.

    Args:
        score: (pair, start, base block, tuned block) to a fresh array of float32 scores, 0 or
            more.
        pairs: Where to look. Tied copies should be left out.
        k: 1 is the largest score, the number of eligible elements the smallest.
        engine: How to run the two passes.
        observe: Given every block's counts of the upper halves of its scores' bits (int64,
            65,536 of them), in order; then the first pass is made whatever k is.

    Returns:
        The score; +inf for k < 1, -inf for k beyond the number of elements.

    Raises:
        NonFiniteError: A score is NaN, infinite or negative.
    """
    beyond = k > sum(pair.eligible for pair in pairs)
    if observe is None and (beyond or k < 1):
        return float("-inf" if beyond else "inf")
    counts = _count(score, pairs, None, engine, observe)
    if beyond or k < 1:
        return float("-inf" if beyond else "inf")
    upper, above = _bin_of(counts, k)
    lower, _ = _bin_of(_count(score, pairs, upper, engine), k - above)
    return float(np.uint32(upper << 16 | lower).view(np.float32))


def _count(
    score: Score,
    pairs: Sequence[Pair],
    upper: int | None,
    engine: Engine,
    observe: Observe | None = None,
) -> Block:
    def step(pair: Pair, start: int, base: Block, tuned: Block) -> Block:
        scores = score(pair, start, base, tuned)
        scores += np.float32(0)  # -0.0, whose bits sort above infinity, becomes +0.0
        counts = count_halves(scores, upper)
        if upper is None and counts[_INFINITY:].any():
            raise NonFiniteError(
                "the score is NaN, infinite or negative",
                tensor=pair.name,
                hint="see `wsurg diff`, or leave the tensor out with --exclude",
            )
        return counts

    def combine(total: Block, pair: Pair, _start: int, counts: Block) -> Block:
        if observe is not None:
            observe(pair, counts)
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
