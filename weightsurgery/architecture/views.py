"""Views: a tensor that is read through the stored tensors its elements lie in.

The view has the shape and element order of one checkpoint's tensor and reads another's, block by
block: a fused matrix out of a matrix per expert, rows of an embedding in another order, a
transposed weight. Memory is bounded by the block.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from weightsurgery.architecture.conversion import UnsupportedError
from weightsurgery.architecture.pieces import Link
from weightsurgery.checkpoint import TensorView
from weightsurgery.kernels import Block

Run = tuple[int, int]
_SPAN = 1 << 22  # elements read at once where a box's are spread over so many
_MOST_RUNS = 1 << 20


@dataclass(frozen=True)
class _Box:
    """Elements of the view that lie in one stored tensor.

    Attributes:
        source: The stored tensor.
        axes: Count, the view's stride and the stored tensor's stride of each axis; the view's
            strides fall.
        start: The first element of the view.
        offset: Its element in the stored tensor.
    """

    source: TensorView
    axes: tuple[tuple[int, int, int], ...]
    start: int
    offset: int

    @property
    def stop(self) -> int:
        """One past the last element of the view."""
        return self.start + 1 + sum((count - 1) * ours for count, ours, _ in self.axes)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(count for count, _, _ in self.axes)

    def runs(self) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        """First and one past the last element of each run of the view, shape (runs, 2)."""
        *outer, (count, ours, _) = self.axes or ((1, 1, 1),)
        length, outer = (count, outer) if ours == 1 else (1, list(self.axes))
        starts = np.full(1, self.start, np.int64)
        for number, stride, _ in outer:
            starts = (starts[:, None] + np.arange(number) * stride).reshape(-1)
        return np.stack([starts, starts + length], axis=1)


def linked_view(
    like: TensorView, links: Sequence[Link], sources: Mapping[str, TensorView]
) -> tuple[TensorView, tuple[Run, ...]]:
    """A view of the order and shape of one tensor that reads its counterparts.

    Args:
        like: The tensor whose name, shape and element order the view has.
        links: Where its elements lie.
        sources: The stored tensors by name, all of one dtype.

    Returns:
        The view, in the stored tensors' dtype, and the runs of elements (start, stop) that have a
        counterpart, in order. Elements outside of these read as zero.

    Raises:
        UnsupportedError: There is no link, or the stored tensors have different dtypes.
    """
    dtypes = {sources[link.theirs].dtype for link in links}
    if len(dtypes) != 1:
        raise UnsupportedError("its parts in BASE have different dtypes")
    boxes = sorted((_box(link, sources) for link in links), key=lambda box: box.start)
    dtype = dtypes.pop()
    starts = [box.start for box in boxes]
    reach = max(box.stop - box.start for box in boxes)

    def read_both(start: int, stop: int) -> tuple[Block, Block]:
        out = np.zeros(stop - start, dtype.numpy)
        first = bisect_right(starts, start - reach)
        for box in boxes[first : bisect_right(starts, stop - 1)]:
            _read(box.source, out, box.axes, box.start - start, box.offset)
        return out, out

    view = TensorView(like.name, like.shape, dtype, read_both)
    return view, _runs(boxes, like.size)


def row_view(
    like: TensorView, other: TensorView, rows: Sequence[tuple[int, int, int]], width: int
) -> tuple[TensorView, tuple[Run, ...]]:
    """A view of one matrix's order that reads the rows of another.

    Args:
        like: The matrix whose name, shape and order the view has.
        other: The matrix that is read.
        rows: (first row, first row of the other, number of rows) of what belongs together.
        width: Elements of a row.

    Returns:
        As `linked_view`.
    """
    links = [
        Link(like.name, other.name, (count * width,), (1,), (1,), ours * width, theirs * width)
        for ours, theirs, count in rows
    ]
    return linked_view(like, links, {other.name: other})


def _box(link: Link, sources: Mapping[str, TensorView]) -> _Box:
    axes = zip(link.counts, link.our_strides, link.their_strides, strict=True)
    merged: list[tuple[int, int, int]] = []
    for count, ours, theirs in sorted(
        (axis for axis in axes if axis[0] > 1), key=lambda axis: axis[1], reverse=True
    ):
        if merged and merged[-1][1:] == (count * ours, count * theirs):
            merged[-1] = (merged[-1][0] * count, ours, theirs)
        else:
            merged.append((count, ours, theirs))
    return _Box(sources[link.theirs], tuple(merged), link.our_offset, link.their_offset)


def _runs(boxes: Sequence[_Box], size: int) -> tuple[Run, ...]:
    if sum(box.size for box in boxes) == size:
        return ((0, size),)  # boxes are disjoint
    if sum(box.size // (box.axes[-1][0] if box.axes else 1) for box in boxes) > _MOST_RUNS:
        raise UnsupportedError("it is too fragmented to pair")
    found = np.concatenate([box.runs() for box in boxes])
    found = found[np.argsort(found[:, 0])]
    merged: list[list[int]] = []
    for start, stop in found.tolist():
        if merged and merged[-1][1] == start:
            merged[-1][1] = stop
        else:
            merged.append([start, stop])
    return tuple((start, stop) for start, stop in merged)


def _read(
    source: TensorView, out: Block, axes: tuple[tuple[int, int, int], ...], at: int, offset: int
) -> None:
    """Fill the part of a box that falls into `out`.

    Args:
        source: What is read.
        out: A block of the view.
        axes: Of the box.
        at: Place of the box's first element in `out`; may be outside.
        offset: Its element in the source.
    """
    extent = 1 + sum((count - 1) * ours for count, ours, _ in axes)
    if at >= out.size or at + extent <= 0:
        return
    if at >= 0 and at + extent <= out.size:
        _copy(source, out, axes, at, offset)
        return
    (count, ours, theirs), inner = axes[0], axes[1:]
    if not inner:
        first, last = max(0, -(at // ours)), min(count, -((at - out.size) // ours))
        if first < last:
            box = ((last - first, ours, theirs),)
            _copy(source, out, box, at + first * ours, offset + first * theirs)
        return
    wide = 1 + sum((c - 1) * o for c, o, _ in inner)
    # Of the indices whose inner box touches the block, all but at most two lie inside entirely.
    lowest, highest = max(0, (-at - wide) // ours + 1), min(count, -((at - out.size) // ours))
    first = max(0, -(at // ours))
    last = min(count, (out.size - at - wide) // ours + 1)
    if first < last:
        parts = ((last - first, ours, theirs), *inner)
        _copy(source, out, parts, at + first * ours, offset + first * theirs)
    else:
        first = last = highest
    for index in (*range(lowest, first), *range(last, highest)):
        _read(source, out, inner, at + index * ours, offset + index * theirs)


def _copy(
    source: TensorView, out: Block, axes: tuple[tuple[int, int, int], ...], at: int, offset: int
) -> None:
    """Fill a box that lies in `out` entirely, reading in the source's order."""
    order = sorted(axes, key=lambda axis: axis[2], reverse=True)
    shape = tuple(count for count, _, _ in order)
    size = out.dtype.itemsize
    target = np.lib.stride_tricks.as_strided(
        out[at:], shape, tuple(ours * size for _, ours, _ in order)
    )
    _fetch(source, target, [theirs for _, _, theirs in order], offset)


def _fetch(source: TensorView, target: Block, strides: Sequence[int], offset: int) -> None:
    span = 1 + sum(
        (count - 1) * stride for count, stride in zip(target.shape, strides, strict=True)
    )
    if span <= max(_SPAN, 2 * target.size) or not target.ndim:
        block = source.read(offset, offset + span)
        size = block.dtype.itemsize
        steps = tuple(stride * size for stride in strides)
        target[...] = np.lib.stride_tricks.as_strided(block, target.shape, steps)
        return
    for index in range(target.shape[0]):
        _fetch(source, target[index, ...], strides[1:], offset + index * strides[0])
