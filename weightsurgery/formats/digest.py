"""SHA-256 of bytes that come in order, taken in a thread beside the work."""

from __future__ import annotations

import hashlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any


class Digest:
    """SHA-256 in a thread of its own.

    Args:
        stack: What ends the thread.
        depth: Blocks that may wait to be hashed.
    """

    def __init__(self, stack: ExitStack, depth: int) -> None:
        self._depth = depth
        self._pool = stack.enter_context(ThreadPoolExecutor(1))
        self._digest = hashlib.sha256()
        self._pending: deque[Future[None]] = deque()

    def update(self, data: Any) -> None:
        """Take the next bytes; they must not change afterwards."""
        self._pending.append(self._pool.submit(self._add, data))
        if len(self._pending) > self._depth:
            self._pending.popleft().result()

    def finish(self) -> Future[str]:
        """The digest of what was given since the last call, once it is there."""
        return self._pool.submit(self._take)

    def _add(self, data: Any) -> None:
        self._digest.update(data)  # looked up here, in the thread: `_take` replaces it there

    def _take(self) -> str:
        digest, self._digest = self._digest, hashlib.sha256()
        return digest.hexdigest()


class NoDigest:
    """What stands in for a digest where none is wanted."""

    def update(self, data: Any) -> None:
        """Nothing."""

    def finish(self) -> None:
        """None."""
