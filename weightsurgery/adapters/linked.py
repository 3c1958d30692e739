"""Changes of parameters that BASE stores otherwise: several in one tensor, or one in several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from weightsurgery.adapters.parameters import Parameter
from weightsurgery.adapters.updates import (
    LowRank,
    LowRankRows,
    Magnitude,
    Replace,
    Shift,
    Update,
    is_added,
)
from weightsurgery.architecture.pieces import Link
from weightsurgery.architecture.views import linked_view
from weightsurgery.checkpoint import Checkpoint, TensorView
from weightsurgery.dtypes import DTYPES
from weightsurgery.kernels import Block, to_float
from weightsurgery.pairs import Pair


@dataclass(frozen=True)
class Linked:
    """Changes of parameters, in the order in which BASE stores their elements.

    Attributes:
        parts: The changes, all of one kind.
        values: What is added to each element, or what it becomes.
        factors: What the sum is multiplied by; None for 1.
        pair: The elements that are changed.
    """

    parts: tuple[Update, ...]
    values: TensorView
    factors: TensorView | None
    pair: Pair

    @property
    def sources(self) -> tuple[str, ...]:
        """See `Update`."""
        return tuple(source for part in self.parts for source in part.sources)

    def apply(self, values: Block, start: int) -> Block:
        """See `Update`."""
        result = values.copy()
        replaces = isinstance(self.parts[0], Replace)
        for first, last in self.pair.spans(start, start + values.size):
            here = result[first - start : last - start]
            new = to_float(self.values.read(first, last)).astype(values.dtype, copy=False)
            here[...] = new if replaces else here + new
            if self.factors is not None:
                here *= self.factors.read(first, last).astype(values.dtype, copy=False)
        return result


def parts_of(update: Update) -> tuple[Update, ...]:
    """The changes that an update is made of, as the adapter has them.

    Args:
        update: Of a tensor.
    """
    if isinstance(update, Linked):
        return update.parts
    return (update.stack,) if isinstance(update, LowRankRows) else (update,)


def distribute(
    base: Checkpoint, changes: Sequence[tuple[Parameter, Update]]
) -> Iterator[tuple[str, Update]]:
    """What changes of parameters do to the tensors that BASE stores.

    Args:
        base: The model.
        changes: The parameters and what is done to them, in order.

    Yields:
        BASE's name of a tensor, and an update of it.
    """
    linked: dict[tuple[str, type[Update]], list[tuple[Link, Update]]] = {}
    for parameter, update in changes:
        if not parameter.links:
            yield parameter.view.name, update
            continue
        for stored, links in _by_tensor(parameter.links).items():
            rows = _rows(base[stored], links, update)
            if rows is not None:
                yield stored, rows
            else:
                kind = linked.setdefault((stored, type(update)), [])
                kind += [(link, update) for link in links]
    for (stored, _), found in linked.items():
        yield stored, _linked(base[stored], found)


def _by_tensor(links: Iterable[Link]) -> dict[str, list[Link]]:
    found: dict[str, list[Link]] = {}
    for link in links:
        found.setdefault(link.theirs, []).append(link)
    return found


def _rows(stored: TensorView, links: Sequence[Link], update: Update) -> LowRankRows | None:
    """Rows of a low-rank product, where a stored tensor is just these."""
    if not isinstance(update, LowRank) or len(links) > 1 or len(stored.shape) != 2:
        return None
    (link,) = links
    size, width = stored.size, update.shape[1]
    first, rest = divmod(link.our_offset, width)
    whole = np.prod(link.counts) == size and link.their_offset == 0
    if not whole or rest or stored.shape[1] != width or not _is_contiguous(link):
        return None
    matrix, row = divmod(first, update.shape[0])
    if row + stored.shape[0] > update.shape[0]:
        return None
    return LowRankRows(update, matrix, row, stored.shape[0])


def _is_contiguous(link: Link) -> bool:
    expected = 1
    axes = zip(link.counts, link.our_strides, link.their_strides, strict=True)
    for count, ours, theirs in sorted((a for a in axes if a[0] > 1), key=lambda axis: axis[1]):
        if (ours, theirs) != (expected, expected):
            return False
        expected *= count
    return True


def _linked(stored: TensorView, found: Sequence[tuple[Link, Update]]) -> Linked:
    links = [_reversed(link) for link, _ in found]
    updates = {link.ours: update for link, update in found}
    dtype = "F64" if stored.dtype.name == "F64" else "F32"
    values = {name: _values(update, dtype) for name, update in updates.items()}
    view, runs = linked_view(stored, links, values)
    factors = None
    if any(isinstance(update, Magnitude) for update in updates.values()):
        scaled = {name: _factors(update, dtype) for name, update in updates.items()}
        factors = linked_view(stored, links, scaled)[0]
    count = sum(stop - start for start, stop in runs)
    pair = Pair(stored, view, count, runs=() if count == stored.size else runs)
    return Linked(tuple(updates.values()), view, factors, pair)


def _reversed(link: Link) -> Link:
    return replace(
        link,
        ours=link.theirs,
        theirs=link.ours,
        our_strides=link.their_strides,
        their_strides=link.our_strides,
        our_offset=link.their_offset,
        their_offset=link.our_offset,
    )


def _values(update: Update, dtype: str) -> TensorView:
    """What an update adds to each element of a parameter, or what it becomes."""
    if isinstance(update, Replace | Shift):
        size = update.by.size
    else:
        change = update.change if isinstance(update, Magnitude) else update
        if not isinstance(change, LowRank):
            raise ValueError(f"{type(update).__name__} changes stored tensors only")
        size = change.matrices * change.shape[0] * change.shape[1]
    kind = DTYPES[dtype]
    added = update.change if isinstance(update, Magnitude) else update

    def read_both(start: int, stop: int) -> tuple[Block, Block]:
        block = added.apply(np.zeros(stop - start, kind.numpy), start)
        return block, block

    return TensorView("", (size,), kind, read_both)


def _factors(update: Update, dtype: str) -> TensorView:
    if not isinstance(update, Magnitude):
        raise ValueError("only DoRA multiplies")
    kind, size = DTYPES[dtype], update.base.size

    def read_both(start: int, stop: int) -> tuple[Block, Block]:
        block = update.factors(start, stop - start, kind.numpy)
        return block, block

    return TensorView("", (size,), kind, read_both)


def is_all_added(update: Update) -> bool:
    """True for an update that only adds, so that it can be weighed or taken back.

    Args:
        update: Of a tensor.
    """
    return all(map(is_added, parts_of(update)))
