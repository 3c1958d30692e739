"""A private folder among the system's temporary ones, and those that killed runs left there.

Whoever works in one holds the lock of it. One that nobody holds was left by a process that was
killed; the next that needs such a folder removes it.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator

from weightsurgery.errors import BusyError, StorageError
from weightsurgery.formats import disk
from weightsurgery.formats.place import clean, is_at, lock, told
from weightsurgery.formats.signals import signals_held

_PREFIX = "wsurg-private-"
_OURS = re.compile(re.escape(_PREFIX) + r"[a-z0-9_]{8}")  # as tempfile.mkdtemp ends them


@contextlib.contextmanager
def private_folder() -> Iterator[str]:
    """A new folder that only this user may look into; it is gone at the end.

    Raises:
        StorageError: It cannot be made.
    """
    _remove_stale()
    path, held = "", -1
    try:
        with signals_held():  # or Ctrl-C could fall between making and knowing of it
            path, held = _make()
        yield path
    finally:
        if path:
            with signals_held():
                clean(path)
                disk.close(held)


def _make() -> tuple[str, int]:
    """A new folder and the descriptor that holds its lock."""
    for _ in range(100):
        with told("cannot create", tempfile.gettempdir()):
            path = tempfile.mkdtemp(prefix=_PREFIX)
        # Before it is locked another process may take it for stale.
        with contextlib.suppress(BusyError, FileNotFoundError):
            held = lock(path, path)
            if is_at(held, path):
                return path, held
            disk.close(held)
    raise StorageError("folders made there go away at once", file=tempfile.gettempdir())


def _remove_stale() -> None:
    """Remove this user's folders that nobody holds; what cannot be removed is another's affair."""
    with contextlib.suppress(OSError), os.scandir(tempfile.gettempdir()) as entries:
        for path in sorted(entry.path for entry in entries if _is_ours(entry)):
            with contextlib.suppress(OSError, BusyError, StorageError):
                held = lock(path, path)
                try:
                    disk.remove_directory(path)
                finally:
                    disk.close(held)


def _is_ours(entry: os.DirEntry[str]) -> bool:
    """Whether such a folder of this user's is there; in /tmp others may make what is called so."""
    return (
        _OURS.fullmatch(entry.name) is not None
        and entry.is_dir(follow_symlinks=False)
        and entry.stat(follow_symlinks=False).st_uid == os.getuid()
    )
