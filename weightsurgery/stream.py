"""The engine: blocks in order, any number of workers, the same result.

`map_tensors` is lazy and gives a checkpoint, `fold` is eager and gives a value. Work is cut by
the grid of `TensorView.blocks`, which depends on the tensor alone, and results are taken in the
order of that grid; so neither workers nor sharding can change a bit of them.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from weightsurgery.checkpoint import Checkpoint, TensorView
from weightsurgery.dtypes import DType
from weightsurgery.errors import NonFiniteError, SettingError
from weightsurgery.kernels import Block, all_finite, to_dtype, to_float
from weightsurgery.pairs import Pair

if TYPE_CHECKING:
    from weightsurgery.alignment import Alignment

Item = TypeVar("Item")
Result = TypeVar("Result")
State = TypeVar("State")

Edit = Callable[[str, int, Block, Block], Block]
BlockFunction = Callable[[Pair, int, Block, Block], Block]
Progress = Callable[[str, int, int], None]


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Engine:
    """How work is run; nothing here can change a result.

    Attributes:
        workers: Blocks worked on at a time; 0 means one for each core.
        executor: Runs the work; None makes a thread pool for each job. Whatever has the interface
            of `concurrent.futures.Executor` serves; it is not shut down.
        progress: Called as progress(what, bytes done, bytes in all), from the calling thread.
        kept: Where to keep what several calls on the same checkpoints have in common, such as
            scores, which then take memory as the model does; None keeps nothing. Begin with {}.

    Raises:
        SettingError: `workers` is negative.
    """

    workers: int = 0
    executor: Executor | None = None
    progress: Progress | None = None
    kept: dict[tuple[Hashable, ...], tuple[Any, Any]] | None = field(default=None, repr=False)

    def once(self, key: tuple[Any, ...], make: Callable[[], Result]) -> Result:
        """What `make` gives; with `kept`, made at the first call with this key.

        Args:
            key: All that the result depends on; checkpoints count by identity.
            make: Computes it.
        """
        if self.kept is None:
            return make()
        by = tuple(k if isinstance(k, str | int | float) else id(k) for k in key)
        if by not in self.kept:
            self.kept[by] = (key, make())  # the key keeps its objects, and so their ids, alive
        result: Result = self.kept[by][1]
        return result

    def keeping(self, key: tuple[Any, ...], compute: BlockFunction) -> BlockFunction:
        """The same function of blocks; with `kept`, it computes each block once.

        Args:
            key: As for `once`, without the block.
            compute: (pair, start, base block, tuned block) to an array; it depends on nothing
                but these and the key.
        """
        if self.kept is None:
            return compute
        blocks: dict[tuple[str, int, int], Block] = self.once((*key, "blocks"), dict)

        def look_up(pair: Pair, start: int, base: Block, tuned: Block) -> Block:
            place = (pair.key, start, tuned.size)
            if place not in blocks:
                blocks[place] = compute(pair, start, base, tuned).copy()
            return blocks[place].copy()  # whoever asked may change it

        return look_up

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise SettingError(f"workers is {self.workers}; expected 0 (all cores) or more")

    @property
    def width(self) -> int:
        """Blocks worked on at a time."""
        return self.workers or available_cores()

    def run(
        self, function: Callable[[Item], Result], items: Iterable[Item]
    ) -> Generator[tuple[Item, Result], None, None]:
        """Apply a function to items in parallel; results come in the items' order.

        At most `width` + 1 results are held at a time. When the caller stops early, by an error
        or by Ctrl-C, what has not begun is cancelled.
        """
        if self.width == 1 and self.executor is None:
            yield from ((item, function(item)) for item in items)
            return
        with self._pool() as pool:
            pending: deque[tuple[Item, object]] = deque()
            try:
                for item in items:
                    pending.append((item, pool.submit(function, item)))
                    if len(pending) > self.width:
                        done, future = pending.popleft()
                        yield done, future.result()  # type: ignore[attr-defined]
                while pending:
                    done, future = pending.popleft()
                    yield done, future.result()  # type: ignore[attr-defined]
            finally:
                for _, future in pending:
                    future.cancel()  # type: ignore[attr-defined]

    @contextmanager
    def _pool(self) -> Iterator[Executor]:
        if self.executor is not None:
            yield self.executor
            return
        with ThreadPoolExecutor(self.width) as pool:
            yield pool

    def report(self, what: str, done: int, total: int) -> None:
        """Tell the progress callback, if there is one."""
        if self.progress is not None:
            self.progress(what, done, total)


def map_tensors(
    edit: Edit,
    alignment: Alignment,
    *,
    dtype: Callable[[Pair], DType] | None = None,
    arithmetic: bool = False,
    allow_nonfinite: bool = False,
) -> Checkpoint:
    """A checkpoint whose eligible elements are what `edit` makes of them; nothing is read yet.

    Names, shapes, dtypes, metadata, layout and side files are TUNED's. What is not eligible is
    TUNED's, byte for byte.

    Args:
        edit: (key, start, tuned block, base block) to a block of the same size in TUNED's dtype.
            Blocks come in their stored dtypes; `start` is the index of the first element, `key`
            the tensor's name (tied copies get the name of the tensor they copy). It must not
            change the blocks it is given.
        alignment: What belongs together, from `align`.
        dtype: Gives the result's dtype where it is not TUNED's; then only the eligible tensors
            are in the result.
        arithmetic: True if `edit` computes new values, False if it only selects stored ones.
        allow_nonfinite: Let NaN and infinity in computed values pass.

    Returns:
        The edited checkpoint. Reading it raises NonFiniteError where a computed value is NaN or
        infinite, unless that is allowed.
    """
    check = arithmetic and not allow_nonfinite
    notes = {"alignment": alignment.to_json()}
    if dtype is not None:
        views = {
            pair.name: _edited(_whole(pair), edit, check, dtype(pair))
            for pair in alignment.eligible
        }
        kept = replace(alignment.tuned, layout={}, side_files=(), left_out=(), is_directory=False)
        return replace(kept, tensors=views, metadata={}, notes=notes)
    views = {
        pair.name: _edited(pair, edit, check, pair.tuned.dtype) if pair.eligible else pair.tuned
        for pair in alignment.pairs
    }
    warnings = (*alignment.tuned.warnings, *alignment.warnings)
    return replace(alignment.tuned, tensors=views, notes=notes, warnings=warnings)


def _whole(pair: Pair) -> Pair:
    """A pair cut to the rows up to its last eligible one, for results that hold nothing else."""
    view = pair.tuned
    last = pair.runs[-1][1] if pair.runs else pair.eligible
    width = math.prod(view.shape[1:])
    rows = -(-last // max(1, width))
    if not view.shape or rows >= view.shape[0]:
        return pair
    return replace(pair, tuned=replace(view, shape=(rows, *view.shape[1:])))


def _edited(pair: Pair, edit: Edit, check: bool, dtype: DType) -> TensorView:
    base = pair.base
    if base is None:
        raise ValueError(f"{pair.name}: eligible without a counterpart")

    def read_both(start: int, stop: int) -> tuple[Block, Block]:
        stored, subject = pair.tuned.read_both(start, stop)
        spans = list(pair.spans(start, stop))
        if spans == [(start, stop)]:
            return stored, edit_span(start, subject)
        same = dtype == pair.tuned.dtype  # else there is nothing to keep, as in a drift
        result = subject.copy() if same else np.zeros(subject.size, dtype.numpy)
        for first, last in spans:
            result[first - start : last - start] = edit_span(
                first, subject[first - start : last - start]
            )
        return stored, result

    def edit_span(start: int, subject: Block) -> Block:
        stop = start + subject.size
        other = base.read(start, stop)
        result = edit(pair.key, start, subject, other)
        if result.dtype != dtype.numpy or result.shape != subject.shape:
            raise ValueError(
                f"{pair.name}: the edit gave {result.dtype}{result.shape}, "
                f"expected {dtype.numpy}{subject.shape}"
            )
        if check and not all_finite(result):
            raise NonFiniteError(
                f"NaN or infinity among elements {start:,} to {stop:,}",
                tensor=pair.name,
                hint="see `wsurg diff`; --allow-nonfinite lets it pass",
            )
        if other.dtype != result.dtype and all_finite(other) and not all_finite(result):
            _refuse_overflow(pair, other, result)
        return result

    return TensorView(pair.name, pair.tuned.shape, dtype, read_both, "edited")


def _refuse_overflow(pair: Pair, other: Block, result: Block) -> None:
    """BASE and TUNED have other dtypes: a finite number of BASE's may not fit TUNED's.

    Raises:
        NonFiniteError: One became infinite by rounding.
    """
    wide = pair.base.dtype.name if pair.base else ""
    largest = float(np.max(np.abs(to_float(other)), initial=0.0))
    with np.errstate(over="ignore"):
        fits = np.isfinite(to_float(to_dtype(np.array([largest]), result.dtype)))[0]
    if not fits:
        raise NonFiniteError(
            f"{wide} in BASE, {pair.tuned.dtype.name} in TUNED, which cannot hold {largest:g}",
            tensor=pair.name,
            hint="leave the tensor out with --exclude, or convert a model first",
            code="E-OVERFLOW",
        )


def fold(
    step: Callable[[Pair, int, Block, Block], Result],
    combine: Callable[[State, Pair, int, Result], State],
    init: State,
    pairs: Iterable[Pair],
    *,
    engine: Engine,
    what: str,
) -> State:
    """Reduce the eligible elements of pairs to one value, block by block.

    Args:
        step: (pair, start, base block, tuned block) to a partial result; runs in the workers.
        combine: (state, pair, start, partial result) to the new state; runs in the calling
            thread, in the order of pairs and blocks, whatever the number of workers.
        init: The first state.
        pairs: What to read; tied copies too, if given.
        engine: How to run it.
        what: The work's name, for the progress display.

    Returns:
        The last state.
    """
    items = [
        (pair, *span)
        for pair in pairs
        for start, stop in pair.tuned.blocks()
        for span in pair.spans(start, stop)
    ]

    def work(item: tuple[Pair, int, int]) -> Result:
        pair, start, stop = item
        tuned = pair.tuned.read(start, stop)
        if pair.base is None or pair.base is pair.tuned:  # a tensor looked at on its own
            return step(pair, start, tuned, tuned)
        return step(pair, start, pair.base.read(start, stop), tuned)

    total = sum(_bytes_read(*item) for item in items)
    done, state = 0, init
    # Closed by name: left to the garbage collector, its threads could be joined at any place.
    with closing(engine.run(work, items)) as results:
        for (pair, start, stop), result in results:
            state = combine(state, pair, start, result)
            done += _bytes_read(pair, start, stop)
            engine.report(what, done, total)
    return state


def _bytes_read(pair: Pair, start: int, stop: int) -> int:
    count = pair.tuned.dtype.nbytes(stop - start)
    if pair.base is None or pair.base is pair.tuned:
        return count
    return count + pair.base.dtype.nbytes(stop - start)
