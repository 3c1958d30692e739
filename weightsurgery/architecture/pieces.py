"""Where the elements of a loaded tensor lie in the stored ones it is made of.

A loading library stacks, joins, cuts and transposes stored tensors. None of that computes
anything: each element of the result is one stored element. So the result is a set of *pieces*,
boxes of its index space whose elements lie in one stored tensor at constant strides.

A logical axis may be a product of finer ones: interleaving turns an axis of n into one of
(2, n/2). The *grid* is the list of all finer axes; pieces are boxes of the grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from weightsurgery.architecture.conversion import UnsupportedError

Axis = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A box of a tensor's grid, and where its elements lie in a stored tensor.

    Attributes:
        stored: The stored tensor's name.
        starts: First index of the box, one for each axis of the grid.
        counts: Number of indices, likewise.
        strides: Elements of the stored tensor from one index to the next, likewise.
        offset: The stored element (row-major) of the box's first index.
    """

    stored: str
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def cut(self, axis: int, start: int, stop: int) -> Piece | None:
        """Return the part of the box between two indices of an axis, or None if it is empty."""
        first = max(start, self.starts[axis])
        count = min(stop, self.starts[axis] + self.counts[axis]) - first
        if count <= 0:
            return None
        moved = (first - self.starts[axis]) * self.strides[axis]
        return Piece(
            self.stored,
            _with(self.starts, axis, first),
            _with(self.counts, axis, count),
            self.strides,
            self.offset + moved,
        )

    def refined(self, axis: int, inner: int) -> Piece:
        """The same box where an axis is split in two, the inner one of `inner` indices.

        Raises:
            UnsupportedError: The box covers part of a run of `inner` indices.
        """
        start, count, stride = self.starts[axis], self.counts[axis], self.strides[axis]
        if start % inner or count % inner:
            raise UnsupportedError("a part of a tensor ends within a group of rows")
        return Piece(
            self.stored,
            _with(self.starts, axis, start // inner, 0),
            _with(self.counts, axis, count // inner, inner),
            _with(self.strides, axis, stride * inner, stride),
            self.offset,
        )


@dataclass(frozen=True)
class Assembly:
    """A tensor as pieces of stored ones.

    Attributes:
        axes: The logical axes, each a product of the grid's.
        pieces: Disjoint boxes of the grid.
    """

    axes: tuple[Axis, ...]
    pieces: tuple[Piece, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(map(math.prod, self.axes))

    @property
    def size(self) -> int:
        """Number of elements that the pieces cover."""
        return sum(math.prod(piece.counts) for piece in self.pieces)

    def first(self, axis: int) -> int:
        """The first grid axis of a logical one."""
        return sum(len(one) for one in self.axes[:axis])


def _with(values: tuple[int, ...], at: int, *new: int) -> tuple[int, ...]:
    return (*values[:at], *new, *values[at + 1 :])


def whole(name: str, shape: Sequence[int]) -> Assembly:
    """A stored tensor as it is.

    Args:
        name: Its name.
        shape: Its shape.
    """
    strides = [1]
    for count in reversed(shape[1:]):
        strides.append(strides[-1] * count)
    piece = Piece(name, (0,) * len(shape), tuple(shape), tuple(reversed(strides[: len(shape)])), 0)
    return Assembly(tuple((count,) for count in shape), (piece,))


def stack(parts: Sequence[Assembly], axis: int) -> Assembly:
    """Tensors of one shape along a new axis.

    Raises:
        UnsupportedError: The shapes differ.
    """
    like = parts[0]
    if any(part.axes != like.axes for part in parts):
        raise UnsupportedError("tensors to be stacked have different shapes")
    at = like.first(axis)

    def placed(piece: Piece, index: int) -> Piece:
        def insert(values: tuple[int, ...], new: int) -> tuple[int, ...]:
            return (*values[:at], new, *values[at:])

        return Piece(
            piece.stored,
            insert(piece.starts, index),
            insert(piece.counts, 1),
            insert(piece.strides, 0),
            piece.offset,
        )

    pieces = tuple(placed(piece, i) for i, part in enumerate(parts) for piece in part.pieces)
    return Assembly((*like.axes[:axis], (len(parts),), *like.axes[axis:]), pieces)


def join(parts: Sequence[Assembly], axis: int) -> Assembly:
    """Tensors one after the other along an axis.

    Raises:
        UnsupportedError: Other axes differ, or this one is a product of several.
    """
    like = parts[0]
    if any(_without(part, axis) != _without(like, axis) for part in parts):
        raise UnsupportedError("tensors to be joined have different shapes")
    if any(len(part.axes[axis]) != 1 for part in parts):
        raise UnsupportedError("interleaved tensors are joined")
    at, start, pieces = like.first(axis), 0, []
    for part in parts:
        pieces += [
            Piece(
                p.stored, _with(p.starts, at, p.starts[at] + start), p.counts, p.strides, p.offset
            )
            for p in part.pieces
        ]
        start += part.shape[axis]
    return Assembly((*like.axes[:axis], (start,), *like.axes[axis + 1 :]), tuple(pieces))


def _without(part: Assembly, axis: int) -> tuple[Axis, ...]:
    return (*part.axes[:axis], *part.axes[axis + 1 :])


def split(whole_: Assembly, axis: int, sizes: Sequence[int]) -> list[Assembly]:
    """A tensor cut along an axis.

    Args:
        whole_: The tensor.
        axis: Where to cut.
        sizes: Of the parts; their sum is the axis's.

    Raises:
        UnsupportedError: The axis cannot be cut there.
    """
    axis %= len(whole_.axes)
    if sum(sizes) != whole_.shape[axis]:
        raise UnsupportedError(f"{whole_.shape[axis]} rows cannot be split into {list(sizes)}")
    inner = math.prod(whole_.axes[axis][1:])
    if any(size % inner for size in sizes):
        raise UnsupportedError("an interleaved tensor is split within a group")
    at, start, parts = whole_.first(axis), 0, []
    for size in sizes:
        count = size // inner
        cut = (piece.cut(at, start, start + count) for piece in whole_.pieces)
        pieces = tuple(
            Piece(
                p.stored, _with(p.starts, at, p.starts[at] - start), p.counts, p.strides, p.offset
            )
            for p in cut
            if p is not None
        )
        axes = (*whole_.axes[:axis], (count, *whole_.axes[axis][1:]), *whole_.axes[axis + 1 :])
        parts.append(Assembly(axes, pieces))
        start += count
    return parts


def transpose(part: Assembly, one: int, other: int) -> Assembly:
    """A tensor with two axes exchanged."""
    order = list(range(len(part.axes)))
    order[one], order[other] = order[other], order[one]
    grid = [i for axis in order for i in range(part.first(axis), part.first(axis + 1))]
    return _ordered(part, tuple(part.axes[i] for i in order), grid)


def _ordered(part: Assembly, axes: tuple[Axis, ...], grid: Sequence[int]) -> Assembly:
    def pick(values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(values[i] for i in grid)

    pieces = (
        Piece(p.stored, pick(p.starts), pick(p.counts), pick(p.strides), p.offset)
        for p in part.pieces
    )
    return Assembly(axes, tuple(pieces))


def regroup(part: Assembly, axis: int, sizes: Sequence[int], order: Sequence[int]) -> Assembly:
    """A tensor whose axis is taken as several, which are put in another order.

    Args:
        part: The tensor.
        axis: The axis.
        sizes: The axes it is the product of.
        order: For each new place, which of them stands there.

    Raises:
        UnsupportedError: The axis is not the product of these.
    """
    axis %= len(part.axes)
    part = refine(part, axis, sizes)
    at = part.first(axis)
    last = part.first(len(part.axes))
    grid = [*range(at), *(at + i for i in order), *range(at + len(sizes), last)]
    new = tuple(sizes[i] for i in order)
    return _ordered(part, (*part.axes[:axis], new, *part.axes[axis + 1 :]), grid)


def refine(part: Assembly, axis: int, sizes: Sequence[int]) -> Assembly:
    """The same tensor on a finer grid.

    Args:
        part: The tensor.
        axis: A logical axis.
        sizes: The axes that it is to be the product of.

    Raises:
        UnsupportedError: It is not, or is the product of others already.
    """
    sizes = tuple(sizes)
    if part.axes[axis] == sizes:
        return part
    if len(part.axes[axis]) != 1 or math.prod(sizes) != part.shape[axis] or 0 in sizes:
        raise UnsupportedError("two arrangements of one axis do not fit each other")
    pieces, at = part.pieces, part.first(axis)
    for done, inner in enumerate(math.prod(sizes[i + 1 :]) for i in range(len(sizes) - 1)):
        pieces = tuple(piece.refined(at + done, inner) for piece in pieces)
    return Assembly((*part.axes[:axis], sizes, *part.axes[axis + 1 :]), pieces)


@dataclass(frozen=True)
class Link:
    """Elements of one stored tensor and the elements of another that stand for the same.

    Attributes:
        ours: The first tensor's name.
        theirs: The other's.
        counts: Size of each axis of the box.
        our_strides: Elements of the first tensor from one index to the next.
        their_strides: The same of the other.
        our_offset: The first tensor's element at the box's first index.
        their_offset: The other's.
    """

    ours: str
    theirs: str
    counts: tuple[int, ...]
    our_strides: tuple[int, ...]
    their_strides: tuple[int, ...]
    our_offset: int
    their_offset: int


def link(ours: Assembly, theirs: Assembly) -> list[Link]:
    """Match the stored elements behind two arrangements of one tensor.

    Args:
        ours: The tensor as the first checkpoint stores it.
        theirs: As the other one does.

    Raises:
        UnsupportedError: The shapes differ, or the arrangements do not fit each other.
    """
    if ours.shape != theirs.shape:
        raise UnsupportedError(
            f"the model's tensor has shape {list(ours.shape)}; BASE's make one of "
            f"{list(theirs.shape)}"
        )
    for axis in range(len(ours.axes)):
        finer = max(ours.axes[axis], theirs.axes[axis], key=len)
        ours, theirs = refine(ours, axis, finer), refine(theirs, axis, finer)
    return list(_links(ours.pieces, theirs.pieces))


def _links(ours: Iterable[Piece], theirs: Sequence[Piece]) -> Iterator[Link]:
    same = {(piece.starts, piece.counts): piece for piece in theirs}
    for one in ours:
        equal = same.get((one.starts, one.counts))
        for other in [equal] if equal is not None else theirs:
            starts = tuple(map(max, one.starts, other.starts))
            ends = (
                min(s + n, t + m)
                for s, n, t, m in zip(
                    one.starts, one.counts, other.starts, other.counts, strict=True
                )
            )
            counts = tuple(end - start for start, end in zip(starts, ends, strict=True))
            if all(count > 0 for count in counts):
                yield Link(
                    one.stored,
                    other.stored,
                    counts,
                    one.strides,
                    other.strides,
                    one.offset + _moved(one, starts),
                    other.offset + _moved(other, starts),
                )


def _moved(piece: Piece, starts: tuple[int, ...]) -> int:
    steps = zip(starts, piece.starts, piece.strides, strict=True)
    return sum((start - first) * stride for start, first, stride in steps)
