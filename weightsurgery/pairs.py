"""A pair: a tensor of TUNED's and its counterpart in BASE."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from weightsurgery.checkpoint import TensorView


class Status(Enum):
    """Whether a tensor of TUNED's may be edited, or why not."""

    PAIRED = "paired"
    PARTLY = "partly paired"
    ROWS = "tokens that BASE lacks"
    EMPTY = "empty"
    MISSING = "not in BASE"
    HEAD = "a task head that BASE lacks"
    ARRANGEMENT = "arranged otherwise in BASE"
    SHAPE = "another shape in BASE"
    DTYPE = "another dtype in BASE"
    FLOATING = "floating on one side"
    BYTES = "not floating"
    LEFT_OUT = "left out on request"


@dataclass(frozen=True)
class Pair:
    """One tensor of TUNED and its counterpart in BASE.

    Attributes:
        tuned: The tensor whose name, shape and dtype results have.
        base: Its counterpart; None if it has none. Where an element may be edited, the
            counterpart's element of the same number is the one that belongs to it.
        eligible: How many elements may be edited; 0 keeps all of TUNED's.
        reason: Why not all of them, "" if all.
        key: The name random masks are drawn under: that of the tensor this one is tied to.
        note: Something the report should say about the pair, "" if nothing.
        status: The reason as one of a closed set.
        runs: The elements (start, stop) that may be edited, in order; () for the first `eligible`.
        names: The tensors of BASE that the counterpart is read from.
    """

    tuned: TensorView
    base: TensorView | None
    eligible: int
    reason: str = ""
    key: str = ""
    note: str = ""
    status: Status = Status.PAIRED
    runs: tuple[tuple[int, int], ...] = ()
    names: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """TUNED's name for the tensor."""
        return self.tuned.name

    @property
    def is_tied_copy(self) -> bool:
        """True if another pair stands for the same weights."""
        return self.key != self.tuned.name

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The runs of elements between two that may be edited.

        Args:
            start: The first element.
            stop: One past the last.
        """
        if not self.runs:
            if start < min(stop, self.eligible):
                yield start, min(stop, self.eligible)
            return
        if not self.eligible:
            return
        first = max(0, bisect_right(self.runs, (start, self.tuned.size)) - 1)
        for begin, end in self.runs[first:]:
            if begin >= stop:
                return
            if max(begin, start) < min(end, stop):
                yield max(begin, start), min(end, stop)

    @property
    def has_whole_rows(self) -> bool:
        """True if what may be edited begins and ends with rows."""
        width = self.tuned.width
        return bool(width) and not any(start % width or stop % width for start, stop in self.runs)
