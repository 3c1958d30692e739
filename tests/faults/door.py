"""What stands in the door through which all output calls go (`weightsurgery.formats.disk`)."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from weightsurgery.formats import disk

Fault = Callable[..., Any]


class Door:
    """Lets calls through, but for the N-th, or all from the N-th on.

    Args:
        number: N, from 1.
        fault: Called as fault(call, arguments) in its place.
        persistent: Whether the fault stays.
    """

    def __init__(self, number: int, fault: Fault, *, persistent: bool = False) -> None:
        self.number, self.fault, self.persistent = number, fault, persistent
        self.calls: list[str] = []

    def __call__(self, call: Callable[..., Any], *arguments: Any) -> Any:
        self.calls.append(call.__name__)
        count = len(self.calls)
        if count == self.number or (self.persistent and count > self.number):
            return self.fault(call, arguments)
        return call(*arguments)

    @property
    def reached(self) -> bool:
        """Whether there was an N-th call."""
        return len(self.calls) >= self.number


@contextmanager
def standing(door: Door) -> Iterator[Door]:
    """Put a door in place."""
    before = disk._perform
    disk._perform = door  # type: ignore[assignment]
    try:
        yield door
    finally:
        disk._perform = before


_ROOMLESS = ("unlink", "rmdir", "rmtree", "close", "flock", "posix_fadvise")
_MOVES = ("_renameat2", "rename", "replace")


def error(code: int, *, lasting: bool = False) -> Fault:
    """The call fails; what needs no room does not fail for want of it.

    A descriptor is closed whatever close says; and on a disk that stays full there is room to
    move back what was moved.
    """
    roomless = (*_ROOMLESS, *(_MOVES if lasting else ()))

    def fault(call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if code in (errno.ENOSPC, errno.EDQUOT) and call.__name__ in roomless:
            return call(*arguments)
        if call is os.close:
            call(*arguments)
        raise OSError(code, os.strerror(code))

    return fault


def short(call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """A write takes only a part."""
    if call is os.write:
        descriptor, data = arguments
        return call(descriptor, data[: max(1, len(data) // 2)])
    return call(*arguments)


# Name to the fault, and whether it stays.
FAULTS: dict[str, tuple[Fault, bool]] = {
    "no room": (error(errno.ENOSPC), False),
    "no room from then on": (error(errno.ENOSPC, lasting=True), True),
    "input/output error": (error(errno.EIO), False),
    "input/output errors from then on": (error(errno.EIO), True),
    "quota": (error(errno.EDQUOT), False),
    "quota from then on": (error(errno.EDQUOT, lasting=True), True),
    "short write": (short, False),
    "short writes from then on": (short, True),
    "interrupted": (error(errno.EINTR), False),
    "interrupted from then on": (error(errno.EINTR), True),
}
SURVIVED = {"short write", "short writes from then on", "interrupted"}
