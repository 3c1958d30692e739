"""The engine: order, bounds, cancellation, executors that are not ours, pickling."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest

from tests import cases
from weightsurgery.alignment import align
from weightsurgery.checkpoint import from_arrays
from weightsurgery.errors import NonFiniteError, SettingError
from weightsurgery.formats import open_checkpoint
from weightsurgery.operators.interpolate import interpolate
from weightsurgery.operators.mix import mix
from weightsurgery.stream import Engine, available_cores, fold, map_tensors

WORKERS = pytest.mark.parametrize("workers", cases.WORKERS)


@WORKERS
def test_results_come_in_the_order_of_the_items(workers: int) -> None:
    turn = threading.Barrier(workers)  # so that none can finish before its neighbours have begun

    def square(number: int) -> int:
        turn.wait(timeout=10)
        return number * number

    found = list(Engine(workers=workers).run(square, range(8)))
    assert found == [(i, i * i) for i in range(8)]


@WORKERS
def test_few_results_are_held(workers: int) -> None:
    begun: list[int] = []
    results = Engine(workers=workers).run(begun.append, range(100))
    for taken, _ in enumerate(results, 1):
        assert len(begun) <= taken + workers
    assert len(begun) == 100


@WORKERS
def test_items_are_asked_for_only_when_they_are_needed(workers: int) -> None:
    asked: list[int] = []

    def items() -> Iterator[int]:
        for i in range(100):
            asked.append(i)
            yield i

    results = Engine(workers=workers).run(str, items())
    assert asked == []
    next(results)
    assert len(asked) <= workers + 1
    results.close()


class Slow:
    """Blocks every call after the first until it is let go."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.go = threading.Event()

    def __call__(self, number: int) -> int:
        self.begun.append(number)
        if number:
            self.go.wait(timeout=10)
        return number


def test_closing_early_cancels_the_rest() -> None:
    slow = Slow()
    with ThreadPoolExecutor(1) as pool:
        results = Engine(workers=4, executor=pool).run(slow, range(100))
        assert next(results) == (0, 0)
        results.close()
        slow.go.set()
    assert len(slow.begun) <= 2  # of the five in flight: the first, and the one that was running


@WORKERS
def test_an_error_ends_the_run(workers: int) -> None:
    begun: list[int] = []

    def fail(number: int) -> int:
        begun.append(number)
        if number == 3:
            raise ZeroDivisionError("on purpose")
        return number

    results = Engine(workers=workers).run(fail, range(100))
    assert [next(results)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)
    assert len(begun) <= 4 + workers


class Recorder(Executor):
    """A foreign executor: runs at once, and remembers what was asked of it."""

    def __init__(self) -> None:
        self.calls = 0
        self.was_shut_down = False

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.calls += 1
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.was_shut_down = True


def test_a_foreign_executor_is_used_and_left_running() -> None:
    executor = Recorder()
    base, tuned = (from_arrays(arrays) for arrays in cases.pair())
    engine = Engine(workers=1, executor=executor)
    found = mix(base, tuned, select="drift", engine=engine)
    plain = mix(base, tuned, select="drift")
    assert cases.stored(cases.read(found)) == cases.stored(cases.read(plain))
    assert executor.calls > 10
    assert not executor.was_shut_down


class Elsewhere(Executor):
    """Sends everything through cloudpickle, as an executor on another machine would."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        function, arguments = cloudpickle.loads(cloudpickle.dumps((fn, args)))
        future: Future[Any] = Future()
        future.set_result(cloudpickle.loads(cloudpickle.dumps(function(*arguments))))
        return future


def test_folds_run_on_another_machine(tmp_path: Path) -> None:
    base, tuned = cases.pair("llama")
    opened = [
        open_checkpoint(cases.write_directory(tmp_path / name, arrays, shards=2))
        for name, arrays in (("base", base), ("tuned", tuned))
    ]
    there = mix(*opened, select="drift", engine=Engine(workers=2, executor=Elsewhere()))
    here = mix(*opened, select="drift")
    assert cases.stored(cases.read(there)) == cases.stored(cases.read(here))


@pytest.mark.parametrize("operator", [mix, interpolate], ids=["mix", "interpolate"])
def test_views_survive_a_round_trip(operator: Any, tmp_path: Path) -> None:
    base, tuned = cases.pair("llama")
    files = [
        cases.write_file(tmp_path / f"{name}.safetensors", arrays)
        for name, arrays in (("base", base), ("tuned", tuned))
    ]
    result = operator(*map(open_checkpoint, files))
    again = cloudpickle.loads(cloudpickle.dumps(result))
    assert cases.stored(cases.read(again)) == cases.stored(cases.read(result))
    assert again.step.operator == result.step.operator


def test_negative_workers_are_refused() -> None:
    with pytest.raises(SettingError, match=r"workers is -1; expected 0 \(all cores\) or more"):
        Engine(workers=-1)


def test_no_workers_means_all_cores() -> None:
    assert Engine().width == available_cores() >= 1
    assert Engine(workers=3).width == 3


# --- fold and map_tensors ---------------------------------------------------------------------


@WORKERS
def test_folds_combine_in_one_order(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cases.shrink_blocks(monkeypatch, 16)
    base, tuned = (from_arrays(arrays) for arrays in cases.pair())
    pairs = align(base, tuned).eligible
    progress: list[tuple[str, int, int]] = []

    def step(pair: Any, start: int, base: Any, tuned: Any) -> tuple[str, int, int]:
        return pair.name, start, base.size

    def combine(state: list[Any], pair: Any, start: int, result: Any) -> list[Any]:
        assert result[:2] == (pair.name, start)
        return [*state, result]

    engine = Engine(workers=workers, progress=lambda *report: progress.append(report))
    found = fold(step, combine, [], pairs, engine=engine, what="trying")
    expected = [(p.name, start, stop - start) for p in pairs for start, stop in p.tuned.blocks()]
    assert found == expected
    total = sum(p.tuned.nbytes + p.base.nbytes for p in pairs if p.base)
    assert progress[-1] == ("trying", total, total)
    assert [done for _, done, _ in progress] == sorted(done for _, done, _ in progress)


def test_a_fold_over_nothing_is_its_first_state() -> None:
    assert fold(max, max, "first", [], engine=Engine(), what="nothing") == "first"


@pytest.mark.parametrize(
    "edit",
    [lambda n, s, t, b: t[:-1], lambda n, s, t, b: t.astype(np.float64)],
    ids=["size", "dtype"],
)
def test_an_edit_of_another_size_or_dtype_is_our_bug(edit: Any) -> None:
    base, tuned = (from_arrays(arrays) for arrays in cases.pair())
    result = map_tensors(edit, align(base, tuned))
    with pytest.raises(ValueError, match="the edit gave float"):
        cases.read(result)


def test_computed_nan_is_refused_unless_allowed() -> None:
    base, tuned = (from_arrays(arrays) for arrays in cases.pair())

    def spoil(_name: str, _start: int, tuned: Any, base: Any) -> Any:
        return np.full_like(tuned, np.nan)

    alignment = align(base, tuned)
    with pytest.raises(NonFiniteError, match=r"NaN or infinity among elements 0 to \d+.*--allow"):
        cases.read(map_tensors(spoil, alignment, arithmetic=True))
    passed = cases.read(map_tensors(spoil, alignment, arithmetic=True, allow_nonfinite=True))
    assert np.isnan(passed[cases.EMBEDDING["bert"]]).all()
    assert cases.read(map_tensors(spoil, alignment)).keys() == passed.keys()
