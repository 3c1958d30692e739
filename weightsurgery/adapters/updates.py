"""What an adapter does to one tensor, a run of elements at a time.

Every update takes the values so far, in float32 (float64 for F64), and the index of the first;
so updates follow each other and the result is rounded once.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np

from weightsurgery.checkpoint import TensorView
from weightsurgery.errors import MismatchError
from weightsurgery.kernels import Block, to_float
from weightsurgery.low_rank_kernel import add_low_rank, merge_low_rank, squared_lines

Kept = TypeVar("Kept")


class Update(Protocol):
    """One change of one tensor of BASE."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The adapter's tensors that it is made of."""

    def apply(self, values: Block, start: int) -> Block:
        """The values after it.

        Args:
            values: Elements from `start` on, float32 or float64.
            start: Index of the first.
        """


class Loaded(Generic[Kept]):
    """Something made at its first use, and let go when a whole tensor's elements were served.

    Tensors are worked on one after another, so that few of these are held at a time.
    """

    def __init__(self, make: Callable[[], Kept], elements: int) -> None:
        self._make, self._elements = make, elements
        self._lock = threading.Lock()
        self._value: list[Kept] = []
        self._left = elements

    def get(self, count: int) -> Kept:
        """The thing, for an update of so many elements."""
        with self._lock:
            if not self._value:
                self._value, self._left = [self._make()], self._elements
            value = self._value[0]
            self._left -= count
            if self._left <= 0:
                self._value = []
            return value


def read_floats(view: TensorView, shape: tuple[int, ...], like: np.dtype[np.generic]) -> Block:
    """A whole tensor in the dtype that arithmetic is done in."""
    return to_float(view.read(0, view.size)).astype(like, copy=False).reshape(shape)


def _float_dtype(stored: Block) -> np.dtype[np.generic]:
    """The dtype that arithmetic on stored elements is done in."""
    return np.dtype(np.float64 if stored.dtype == np.float64 else np.float32)


