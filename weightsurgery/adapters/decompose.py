"""The best product of two thin matrices for the drift of one matrix.

The drift D is read in blocks of whole rows and never kept, but for an exact decomposition. What is
then held besides one block are the factors and, of the same size, what they are made of.

References:
    Eckart and Young, "The approximation of one matrix by another of lower rank", Psychometrika
    1936: what a truncated singular value decomposition leaves is the least that any product of
    that rank leaves.
    Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 2011,
    arXiv:0909.4061, algorithms 4.4 and 5.1. Ours iterates on the side of the columns, so that
    each step D^T(DQ) is one pass over rows, and begins with random signs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from weightsurgery.alignment import Pair
from weightsurgery.checkpoint import BLOCK
from weightsurgery.errors import NonFiniteError
from weightsurgery.kernels import Block, same_float
from weightsurgery.low_rank_kernel import squared_lines
from weightsurgery.rng import random_bits

_SMALL = 512  # rows or columns up to which a matrix is decomposed exactly
_FEW = 1 << 22  # elements, the same
BEGIN = 32  # directions that are looked for first where the energy decides


class Algebra:
    """Products and decompositions by numpy, on the processor."""

    def put(self, array: Block) -> Any:
        """The array where the computing is done."""
        return array

    def take(self, array: Any) -> Block:
        """And back."""
        result: Block = array
        return result

    def svd(self, array: Block) -> tuple[Block, Block, Block]:
        """Left vectors, singular values in falling order, right vectors (as rows); in float64."""
        left, values, right = np.linalg.svd(array.astype(np.float64), full_matrices=False)
        return left, values, right


class TorchAlgebra(Algebra):
    """The same by torch, on any device that it has.

    Args:
        device: From `models.pick_device`.
    """

    def __init__(self, device: Any) -> None:
        self.device = device

    def put(self, array: Block) -> Any:
        """See `Algebra`."""
        import torch

        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def take(self, array: Any) -> Block:
        """See `Algebra`."""
        result: Block = array.cpu().numpy()
        return result

    def svd(self, array: Block) -> tuple[Block, Block, Block]:
        """See `Algebra`; in float32 on Apple's devices, which have nothing wider."""
        import torch

        wide = np.float32 if self.device.type == "mps" else np.float64
        parts = torch.linalg.svd(self.put(array.astype(wide)), full_matrices=False)
        left, values, right = (self.take(part).astype(np.float64) for part in parts)
        return left, values, right


POWER_ITERATIONS, OVERSAMPLING = 4, 10  # unless given


@dataclass(frozen=True)
class Wanted:
    """How much of a drift to keep, and how to find it.

    Attributes:
        rank: Directions to keep at most; None for as many as `energy` takes.
        energy: Share of the squared norm to keep; None where `rank` decides.
        svd: "auto", "exact" or "randomised".
        power_iterations: Of the randomised decomposition, besides the first.
        oversampling: Directions that it looks for besides those that are kept.
        seed: Of its random signs.
        algebra: Who multiplies and decomposes.
    """

    rank: int | None
    energy: float | None
    svd: str = "auto"
    power_iterations: int = POWER_ITERATIONS
    oversampling: int = OVERSAMPLING
    seed: int = 0
    algebra: Algebra = field(default_factory=Algebra)


