"""Pieces and views against numpy: what is described is what stacking, joining and cutting give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightsurgery.architecture import views
from weightsurgery.architecture.conversion import UnsupportedError
from weightsurgery.architecture.pieces import (
    Assembly,
    join,
    link,
    refine,
    regroup,
    split,
    stack,
    transpose,
    whole,
)
from weightsurgery.architecture.views import linked_view, row_view
from weightsurgery.checkpoint import from_arrays

Both = tuple[Assembly, Any]  # a tensor as pieces, and as numpy has it


class Stored:
    """Stored tensors of distinct numbers."""

    def __init__(self) -> None:
        self.arrays: dict[str, Any] = {}
        self.count = 0

    def new(self, *shape: int) -> Both:
        name, size = f"t{len(self.arrays)}", int(np.prod(shape))
        self.arrays[name] = np.arange(self.count, self.count + size, dtype=np.float64).reshape(
            shape
        )
        self.count += size
        return whole(name, shape), self.arrays[name]


def experts(stored: Stored) -> Both:
    gates, ups = ([stored.new(3, 4) for _ in range(5)] for _ in range(2))
    fused = [stack([part for part, _ in side], 0) for side in (gates, ups)]
    arrays = [np.stack([array for _, array in side]) for side in (gates, ups)]
    return join(fused, 1), np.concatenate(arrays, 1)


def one_third(stored: Stored) -> Both:
    part, array = stored.new(9, 4)
    return split(part, 0, (3, 3, 3))[1], array[3:6]


def turned(stored: Stored) -> Both:
    part, array = stored.new(4, 3, 5)
    return transpose(part, 1, 2), array.transpose(0, 2, 1)


def interleaved(stored: Stored) -> Both:
    part, array = stored.new(3, 8, 2)
    expected = array.reshape(3, 4, 2, 2).transpose(0, 2, 1, 3).reshape(3, 8, 2)
    return regroup(part, 1, (4, 2), (1, 0)), expected


def rotary(stored: Stored) -> Both:
    part, array = stored.new(12, 5)
    expected = array.reshape(2, 3, 2, 5).transpose(0, 2, 1, 3).reshape(12, 5)
    return regroup(part, 0, (2, 3, 2), (0, 2, 1)), expected


def turned_experts(stored: Stored) -> Both:
    part, array = experts(stored)
    return transpose(part, 1, 2), array.transpose(0, 2, 1)


def half_of_an_interleaved_one(stored: Stored) -> Both:
    part, array = interleaved(stored)
    return split(part, 1, (4, 4))[1], array[:, 4:]


ARRANGEMENTS: dict[str, Callable[[Stored], Both]] = {
    found.__name__: found
    for found in (
        *(experts, one_third, turned, interleaved, rotary, turned_experts),
        half_of_an_interleaved_one,
    )
}


def read(view: Any, start: int, stop: int) -> Any:
    return view.read(start, stop)


@pytest.mark.parametrize("name", ARRANGEMENTS)
@pytest.mark.parametrize("span", [1 << 22, 4], ids=["at once", "row by row"])
def test_a_view_reads_what_numpy_makes(
    name: str, span: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "_SPAN", span)
    stored = Stored()
    part, expected = ARRANGEMENTS[name](stored)
    assert part.shape == expected.shape
    checkpoint = from_arrays({**stored.arrays, "like": np.ascontiguousarray(expected)})
    links = link(whole("like", expected.shape), part)
    view, runs = linked_view(checkpoint["like"], links, checkpoint)
    assert runs == ((0, expected.size),)
    flat = expected.reshape(-1)
    for start in range(flat.size):
        for stop in range(start + 1, flat.size + 1):
            assert read(view, start, stop).tolist() == flat[start:stop].tolist()


@pytest.mark.parametrize("name", ARRANGEMENTS)
@pytest.mark.parametrize("other", ARRANGEMENTS)
def test_two_arrangements_of_one_tensor_are_linked(name: str, other: str) -> None:
    """Either way: what one side stores is read through the other's, element by element."""
    ours, theirs = Stored(), Stored()
    (mine, array), (their, _) = ARRANGEMENTS[name](ours), ARRANGEMENTS[other](theirs)
    if mine.shape != their.shape:
        with pytest.raises(UnsupportedError, match="the model's tensor has shape"):
            link(mine, their)
        return
    try:
        links = link(mine, their)
    except UnsupportedError:
        assert {name, other} != {name}, "an arrangement fits itself"
        return
    # The value of the model's tensor at each place, under the names of either side.
    values = np.arange(array.size, dtype=np.float64).reshape(array.shape)
    holds = [{n: np.full(a.size, -1.0) for n, a in side.arrays.items()} for side in (ours, theirs)]
    for part, held in zip((mine, their), holds, strict=True):
        for one in link(whole("model", array.shape), part):
            for place in np.ndindex(*one.counts):
                at = one.our_offset + np.dot(place, one.our_strides)
                held[one.theirs][one.their_offset + np.dot(place, one.their_strides)] = (
                    values.reshape(-1)[int(at)]
                )
    for one in links:
        for place in np.ndindex(*one.counts):
            a = holds[0][one.ours][one.our_offset + int(np.dot(place, one.our_strides))]
            b = holds[1][one.theirs][one.their_offset + int(np.dot(place, one.their_strides))]
            assert a == b >= 0


