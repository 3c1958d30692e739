"""The hash of a file, taken from the reads of it that happen anyway."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

_CHUNK = 1 << 20  # bytes read at a time where nobody else reads them
_WAITING = 4  # reads that are kept until those before them have come
_GAP = 1 << 24  # bytes; a smaller gap in the reads is filled, a larger one left for the end

Read = Callable[[int, int], bytes]


class RunningHash:
    """SHA-256 of a file from front to back, fed by reads that come roughly in that order.

    What the reads leave out is read at the end, so the digest is always that of the whole file;
    only how much is read twice depends on their order. Bytes are hashed while they are still in
    the processor's cache, in the thread that has just read them.

    Args:
        size: Bytes of the file.
        read: (offset, count) to bytes, without feeding this hash.
    """

    def __init__(self, size: int, read: Read) -> None:
        self._size, self._read = size, read
        self._digest = hashlib.sha256()
        self._position = 0
        self._waiting: dict[int, memoryview] = {}
        self._lock = threading.Lock()

    def offer(self, offset: int, data: Any) -> None:
        """Take the bytes of a read; they must not change afterwards."""
        with self._lock:
            if offset < self._position or offset in self._waiting:
                return  # hashed already
            if len(self._waiting) >= _WAITING and not self._fill_gap():
                return  # too far from the rest; read again at the end
            self._waiting[offset] = memoryview(data).cast("B")
            self._advance()

    def finish(self, stop: threading.Event | None = None) -> str:
        """The digest of the whole file, in hexadecimal.

        Raises:
            CancelledError: `stop` was set before the end.
        """
        with self._lock:
            self._waiting.clear()
            while self._position < self._size:
                if stop is not None and stop.is_set():
                    raise CancelledError
                self._add(self._read(self._position, min(_CHUNK, self._size - self._position)))
            return self._digest.hexdigest()

    def _fill_gap(self) -> bool:
        """Read what is missing before the first read that waits, if it is little."""
        count = min(self._waiting) - self._position
        if count > _GAP:
            return False
        self._add(self._read(self._position, count))
        self._advance()
        return True

    def _advance(self) -> None:
        for offset in sorted(self._waiting):
            data = self._waiting[offset]
            if offset > self._position:
                return
            del self._waiting[offset]
            if offset == self._position:  # else a gap was filled across it
                self._add(data)

    def _add(self, data: Any) -> None:
        self._digest.update(data)
        self._position += len(data)