@dataclass(frozen=True)
class Drift:
    """The drift of a pair as a matrix: a row for each step along the leading dimension.

    Attributes:
        pair: Of equal shapes.
        number: Of one matrix of a stack; None for the whole tensor.
    """

    pair: Pair
    number: int | None = None

    @property
    def columns(self) -> int:
        """Elements in a row."""
        view = self.pair.tuned
        return max(1, view.width if self.number is None else view.shape[-1])

    @property
    def rows(self) -> int:
        """Rows; a vector is one."""
        view = self.pair.tuned
        return view.size // self.columns if self.number is None else view.shape[-2]

    def blocks(self) -> Iterator[tuple[int, Block]]:
        """Number of the first row, and rows of about `BLOCK` elements; float32, or float64.

        The cut depends on the shape alone, and so do the sums that are made over it.
        """
        step = max(1, BLOCK // self.columns)
        for first in range(0, self.rows, step):
            yield first, self.read(first, min(first + step, self.rows))

    def read(self, first: int, last: int) -> Block:
        """Some rows of tuned - base.

        Raises:
            NonFiniteError: They hold NaN or infinity.
        """
        before = (self.number or 0) * self.rows
        start, stop = ((before + row) * self.columns for row in (first, last))
        other = self.pair.base
        if other is None:
            raise ValueError(f"{self.pair.name}: no drift without a counterpart")
        base, tuned = same_float(other.read(start, stop), self.pair.tuned.read(start, stop))
        with np.errstate(invalid="ignore", over="ignore"):  # looked at in the next lines
            drift = tuned - base
        if not np.isfinite(drift).all():
            raise NonFiniteError(
                f"NaN or infinity among elements {start:,} to {stop:,}",
                tensor=self.pair.name,
                hint="leave the tensor out with --exclude",
            )
        rows: Block = drift.reshape(-1, self.columns)
        return rows

    def row_energies(self) -> Block:
        """The squared norm of each row, float64.

        Raises:
            NonFiniteError: The drift holds NaN or infinity.
        """
        parts = [np.zeros(0)]
        for _, block in self.blocks():
            parts.append(squared_lines(block.reshape(-1), 0, self.columns, by_column=False))
        return np.concatenate(parts)


@dataclass(frozen=True)
class Factors:
    """D as a product, and what the product leaves of it.

    Attributes:
        left: Shape (rows, rank), float32; of a stack (matrices, rows, rank).
        right: Shape (rank, columns), float32; of a stack (matrices, rank, columns).
        energy: The squared norm of D.
        residual: The squared norm of D - left @ right, measured with these very factors.
        method: "exact" or "randomised".
    """

    left: Block
    right: Block
    energy: float
    residual: float
    method: str

    @property
    def rank(self) -> int:
        """Columns of `left`."""
        return int(self.left.shape[-1])

    @property
    def kept(self) -> float:
        """The share of the energy that the product has."""
        return 1.0 - self.residual / self.energy


def decompose(drift: Drift, wanted: Wanted, energy: float) -> Factors:
    """The truncated singular value decomposition of a drift.

    Each of the two factors gets the square roots of the singular values (our choice: so both are
    of one size), and the largest entry of each right vector is positive. Directions that are
    nothing but rounding become zeros, so that equal ranks stay equal.

    Args:
        drift: It must not be zero.
        wanted: How much of it to keep.
        energy: Its squared norm.

    Raises:
        NonFiniteError: The drift holds NaN or infinity.
    """
    least = min(drift.rows, drift.columns)
    most = least if wanted.rank is None else min(wanted.rank, least)
    looked_for = most if wanted.energy is None else min(most, BEGIN)
    while True:
        exact = is_exact(drift, wanted, looked_for)
        if exact:
            parts = wanted.algebra.svd(drift.read(0, drift.rows))
        else:
            parts = _randomised(drift, wanted, looked_for, energy)
        rank = most if wanted.energy is None else _rank_for(parts[1], wanted.energy, energy)
        if exact or rank <= looked_for or looked_for == most:
            break
        looked_for = min(2 * looked_for, most)
    smallest = 8 * float(np.finfo(np.float64 if exact else np.float32).eps) * float(parts[1][0])
    if wanted.energy is not None:
        rank = min(rank, int(np.count_nonzero(parts[1] > smallest)))
    left, right = _balanced(parts, min(rank, most), smallest)
    residual = _residual(drift, left, right, wanted.algebra)
    return Factors(left, right, energy, residual, "exact" if exact else "randomised")


def decompose_stack(pair: Pair, wanted: Wanted, energies: Block) -> Factors:
    """The same for each matrix of a stack; all get the rank of the one that needs most.

    Args:
        pair: Of shape (matrices, rows, columns).
        wanted: How much of each drift to keep.
        energies: The squared norm of each; not all are zero.

    Raises:
        NonFiniteError: A drift holds NaN or infinity.
    """
    matrices, rows, columns = pair.tuned.shape
    found = {
        number: decompose(Drift(pair, number), wanted, float(energies[number]))
        for number in range(matrices)
        if energies[number]
    }
    rank = max(factors.rank for factors in found.values())
    left = np.zeros((matrices, rows, rank), np.float32)
    right = np.zeros((matrices, rank, columns), np.float32)
    for number, factors in found.items():
        left[number, :, : factors.rank] = factors.left
        right[number, : factors.rank] = factors.right
    exact = all(factors.method == "exact" for factors in found.values())
    residual = sum(factors.residual for factors in found.values())
    method = "exact" if exact else "randomised"
    return Factors(left, right, float(energies.sum()), residual, method)


def is_exact(drift: Drift, wanted: Wanted, rank: int) -> bool:
    """Whether a drift is decomposed exactly.

    With "auto" small matrices are, and where random directions would be half of all there are.

    Args:
        drift: The drift.
        wanted: How it is asked for.
        rank: Directions that are looked for.
    """
    if wanted.svd != "auto":
        return wanted.svd == "exact"
    least = min(drift.rows, drift.columns)
    small = least <= _SMALL and drift.rows * drift.columns <= _FEW
    return small or 2 * (rank + wanted.oversampling) >= least


def _randomised(
    drift: Drift, wanted: Wanted, rank: int, energy: float
) -> tuple[Block, Block, Block]:
    """Rayleigh-Ritz in the subspace (D^T D)^p Ω: directions of D's rows, and D seen in them."""
    algebra, columns = wanted.algebra, drift.columns
    width = min(rank + wanted.oversampling, drift.rows, columns)
    bits = random_bits(wanted.seed, drift.pair.name, 0, width * columns)
    basis = 1.0 - 2.0 * (bits.reshape(width, columns).T & np.uint32(1))
    # D^T D leaves float32's range long before D does; a power of two changes no digit.
    scale = 2.0 ** float(np.clip(np.round(np.log2(energy) / 2), -120, 120))
    for _ in range(wanted.power_iterations + 1):
        total = np.zeros((columns, width))
        there: dict[Any, Any] = {}
        for _, block in drift.blocks():
            q = _placed(there, algebra, basis / scale, block.dtype)
            d = algebra.put(block)
            total += algebra.take(d.T @ ((d @ q) / scale))
        basis = np.linalg.qr(total)[0]
    seen = np.zeros((drift.rows, width))
    there = {}
    for first, block in drift.blocks():
        q = _placed(there, algebra, basis, block.dtype)
        seen[first : first + len(block)] = algebra.take(algebra.put(block) @ q)
    left, values, right = algebra.svd(seen)
    return left, values, right @ basis.T


def _placed(there: dict[Any, Any], algebra: Algebra, array: Block, dtype: Any) -> Any:
    """An array where the computing is done, in the blocks' dtype; sent there once."""
    if dtype not in there:
        there[dtype] = algebra.put(array.astype(dtype))
    return there[dtype]


def _rank_for(values: Block, share: float, energy: float) -> int:
    """The least rank that keeps the share; more than there are values where they do not."""
    sums = np.cumsum(values * values)
    if share >= 1 or not sums.size:
        return int(values.size) + 1
    return int(np.searchsorted(sums, share * energy)) + 1


def _balanced(parts: tuple[Block, Block, Block], rank: int, smallest: float) -> tuple[Block, Block]:
    """Two factors in float32; singular values up to `smallest` count as zero."""
    left, values, right = parts[0][:, :rank], parts[1][:rank], parts[2][:rank]
    values = np.where(values > smallest, values, 0.0)
    places = np.abs(right).argmax(axis=1)
    signs = np.where(right[np.arange(len(right)), places] < 0, -1.0, 1.0)
    roots = np.sqrt(values)
    a = np.ascontiguousarray(left * (roots * signs), np.float32)
    b = np.ascontiguousarray(right * (roots * signs)[:, np.newaxis], np.float32)
    return a, b


def _residual(drift: Drift, left: Block, right: Block, algebra: Algebra) -> float:
    """The squared norm of D - left @ right."""
    total = 0.0
    there: dict[Any, Any] = {}
    for first, block in drift.blocks():
        r = _placed(there, algebra, right, block.dtype)
        rows = left[first : first + len(block)].astype(block.dtype)
        rest = block - algebra.take(algebra.put(rows) @ r)
        total += float(squared_lines(rest.reshape(-1), 0, rest.size, by_column=False).sum())
    return total
