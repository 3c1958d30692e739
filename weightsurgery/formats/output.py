"""Output files: written beside their destination, made durable, then moved there in one step.

The temporary directory is a sibling of the output with a short name derived from it. It is the
lock too: whoever holds `flock` on it is the run that writes this output; a directory left by a
killed run is unlocked, and the next run clears it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from typing import Any

from weightsurgery.errors import (
    ChangedError,
    StorageError,
    SurgeryError,
    counted,
)
from weightsurgery.formats import disk
from weightsurgery.formats.destination import check_destination
from weightsurgery.formats.layout import RECORD
from weightsurgery.formats.place import (
    MARKER,
    clean,
    identity,
    is_at,
    lock,
    lock_directory,
    move,
    temporary_of,
    told,
    undo,
)
from weightsurgery.formats.signals import signals_held

_LOG = logging.getLogger(__name__)
_WINDOW = 32 << 20  # bytes after which the system is told to begin writing to the disk
_WINDOWS = 4  # of a file at most on their way there


class OutputFile:
    """A file in the temporary directory, written front to back; a new one unless said.

    Every now and then the system is told to begin writing to the disk, so that making all durable
    at the end does not have to wait for everything; and what has arrived there leaves the page
    cache, so that a large model is written through a few pages again and again, which costs half
    of what new ones do, and does not push out the inputs.
    """

    def __init__(self, path: str, *, new: bool = True) -> None:
        self.path = path
        with told("cannot create" if new else "cannot open", path):
            self._fd = disk.create(path) if new else disk.open_file(path)
        self._size = 0
        self._windows = [0]  # where those begin that are not known to be on the disk

    def write(self, data: Any) -> None:
        """Append bytes.

        Raises:
            StorageError: The disk is full or the system reports an error.
        """
        with told("cannot write", self.path):
            disk.write(self._fd, data)
            self._size += len(data)
            if self._size - self._windows[-1] >= _WINDOW:
                self._write_out()

    def _write_out(self) -> None:
        disk.sync_range(self._fd, self._windows[-1], self._size, disk.WRITE_OUT)
        self._windows.append(self._size)
        if len(self._windows) > _WINDOWS:
            start, stop = self._windows[:2]
            disk.sync_range(self._fd, start, stop, disk.WAIT)
            disk.drop_pages(self._fd, start, stop)
            del self._windows[0]

    def finish(self) -> None:
        """Make the bytes durable, and close.

        Raises:
            StorageError: The system reports an error.
        """
        with told("cannot write", self.path):
            disk.sync(self._fd)
            self._fd, closing = -1, self._fd
            disk.close(closing)

    def drop(self) -> None:
        """Close, if it is open; what was not made durable may be lost."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):  # the file goes anyway
                disk.close(self._fd)


