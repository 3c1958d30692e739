"""Does the drift look like diffusion? Each tensor's scores against the law they should follow.

If fine-tuning is a diffusion, δ is N(0, k·H) in each dimension, so r = δ²/H is k times a χ²
variable with one degree of freedom. These numbers go beyond the papers (our choice): k̂ is the
median of r over that of χ²₁, the tail excess is the share of r above k̂ times the 99.9 % point of
χ²₁ over the expected 0.1 %, and KS is the largest distance between the two distribution functions.
Dimensions without drift are left out: in 16 bits most of them are drifts that were rounded away.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from weightsurgery.alignment import Pair
from weightsurgery.kernels import Block

MEDIAN = 0.45493642311957  # of χ²₁
TAIL_POINT, TAIL = 10.827566170662733, 0.001  # P(χ²₁ > point)
_FINITE = 0x7F80  # counts by the upper half of float32's bits; those from here on are not finite


class Diagnostics:
    """Gathers the histograms of scores, one tensor at a time."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []
        self._pair: Pair | None = None
        self._counts = np.zeros(_FINITE, np.int64)

    def observe(self, pair: Pair, counts: Block) -> None:
        """Take a block's counts by the upper half of the scores' bits; blocks come in order."""
        if self._pair is not None and self._pair.name != pair.name:
            self.finish()
        self._pair = pair
        self._counts += counts[:_FINITE]

    def finish(self) -> list[dict[str, Any]]:
        """Close the last tensor; gives the entries of all."""
        if self._pair is not None:
            self.found.append({"tensor": self._pair.name, **describe(self._counts)})
        self._pair, self._counts = None, np.zeros(_FINITE, np.int64)
        return self.found


def describe(counts: Block) -> dict[str, Any]:
    """The numbers of one histogram; None where too little moved.

    Args:
        counts: int64 counts of scores by the upper 16 bits of their float32 bits, finite ones.
    """
    dimensions, zeros = int(counts.sum()), int(counts[0])
    moved = dimensions - zeros
    entry: dict[str, Any] = {"dimensions": dimensions, "moved": moved}
    if not moved:
        return {**entry, "k": None, "tail_excess": None, "ks": None}
    places = np.flatnonzero(counts[1:]) + 1
    share = np.cumsum(counts[places]) / moved  # at the upper edge of each bin
    edges = np.array([places, places + 1], np.uint32) << np.uint32(16)
    low, high = edges.view(np.float32).astype(np.float64)
    high = np.minimum(high, np.finfo(np.float32).max)
    before = np.concatenate([[0.0], share[:-1]])
    k = _quantile(0.5, before, share, low, high) / MEDIAN
    above = 1 - _share_below(TAIL_POINT * k, before, share, low, high)
    law = np.array([math.erf(math.sqrt(x / k / 2)) for x in (*low, *high)])
    distance = max(np.abs(law[: low.size] - before).max(), np.abs(law[low.size :] - share).max())
    return {**entry, "k": k, "tail_excess": above / TAIL, "ks": float(distance)}


def _quantile(q: float, before: Block, share: Block, low: Block, high: Block) -> float:
    """Within its bin as if the scores were spread evenly there: an error below 0.4 %."""
    place = int(np.searchsorted(share, q))
    part = (q - before[place]) / (share[place] - before[place])
    return float(low[place] + part * (high[place] - low[place]))


def _share_below(x: float, before: Block, share: Block, low: Block, high: Block) -> float:
    place = int(np.searchsorted(high, x))
    if place == high.size:
        return 1.0
    part = min(1.0, max(0.0, (x - low[place]) / (high[place] - low[place])))
    return float(before[place] + part * (share[place] - before[place]))
