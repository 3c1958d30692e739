"""What memory an extraction takes, and how many workers a limit allows.

The numbers of bytes for each element are measured, and rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from weightsurgery.adapters.decompose import BEGIN, Drift, Wanted, is_exact
from weightsurgery.adapters.places import FACTORS, STACKS, Place
from weightsurgery.checkpoint import BLOCK, Checkpoint
from weightsurgery.errors import SettingError
from weightsurgery.formats.plan import INTERPRETER, fit_workers

_ALGEBRA = 48 << 20  # bytes that numpy's linear algebra takes before any matrix
_BLOCKS = 7  # of a drift at a time: both models', as stored and in float, and what comes of them


@dataclass(frozen=True)
class Work:
    """What the decomposition of one matrix takes, in bytes.

    Attributes:
        held: Its factors, until they are written.
        passing: What is let go when it is decomposed.
    """

    held: int
    passing: int


def work_on(
    rows: int, columns: int, rank: int, *, exact: bool, oversampling: int, itemsize: int
) -> Work:
    """The memory for one matrix.

    Args:
        rows: Of the drift.
        columns: Of the drift.
        rank: Directions that are looked for.
        exact: Whether it is decomposed exactly.
        oversampling: Further directions, where it is not.
        itemsize: Bytes of a number in the arithmetic: 4, or 8 for F64.
    """
    least = min(rows, columns)
    block = _BLOCKS * itemsize * max(BLOCK, columns)
    held = 4 * min(rank, least) * (rows + columns)
    if exact:
        return Work(held, block + 40 * rows * columns + 48 * least * least)
    width = min(rank + oversampling, least)
    there = (40 + 2 * itemsize) * columns * width
    return Work(held, block + there + 40 * rows * width + 48 * width * width)


def peak_of(works: Iterable[Work], workers: int, inputs: Sequence[Checkpoint]) -> int:
    """The most memory at a time, in making an adapter and in writing it, in bytes.

    Args:
        works: Of all its matrices.
        workers: Matrices at a time.
        inputs: BASE and TUNED.
    """
    found = list(works)
    held = sum(work.held for work in found)
    passing = sorted((work.passing for work in found), reverse=True)[:workers]
    passing += [_block(inputs)] * (workers - len(passing))  # of what is no matrix
    making = INTERPRETER + _ALGEBRA + sum(passing)
    turned = INTERPRETER + _ALGEBRA + held  # embeddings' and Conv1D's factors are copied
    return held + max(making, turned, fit_workers(inputs, workers, None)[1])


def fit_works(
    works: Sequence[Work], workers: int, limit: int | None, inputs: Sequence[Checkpoint]
) -> tuple[int, int]:
    """The largest number of workers, and its peak memory, that a memory limit allows.

    Args:
        works: Of all matrices.
        workers: At most.
        limit: Bytes; None sets no limit.
        inputs: BASE and TUNED.

    Raises:
        SettingError: Even one worker needs more.
    """
    need = peak_of(works, workers, inputs)
    while limit is not None and need > limit and workers > 1:
        workers -= 1
        need = peak_of(works, workers, inputs)
    if limit is not None and need > limit:
        raise SettingError(
            f"a memory limit of {limit:,} bytes is too small; one worker may need {need:,}",
            hint="raise the limit or lower the rank; beside energy, max_rank bounds it",
            code="E-MEMORY-LIMIT",
        )
    return workers, need


def works_expected(
    places: Iterable[Place], wanted: Wanted, inputs: Sequence[Checkpoint]
) -> list[Work]:
    """What an extraction may take, before anything is read.

    Nobody knows then how many directions a share of the energy takes: it counts as all that are
    allowed.

    Args:
        places: From `find_places`.
        wanted: How much to keep.
        inputs: BASE and TUNED.
    """
    works = []
    for place in places:
        if place.how == FACTORS:
            shape = place.pair.tuned.shape
            drift = Drift(place.pair, 0 if place.is_stack else None)
            least = min(drift.rows, drift.columns)
            rank = least if wanted.rank is None else min(wanted.rank, least)
            work = _expected(drift, wanted, rank, _itemsize(inputs))
            works.append(replace(work, held=work.held * (shape[0] if place.is_stack else 1)))
    return works


def _expected(drift: Drift, wanted: Wanted, rank: int, itemsize: int) -> Work:
    exact = is_exact(drift, wanted, rank)
    # Where the energy decides, fewer directions are looked for at first, at random if need be.
    ways = [exact] if wanted.energy is None or wanted.svd != "auto" else [exact, False]
    works = [
        work_on(
            *(drift.rows, drift.columns, rank),
            exact=way,
            oversampling=wanted.oversampling,
            itemsize=itemsize,
        )
        for way in ways
    ]
    return max(works, key=lambda work: work.passing)


def works_of(adapter: Checkpoint) -> list[Work]:
    """What an extraction took, by what came of it.

    Args:
        adapter: From `extract_adapter`.
    """
    step = adapter.step
    if step is None:
        raise ValueError("not from extract_adapter")
    itemsize = _itemsize([*step.inputs.values()])
    works = []
    for one in adapter.notes["adapter"]["matrices"]:
        rank, (rows, *rest) = one["rank"], one["shape"]
        matrices = 1
        if one["layout"] in STACKS and len(rest) == 2:
            matrices, (rows, *rest) = rows, rest
        looked_for = rank  # or up to twice as many, where the energy decides
        if step.settings["energy"] is not None:
            looked_for = min(max(BEGIN, 2 * rank), step.settings["max_rank"] or 2 * rank + BEGIN)
        work = work_on(
            *(rows, math.prod(rest), looked_for),
            exact=one["method"] == "exact",
            oversampling=step.settings["oversampling"] or 0,
            itemsize=itemsize,
        )
        works.append(replace(work, held=4 * matrices * rank * (rows + math.prod(rest))))
    return works


def _itemsize(inputs: Sequence[Checkpoint]) -> int:
    return 8 if any(view.dtype.bits == 64 for one in inputs for view in one.values()) else 4


def _block(inputs: Sequence[Checkpoint]) -> int:
    return _BLOCKS * _itemsize(inputs) * BLOCK