class Output:
    """A context in which an output is built; `commit` makes it appear, anything else removes it.

    Args:
        out: Where the output will be: a directory or a file.
        is_directory: Which of the two.
        overwrite: Whether something that is there may be replaced.
        inputs: Paths that are read; the output must not touch them.
        resume: Whether what a run before left is to be looked at, not cleared at once.

    Raises:
        PolicyError: The output exists, or would touch an input.
        BusyError: Another run is writing it.
        StorageError: It cannot be created.
    """

    def __init__(
        self,
        out: str,
        *,
        is_directory: bool,
        overwrite: bool,
        inputs: Sequence[str],
        resume: bool = False,
    ) -> None:
        self.out = os.path.abspath(out)
        self.is_directory = is_directory
        self.overwrite = overwrite
        self.parent = os.path.dirname(self.out)
        check_destination(out, is_directory=is_directory, overwrite=overwrite, inputs=inputs)
        self.temporary = temporary_of(out)
        self.journal = ""  # name of a file in it that is not part of the output
        self.kept: list[str] = []  # what stays if the run is cut off, for another to go on with
        self._resume = resume
        self._stuck = False  # half is in place and could not be taken back: the next run does
        self._locks: list[int] = []
        self._files: list[OutputFile] = []
        self._folders: list[str] = []  # of the files in it, those above them first
        self._notes: list[OutputFile] = []

    def __enter__(self) -> Output:
        try:
            with signals_held():  # or Ctrl-C could fall between making and knowing of it
                self._locks.append(lock_directory(self.temporary, self.out))
            with told("cannot clear", self.temporary):
                undo(self.temporary, self.out)
                if not self._resume:
                    disk.clear(self.temporary)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, _kind: object = None, error: object = None, _trace: object = None) -> None:
        with signals_held():  # a second Ctrl-C must not leave half
            for file in (*self._files, *self._notes):
                file.drop()
            # What is still there was not committed, or is what a commit replaced; unless, since
            # the commit, another run has begun there.
            if not self._stuck and any(is_at(held, self.temporary) for held in self._locks):
                keep = (self.journal, *self.kept) if self.kept and _is_cut_off(error) else ()
                clean(self.temporary, keep)
                if keep:
                    _LOG.warning(
                        "%s left here; --resume goes on from there",
                        counted(len(self.kept), "finished file"),
                    )
            while self._locks:
                with contextlib.suppress(OSError):
                    disk.close(self._locks.pop())

    def create(self, name: str) -> OutputFile:
        """A new file of the output, by its path in it; `commit` makes it durable."""
        folder = os.path.dirname(name)
        if folder and folder not in self._folders:
            place = os.path.join(self.temporary, folder)
            with told("cannot create", place):
                disk.make_directories(place)
            self._folders.append(folder)
        self._files.append(OutputFile(os.path.join(self.temporary, name)))
        return self._files[-1]

    def note(self, name: str) -> OutputFile:
        """A new file beside the output's, which is no part of it and need not be durable."""
        self._notes.append(OutputFile(os.path.join(self.temporary, name)))
        return self._notes[-1]

    def adopt(self, name: str) -> None:
        """Take a file that a run before wrote; `commit` makes it durable."""
        self._files.append(OutputFile(os.path.join(self.temporary, name), new=False))

    def clear(self, keep: Sequence[str]) -> None:
        """Remove what a run before left, but for these names."""
        with told("cannot clear", self.temporary):
            disk.clear(self.temporary, tuple(keep))

    def write(self, name: str, data: bytes) -> None:
        """A small file of the output, whole."""
        self.create(name).write(data)

    def commit(self) -> None:
        """Move the output to its place: all of it, or nothing.

        Raises:
            PolicyError: Something appeared at the destination meanwhile.
            StorageError: The system reports an error.
        """
        while self._files:
            self._files[0].finish()
            del self._files[0]
        with signals_held(), told("cannot put in place", self.out):
            if self.journal:
                disk.remove(os.path.join(self.temporary, self.journal))
                self.kept.clear()
            moves = self._prepare_directory() if self.is_directory else self._prepare_files()
            for folder in _with_parents(self._folders):
                disk.sync_directory(os.path.join(self.temporary, folder))
            disk.sync_directory(self.temporary)
            self._put_in_place(moves)

    def _prepare_directory(self) -> list[tuple[str, str]]:
        # The umask's permissions, as any new directory would have.
        disk.set_mode(self.temporary, 0o777 & ~_umask())
        if self.overwrite and os.path.isdir(self.out):
            # It is about to be at the temporary's path, where other runs look for a lock.
            self._locks.append(lock(self.out, self.out))
        return [(self.temporary, self.out)]

    def _prepare_files(self) -> list[tuple[str, str]]:
        names = sorted(os.listdir(self.temporary), key=lambda n: not n.endswith(RECORD))
        moves = [(os.path.join(self.temporary, n), os.path.join(self.parent, n)) for n in names]
        # Two renames are two steps: whoever finds this file knows that the run died between.
        marker = OutputFile(os.path.join(self.temporary, MARKER))
        try:
            marker.write(" ".join(identity(source) for source, _ in moves).encode())
            marker.finish()
        finally:
            marker.drop()
        return moves

    def _put_in_place(self, moves: Sequence[tuple[str, str]]) -> None:
        """Move everything, or nothing: what was moved before an error goes back."""
        done: list[tuple[str, str]] = []
        try:
            for source, target in moves:
                move(source, target, overwrite=self.overwrite)
                done.append((source, target))
            disk.sync_directory(self.parent)
        except BaseException:
            for source, target in reversed(done):
                try:  # What was replaced lies at the source, and is exchanged again.
                    move(target, source, overwrite=True)
                except (OSError, SurgeryError):  # what went wrong first is what to tell
                    self._stuck = not _is_removed(target, unless=source)
            raise


def write_file(path: str, data: bytes) -> None:
    """Write a small file, or replace one: whole or not at all, and durable.

    For files that are no output with a record; nobody else may write the same one.

    Raises:
        StorageError: The system reports an error.
    """
    target = os.path.abspath(path)
    partial = f"{temporary_of(target)}.part"
    with told("cannot write", target):
        with contextlib.suppress(FileNotFoundError):
            disk.remove(partial)  # a killed run's
        try:
            file = OutputFile(partial)
            try:
                file.write(data)
                file.finish()
            finally:
                file.drop()
            disk.replace(partial, target)
            disk.sync_directory(os.path.dirname(target))
        finally:
            if os.path.lexists(partial):
                with contextlib.suppress(OSError):  # what went wrong first is what to tell
                    disk.remove(partial)


def _is_removed(path: str, *, unless: str) -> bool:
    """Remove a new file that could not be moved back; not where that would lose an old one."""
    if os.path.lexists(unless) or os.path.isdir(path):
        return False
    with contextlib.suppress(OSError):
        disk.remove(path)
        return True
    return False


def _is_cut_off(error: object) -> bool:
    """Whether a run ended by what another run may not meet: no room, Ctrl-C, SIGTERM."""
    if isinstance(error, Exception):
        return isinstance(error, StorageError | MemoryError) and not isinstance(error, ChangedError)
    return error is not None


def _with_parents(folders: Sequence[str]) -> list[str]:
    """Folders and those above them, the deepest first."""
    found = {folder for path in folders for folder in _prefixes(path)}
    return sorted(found, key=lambda folder: (-folder.count("/"), folder))


def _prefixes(path: str) -> list[str]:
    names = path.split("/")
    return ["/".join(names[: i + 1]) for i in range(len(names))]


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
