"""The kernels of `purify` and `epur`: scores of dimensions, and norms of rows."""

from __future__ import annotations

import numpy as np

from weightsurgery.buffers import empty
from weightsurgery.kernels import Block, Lanes, all_finite, comparable, jit, jit_with, value_of

LARGEST = float(np.finfo(np.float32).max)


@jit
def _score(base: Lanes, tuned: Lanes, fisher: Lanes, epsilon: float, out: Lanes) -> None:
    for i in range(out.size):
        d = np.float64(value_of(tuned[i]) - value_of(base[i]))
        r = d * d / (np.float64(fisher[i]) + epsilon)
        # A finite drift over nothing, or what float32 cannot hold, ties at its largest number;
        # a drift that is infinite or NaN stays so, to be told.
        r = min(r, np.float64(LARGEST)) if abs(d) < np.inf else d
        out[i] = np.float32(0.0 if d == 0.0 else r)


def fisher_score(base: Block, tuned: Block, fisher: Block, epsilon: float) -> Block:
    """Drift against curvature, r = δ²/(H + ε) in float32; 0 where nothing drifted.

    Args:
        base: Block of BASE, any arithmetic dtype.
        tuned: The same elements of TUNED.
        fisher: The same elements of the diagonal H, float32 or float64, 0 or more.
        epsilon: ε, absolute.
    """
    base, tuned = comparable(base, tuned)
    out = empty(base.size, np.float32)
    _score(base, tuned, fisher, epsilon, out)
    return out


@jit
def _inverse(base: Lanes, tuned: Lanes, fisher: Lanes, epsilon: float, out: Lanes) -> None:
    for i in range(out.size):
        moved = value_of(tuned[i]) != value_of(base[i])
        r = 1.0 / (np.float64(fisher[i]) + epsilon)
        out[i] = np.float32(min(r, LARGEST) if moved else 0.0)


def inverse_score(base: Block, tuned: Block, fisher: Block, epsilon: float) -> Block:
    """1/(H + ε) in float32 where something drifted, else 0; see `fisher_score`."""
    base, tuned = comparable(base, tuned)
    out = empty(base.size, np.float32)
    _inverse(base, tuned, fisher, epsilon, out)
    return out


@jit_with(fastmath={"reassoc"})  # sums in vector lanes; NaN stays NaN
def _sum(values: Lanes) -> float:
    total = 0.0
    for i in range(values.size):
        total += np.float64(values[i])
    return total


def sum_of_curvature(fisher: Block) -> tuple[float, int]:
    """Sum of a block in float64, and how many of its elements are negative, NaN or infinite."""
    least = fisher.min(initial=0)  # NaN where there is one
    if least >= 0 and all_finite(fisher):
        return float(_sum(fisher)), 0
    return 0.0, int(np.count_nonzero(~((fisher >= 0) & (fisher < np.inf))))


@jit
def _rows(base: Lanes, tuned: Lanes, first: int, width: int, out: Lanes) -> None:
    for i in range(base.size):
        d = np.float64(value_of(tuned[i]) - value_of(base[i]))
        out[(first + i) // width] += d * d


def squared_rows(base: Block, tuned: Block, start: int, width: int) -> Block:
    """Sum of squared drift of each row that a block touches, float64.

    Args:
        base: Elements from `start` on, of a matrix of BASE.
        tuned: The same of TUNED.
        start: Index of the first element in the matrix.
        width: Elements in a row.
    """
    base, tuned = comparable(base, tuned)
    first = start % width
    out = np.zeros((first + base.size + width - 1) // width)
    _rows(base, tuned, first, width, out)
    return out
