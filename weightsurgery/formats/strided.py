"""Row-major elements of a tensor whose storage has another order: transposed, cut, expanded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from weightsurgery.buffers import empty
from weightsurgery.kernels import Block

_Box = tuple[int, tuple[int, ...], tuple[int, ...]]  # its first element, shape and strides
# A read costs as much as some hundred elements: shorter runs are read together with what lies
# between them, if that is not more than this many elements for one that is wanted.
_LONG, _SPARSEST = 256, 4


def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether row-major order is the order of the storage.

    Example:
        >>> is_contiguous((2, 3), (3, 1)), is_contiguous((2, 3), (1, 2)), is_contiguous((1,), (9,))
        (True, False, True)
    """
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return not math.prod(shape)
        step *= size
    return True


def gather(
    read: Callable[[int, int], Block], box: _Box, start: int, stop: int, dtype: np.dtype[Any]
) -> Block:
    """Elements [start, stop) of a strided tensor, in row-major order.

    Reads little more than the elements that are wanted, in runs as long as the storage has them.

    Args:
        read: (first, count) to elements of the storage.
        box: The tensor: its first element in the storage, shape and strides, all in elements.
        start: The first one.
        stop: The one after the last.
        dtype: Of a block.
    """
    offset, shape, strides = box
    found, at = empty(stop - start, dtype), 0
    for part in _boxes(offset, shape, strides, start, stop):
        size = math.prod(part[1])
        _read_box(read, part, found[at : at + size].reshape(part[1]))
        at += size
    return found


def _boxes(
    offset: int, shape: tuple[int, ...], strides: tuple[int, ...], start: int, stop: int
) -> Iterator[_Box]:
    """Cut a run of elements into whole boxes: the end of a row, rows, the beginning of one."""
    if start >= stop:
        return
    if not shape:
        yield offset, shape, strides
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner
    below = (shape[1:], strides[1:])
    if first > last:
        row = last * inner
        yield from _boxes(offset + last * strides[0], *below, start - row, stop - row)
        return
    if start < first * inner:
        row = (first - 1) * inner
        yield from _boxes(offset + (first - 1) * strides[0], *below, start - row, inner)
    if first < last:
        yield offset + first * strides[0], (last - first, *shape[1:]), strides
    if last * inner < stop:
        yield from _boxes(offset + last * strides[0], *below, 0, stop - last * inner)


def _read_box(read: Callable[[int, int], Block], box: _Box, out: Block) -> None:
    """Fill `out` with a box: the dimensions that lie densely in one read, for each of the rest."""
    offset, shape, strides = box
    own = [axis for axis in range(len(shape)) if shape[axis] > 1 and strides[axis]]
    own.sort(key=lambda axis: strides[axis])
    span, count, dense = 1, 1, 0
    for axis in own:
        wider, more = span + (shape[axis] - 1) * strides[axis], count * shape[axis]
        if wider > more * (_SPARSEST if span < _LONG else 1):
            break
        span, count, dense = wider, more, dense + 1
    inner, outer = set(own[:dense]), own[dense:][::-1]
    sizes = [shape[axis] if axis in inner else 1 for axis in range(len(shape))]
    for index in np.ndindex(*(shape[axis] for axis in outer)):
        first = offset + sum(i * strides[axis] for i, axis in zip(index, outer, strict=True))
        block = read(first, span)
        steps = [strides[axis] * block.itemsize for axis in range(len(shape))]
        place: list[Any] = [slice(None)] * len(shape)
        for i, axis in zip(index, outer, strict=True):
            place[axis] = slice(i, i + 1)
        out[tuple(place)] = as_strided(block, sizes, steps)
