"""The system calls that put outputs on the disk. Nothing else in the package writes files.

All of them go through one door, `_perform`, so that a test can make the N-th of them fail, or kill
the process there. A call that a signal interrupted (EINTR) is repeated, a write that took a part
only is continued.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")

WRITE_OUT, WAIT = 2, 1 | 2 | 4  # what sync_file_range is asked: to begin, and to finish
_PATIENCE = 100  # times that a call may be interrupted before that is an error
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NOREPLACE, _EXCHANGE = 1, 2
_NO_SUCH_CALL = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
_AT_FDCWD = -100


def _perform(call: Callable[..., Result], *arguments: Any) -> Result:
    """The one door; tests put another in its place."""
    return call(*arguments)


def _patiently(call: Callable[..., Result], *arguments: Any) -> Result:
    for _ in range(_PATIENCE):
        with contextlib.suppress(InterruptedError):
            return _perform(call, *arguments)
    return _perform(call, *arguments)


def create(path: str) -> int:
    """A descriptor of a new file, to be written; an error where something is there."""
    return _patiently(os.open, path, _NEW, 0o666)


def open_file(path: str) -> int:
    """A descriptor of a file that is there, to be made durable; links are not followed."""
    return _patiently(os.open, path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)


def write(descriptor: int, data: Any) -> None:
    """Append all of the data."""
    view = memoryview(data).cast("B") if len(data) else memoryview(b"")
    while len(view):
        written = _patiently(os.write, descriptor, view)
        if not written:
            raise OSError(errno.EIO, "nothing was written")
        view = view[written:]


def sync(descriptor: int) -> None:
    """Make a file durable, or what a directory lists."""
    _patiently(os.fsync, descriptor)


def close(descriptor: int) -> None:
    """Close. Not repeated: the descriptor is gone whatever close says."""
    with contextlib.suppress(InterruptedError):
        _perform(os.close, descriptor)


def make_directory(path: str) -> None:
    """A new directory that nobody else may look into."""
    _patiently(os.mkdir, path, 0o700)


def make_directories(path: str) -> None:
    """A directory and those above it, where they are not there yet."""
    if not os.path.isdir(path):
        make_directories(os.path.dirname(os.path.abspath(path)))
        with contextlib.suppress(FileExistsError):
            _patiently(os.mkdir, path, 0o777)


def open_directory(path: str) -> int:
    """A descriptor of a directory; links are not followed."""
    return _patiently(os.open, path, _FOLDER)


def lock(descriptor: int) -> None:
    """Take the lock of an open file or directory.

    Raises:
        BlockingIOError: Another process has it.
    """
    _patiently(fcntl.flock, descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def set_mode(path: str, mode: int) -> None:
    """Change the permissions."""
    _patiently(os.chmod, path, mode)


def remove(path: str) -> None:
    """Remove a file."""
    _patiently(os.unlink, path)


def clear(directory: str, keep: tuple[str, ...] = ()) -> None:
    """Empty a directory; what is not there any more is no error.

    Args:
        directory: Which; one of ours, whose lock is held.
        keep: Files in it that stay, by their paths in it.
    """
    with os.scandir(directory) as entries:
        found = sorted((e.name, e.is_dir(follow_symlinks=False)) for e in entries)
    for name, is_directory in found:
        path, below = os.path.join(directory, name), f"{name}/"
        kept = tuple(k.removeprefix(below) for k in keep if k.startswith(below))
        if name in keep:
            continue
        with contextlib.suppress(FileNotFoundError):
            if is_directory and kept:
                clear(path, kept)
            else:
                _patiently(shutil.rmtree if is_directory else os.unlink, path)


def remove_directory(directory: str) -> None:
    """Remove a directory and what is in it."""
    clear(directory)
    _patiently(os.rmdir, directory)


def replace(source: str, target: str) -> None:
    """Rename over what is there."""
    _patiently(os.replace, source, target)


def rename_new(source: str, target: str) -> None:
    """Rename to where nothing is.

    Raises:
        FileExistsError: Something is there.
    """
    if _patiently(_renameat2, source, target, _NOREPLACE):
        return
    if os.path.lexists(target):  # a file system without renameat2
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
    _patiently(os.rename, source, target)


def exchange(source: str, target: str) -> None:
    """Let two paths change places; the target is never absent, where the system can do that."""
    if _patiently(_renameat2, source, target, _EXCHANGE):
        return
    aside = f"{source}{ASIDE}"
    if not os.path.isdir(target):
        _patiently(os.link, target, aside)
        _patiently(os.replace, source, target)
    else:
        _patiently(os.rename, target, aside)
        try:
            _patiently(os.rename, source, target)
        except BaseException:
            _patiently(os.rename, aside, target)
            raise
    _patiently(os.rename, aside, source)


ASIDE = "-old"  # for a moment the name of what is replaced, where the system cannot exchange


def sync_directory(path: str) -> None:
    """Make durable what a directory lists."""
    descriptor = open_directory(os.path.realpath(path))
    try:
        sync(descriptor)
    finally:
        close(descriptor)


def sync_range(descriptor: int, start: int, stop: int, what: int) -> None:
    """Have a range written to the disk, where there is the call.

    An error must be told here: the system reports it once, and `fsync` would not see it again.
    """
    _patiently(_sync_file_range, descriptor, start, stop, what)


def drop_pages(descriptor: int, start: int, stop: int) -> None:
    """Let the page cache forget a range that is on the disk."""
    if hasattr(os, "posix_fadvise"):
        advice = os.POSIX_FADV_DONTNEED
        _patiently(os.posix_fadvise, descriptor, start, stop - start, advice)


def _sync_file_range(descriptor: int, start: int, stop: int, what: int) -> None:
    call = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
    if call is None:
        return
    if call(descriptor, ctypes.c_longlong(start), ctypes.c_longlong(stop - start), what):
        number = ctypes.get_errno()
        if number not in (*_NO_SUCH_CALL, errno.ESPIPE):
            raise OSError(number, os.strerror(number))


def _renameat2(source: str, target: str, flags: int) -> bool:
    """True if done, False if this system or file system does not have the call."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_SUCH_CALL:
        return False
    raise OSError(number, os.strerror(number), target)
