"""The hash that is fed by the reads of others: always that of the whole file."""

from __future__ import annotations

import hashlib
import random
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from weightsurgery.formats import running_hash
from weightsurgery.formats.running_hash import RunningHash

DATA = random.Random(7).randbytes(10_000)
DIGEST = hashlib.sha256(DATA).hexdigest()


class Counted:
    """A hash of DATA that tells how many bytes it read by itself."""

    def __init__(self) -> None:
        self.read_apart = 0
        self.hash = RunningHash(len(DATA), self._read)

    def _read(self, offset: int, count: int) -> bytes:
        self.read_apart += count
        return DATA[offset : offset + count]

    def offer(self, start: int, stop: int) -> None:
        self.hash.offer(start, DATA[start:stop])


def blocks(first: int = 0, step: int = 100) -> list[tuple[int, int]]:
    return [(i, min(i + step, len(DATA))) for i in range(first, len(DATA), step)]


def test_reads_in_order_are_all_it_needs() -> None:
    counted = Counted()
    for block in blocks():
        counted.offer(*block)
    assert (counted.hash.finish(), counted.read_apart) == (DIGEST, 0)


def test_neighbours_may_swap() -> None:
    counted = Counted()
    order = blocks()
    order[::2], order[1::2] = order[1::2], order[::2]
    for block in order:
        counted.offer(*block)
    assert (counted.hash.finish(), counted.read_apart) == (DIGEST, 0)


def test_a_header_that_nobody_reads_is_filled_in() -> None:
    counted = Counted()
    for block in blocks(first=300):
        counted.offer(*block)
    assert (counted.hash.finish(), counted.read_apart) == (DIGEST, 300)


def test_a_large_gap_is_left_for_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running_hash, "_GAP", 1000)
    counted = Counted()
    for block in blocks(first=5000):
        counted.offer(*block)
    assert counted.read_apart == 0
    assert (counted.hash.finish(), counted.read_apart) == (DIGEST, len(DATA))


@pytest.mark.parametrize("seed", range(20))
def test_any_order_overlap_or_repetition(seed: int) -> None:
    chance = random.Random(seed)
    counted = Counted()
    for _ in range(chance.randrange(300)):
        start = chance.randrange(len(DATA))
        counted.offer(start, min(len(DATA), start + chance.randrange(1, 700)))
    assert counted.hash.finish() == DIGEST


def test_many_threads() -> None:
    counted = Counted()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda block: counted.offer(*block), blocks()))
    assert counted.hash.finish() == DIGEST


def test_nothing_read_at_all() -> None:
    assert Counted().hash.finish() == DIGEST
    assert RunningHash(0, lambda *_: b"").finish() == hashlib.sha256().hexdigest()


def test_it_can_be_stopped() -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(CancelledError):
        Counted().hash.finish(stop)