def test_what_the_other_side_lacks_is_no_run() -> None:
    stored = Stored()
    parts = [stored.new(2, 3) for _ in range(3)]
    fused = stack([part for part, _ in parts], 0)
    lacking = Assembly(fused.axes, tuple(p for p in fused.pieces if p.stored != "t1"))
    checkpoint = from_arrays({**stored.arrays, "like": np.zeros((3, 2, 3))})
    view, runs = linked_view(
        checkpoint["like"], link(whole("like", (3, 2, 3)), lacking), checkpoint
    )
    assert runs == ((0, 6), (12, 18))
    assert read(view, 0, 18).tolist() == [*range(6), *[0] * 6, *range(12, 18)]


@settings(max_examples=100, deadline=None)
@given(st.permutations(range(7)), st.integers(0, 13), st.integers(1, 14))
def test_rows_in_another_order(order: list[int], start: int, count: int) -> None:
    array = np.arange(14.0).reshape(7, 2)
    checkpoint = from_arrays({"a": array, "like": array})
    rows = [(i, row, 1) for i, row in enumerate(order)]
    view, runs = row_view(checkpoint["like"], checkpoint["a"], rows, 2)
    stop = min(14, start + count)
    assert runs == ((0, 14),)
    assert read(view, start, stop).tolist() == array[order].reshape(-1)[start:stop].tolist()


def test_reads_are_bounded_by_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transposed matrix is never held whole once it is larger than what is read at once."""
    monkeypatch.setattr(views, "_SPAN", 64)
    array = np.arange(4096.0).reshape(64, 64)
    checkpoint = from_arrays({"a": array, "like": array})
    sizes: list[int] = []
    view = checkpoint["a"]
    read_both = view.read_both

    def counted(start: int, stop: int) -> Any:
        sizes.append(stop - start)
        return read_both(start, stop)

    object.__setattr__(view, "read_both", counted)
    links = link(whole("like", (64, 64)), transpose(whole("a", (64, 64)), 0, 1))
    seen, _ = linked_view(checkpoint["like"], links, checkpoint)
    assert read(seen, 0, 128).tolist() == array.T.reshape(-1)[:128].tolist()
    assert max(sizes) <= 2 * 128


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "other shapes": (
        lambda: stack([whole("a", (2, 3)), whole("b", (3, 2))], 0),
        "tensors to be stacked have different shapes",
    ),
    "other widths": (
        lambda: join([whole("a", (2, 3)), whole("b", (2, 4))], 0),
        "tensors to be joined have different shapes",
    ),
    "too many rows": (lambda: split(whole("a", (5, 2)), 0, (2, 2)), "5 rows cannot be split"),
    "within a group": (
        lambda: split(regroup(whole("a", (8,)), 0, (4, 2), (1, 0)), 0, (3, 5)),
        "split within a group",
    ),
    "no product": (lambda: refine(whole("a", (6,)), 0, (4, 2)), "do not fit each other"),
    "joined in groups": (
        lambda: join([regroup(whole("a", (4,)), 0, (2, 2), (1, 0))] * 2, 0),
        "interleaved tensors are joined",
    ),
    "a part of a group": (
        lambda: regroup(join([whole("a", (3,)), whole("b", (1,))], 0), 0, (2, 2), (1, 0)),
        "ends within a group of rows",
    ),
}


@pytest.mark.parametrize(("made", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_pieces_cannot_describe_is_refused(made: Callable[[], object], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        made()


def test_parts_of_other_dtypes_are_refused() -> None:
    checkpoint = from_arrays(
        {"a": np.zeros(2, np.float32), "b": np.zeros(2), "like": np.zeros((2, 2))}
    )
    links = link(whole("like", (2, 2)), stack([whole("a", (2,)), whole("b", (2,))], 0))
    with pytest.raises(UnsupportedError, match="different dtypes"):
        linked_view(checkpoint["like"], links, checkpoint)