@dataclass(frozen=True)
class LowRank:
    """W + s · left @ right, for a stack of matrices.

    Attributes:
        left: The factor with a row for each row of W, and how it is stored.
        right: The factor with a column for each column of W.
        scale: s.
        matrices: How many matrices W is a stack of; 1 for all but fused experts.
        shape: Rows and columns of each.
        arrange: The two factors as stored, in float, to left (matrices × rows, rank) and right
            (matrices, rank, columns).
    """

    left: TensorView
    right: TensorView
    scale: float
    matrices: int
    shape: tuple[int, int]
    arrange: Callable[[Block, Block], tuple[Block, Block]] = field(repr=False)
    _loaded: dict[np.dtype[np.generic], Loaded[tuple[Block, Block]]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def sources(self) -> tuple[str, ...]:
        """See `Update`."""
        return (self.left.name, self.right.name)

    def factors(self, like: np.dtype[np.generic], count: int) -> tuple[Block, Block]:
        """Left and right factor, for an update of so many elements."""

        def load() -> tuple[Block, Block]:
            views = (self.left, self.right)
            left, right = self.arrange(*(read_floats(v, v.shape, like) for v in views))
            return np.ascontiguousarray(left), np.ascontiguousarray(right)

        elements = self.matrices * math.prod(self.shape)
        return self._loaded.setdefault(like, Loaded(load, elements)).get(count)

    def apply(self, values: Block, start: int) -> Block:
        """See `Update`."""
        left, right = self.factors(values.dtype, values.size)
        return add_low_rank(values, left, right, start, self.scale)

    def merge(self, stored: Block, start: int) -> Block:
        """Stored elements after this update alone, rounded once to their dtype.

        Args:
            stored: Elements from `start` on, as they are stored.
            start: Index of the first.
        """
        left, right = self.factors(_float_dtype(stored), stored.size)
        return merge_low_rank(stored, left, right, start, self.scale)


@dataclass(frozen=True)
class LowRankRows:
    """W + some rows of one matrix of a stack of low-rank products.

    Attributes:
        stack: The products.
        matrix: Which.
        first: Its first row.
        rows: How many.
    """

    stack: LowRank
    matrix: int
    first: int
    rows: int

    @property
    def sources(self) -> tuple[str, ...]:
        """See `Update`."""
        return self.stack.sources

    def apply(self, values: Block, start: int) -> Block:
        """See `Update`."""
        left, right = self._factors(values.dtype, values.size)
        return add_low_rank(values, left, right, start, self.stack.scale)

    def merge(self, stored: Block, start: int) -> Block:
        """See `LowRank.merge`."""
        left, right = self._factors(_float_dtype(stored), stored.size)
        return merge_low_rank(stored, left, right, start, self.stack.scale)

    def _factors(self, like: np.dtype[np.generic], count: int) -> tuple[Block, Block]:
        left, right = self.stack.factors(like, count)
        top = self.matrix * self.stack.shape[0] + self.first
        return left[top : top + self.rows], right[self.matrix : self.matrix + 1]


@dataclass(frozen=True)
class Magnitude:
    """DoRA: each row (or column) of W + s · left @ right is rescaled to a learned norm.

    Attributes:
        change: The low-rank part.
        magnitude: The norms.
        base: W itself; the norms before are taken of W and the low-rank part alone, whatever
            other adapters did meanwhile.
        by_column: The norms are those of columns.

    Reference:
        Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024, arXiv:2402.09353,
        equation 5.
    """

    change: LowRank
    magnitude: TensorView
    base: TensorView
    by_column: bool
    _loaded: dict[np.dtype[np.generic], Loaded[Block]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def sources(self) -> tuple[str, ...]:
        """See `Update`."""
        return (*self.change.sources, self.magnitude.name)

    def _factors(self, like: np.dtype[np.generic]) -> Block:
        width = self.change.shape[1]
        squares = np.zeros(width if self.by_column else self.change.shape[0])
        for start, stop in self.base.blocks():
            values = to_float(self.base.read(start, stop)).astype(like, copy=False)
            lines = squared_lines(
                self.change.apply(values, start), start, width, by_column=self.by_column
            )
            first = 0 if self.by_column else start // width
            squares[first : first + lines.size] += lines
        wanted = read_floats(self.magnitude, (-1,), like)
        if (squares == 0).any():
            raise MismatchError(
                "DoRA: a line of the adapted matrix is zero, so it has no direction",
                tensor=self.base.name,
                code="E-ADAPTER-DORA",
            )
        return (wanted / np.sqrt(squares)).astype(like)

    def factors(self, start: int, count: int, like: np.dtype[np.generic]) -> Block:
        """What the elements [start, start + count) are multiplied by."""

        def load() -> Block:
            return self._factors(like)

        norms = self._loaded.setdefault(like, Loaded(load, self.base.size)).get(count)
        places = np.arange(start, start + count)
        width = self.change.shape[1]
        factors: Block = norms[places % width if self.by_column else places // width]
        return factors

    def apply(self, values: Block, start: int) -> Block:
        """See `Update`."""
        factors = self.factors(start, values.size, values.dtype)
        return self.change.apply(values, start) * factors


@dataclass(frozen=True)
class Shift:
    """A vector is added: the bias of an adapter's second factor.

    Attributes:
        by: The vector.
        scale: Multiplies it.
    """

    by: TensorView
    scale: float

    @property
    def sources(self) -> tuple[str, ...]:
        """See `Update`."""
        return (self.by.name,)

    def apply(self, values: Block, start: int) -> Block:
        """See `Update`."""
        added = to_float(self.by.read(start, start + values.size)).astype(values.dtype, copy=False)
        result: Block = values + values.dtype.type(self.scale) * added
        return result


@dataclass(frozen=True)
class Replace:
    """The tensor becomes the adapter's own.

    Attributes:
        by: That tensor.
    """

    by: TensorView

    @property
    def sources(self) -> tuple[str, ...]:
        """See `Update`."""
        return (self.by.name,)

    def apply(self, values: Block, start: int) -> Block:
        """See `Update`."""
        new = to_float(self.by.read(start, start + values.size))
        return new.astype(values.dtype, copy=False)


@dataclass(frozen=True)
class ReplaceRows:
    """Some rows become the adapter's own.

    Attributes:
        by: The new rows.
        rows: Which, in the order of `by`.
        width: Elements in a row.
    """

    by: TensorView
    rows: tuple[int, ...]
    width: int

    @property
    def sources(self) -> tuple[str, ...]:
        """See `Update`."""
        return (self.by.name,)

    def apply(self, values: Block, start: int) -> Block:
        """See `Update`."""
        result = values.copy()
        for place, row in enumerate(self.rows):
            first, last = row * self.width, (row + 1) * self.width
            low, high = max(first, start), min(last, start + values.size)
            if low < high:
                offset = place * self.width - first
                new = to_float(self.by.read(low + offset, high + offset))
                result[low - start : high - start] = new
        return result


MERGED_AT_ONCE = (LowRank, LowRankRows)
"""The updates that have `merge`: one pass over stored elements when they come alone."""


def is_added(update: Update) -> bool:
    """True for an update that is added, and so can be weighed, taken back, or rounded on its own.

    Args:
        update: Of a parameter or of a part of one.
    """
    return isinstance(update, LowRank | LowRankRows | Shift)
