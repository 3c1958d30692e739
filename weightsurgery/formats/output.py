"""Output files: written beside their destination, made durable, then moved there in one step.

The temporary directory is a sibling of the output with a short name derived from it. It is the
lock too: whoever holds `flock` on it is the run that writes this output; a directory left by a
killed run is unlocked, and the next run clears it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import signal
import stat
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from weightsurgery.errors import BusyError, PolicyError, StorageError, SurgeryError, shown
from weightsurgery.formats.apart import check_apart
from weightsurgery.formats.layout import ADAPTER_CONFIG, CARD, RECORD, SIDE_FILES, WEIGHTS, fits

_NOREPLACE, _EXCHANGE = 1, 2
_WINDOW = 32 << 20  # bytes after which the system is told to begin writing to the disk
_WINDOWS = 4  # of a file at most on their way there
_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4  # what sync_file_range is asked to do
_NO_SUCH_CALL = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.ESPIPE)
_AT_FDCWD = -100
_APPEARED = "appeared while this run was working"


class OutputFile:
    """A new file in the temporary directory, written front to back.

    Every now and then the system is told to begin writing to the disk, so that making all durable
    at the end does not have to wait for everything; and what has arrived there leaves the page
    cache, so that a large model is written through a few pages again and again, which costs half
    of what new ones do, and does not push out the inputs.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with _told("cannot create", path):
            self._fd = os.open(path, flags, 0o666)
        self._size = 0
        self._windows = [0]  # where those begin that are not known to be on the disk

    def write(self, data: Any) -> None:
        """Append bytes.

        Raises:
            StorageError: The disk is full or the system reports an error.
        """
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        with _told("cannot write", self.path):
            while len(view):
                written = os.write(self._fd, view)
                view, self._size = view[written:], self._size + written
            if self._size - self._windows[-1] >= _WINDOW:
                self._write_out()

    def _write_out(self) -> None:
        _sync_range(self._fd, self._windows[-1], self._size, _WRITE)
        self._windows.append(self._size)
        if len(self._windows) > _WINDOWS:
            start, stop = self._windows[:2]
            _sync_range(self._fd, start, stop, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._fd, start, stop - start, os.POSIX_FADV_DONTNEED)
            del self._windows[0]

    def sync(self) -> None:
        """Make the bytes durable.

        Raises:
            StorageError: The system reports an error.
        """
        with _told("cannot write", self.path):
            os.fsync(self._fd)

    def close(self) -> None:
        """Close; what was not made durable may be lost."""
        os.close(self._fd)


class Output:
    """A context in which an output is built; `commit` makes it appear, anything else removes it.

    Args:
        out: Where the output will be: a directory or a file.
        is_directory: Which of the two.
        overwrite: Whether something that is there may be replaced.
        inputs: Paths that are read; the output must not touch them.

    Raises:
        PolicyError: The output exists, or would touch an input.
        BusyError: Another run is writing it.
        StorageError: It cannot be created.
    """

    def __init__(
        self, out: str, *, is_directory: bool, overwrite: bool, inputs: Sequence[str]
    ) -> None:
        self.out = os.path.abspath(out)
        self.is_directory = is_directory
        self.overwrite = overwrite
        self.parent = os.path.dirname(self.out)
        check_destination(out, is_directory=is_directory, overwrite=overwrite, inputs=inputs)
        short = hashlib.blake2b(os.fsencode(os.path.basename(self.out)), digest_size=6).hexdigest()
        self.temporary = os.path.join(self.parent, f".wsurg-{short}")
        self._locks: list[int] = []
        self._files: list[OutputFile] = []

    def __enter__(self) -> Output:
        try:
            with _signals_held():  # or Ctrl-C could fall between making and knowing of it
                self._locks.append(_lock_directory(self.temporary, self.out))
            with _told("cannot clear", self.temporary):
                _clear(self.temporary)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        while self._files:
            self._files.pop().close()
        # What is still there was not committed, or is what a commit replaced; unless, since the
        # commit, another run has begun there.
        if any(_is_at(lock, self.temporary) for lock in self._locks):
            shutil.rmtree(self.temporary, ignore_errors=True)
        while self._locks:
            os.close(self._locks.pop())

    def create(self, name: str) -> OutputFile:
        """A new file of the output; `commit` makes it durable."""
        self._files.append(OutputFile(os.path.join(self.temporary, name)))
        return self._files[-1]

    def write(self, name: str, data: bytes) -> None:
        """A small file of the output, whole."""
        self.create(name).write(data)

    def commit(self) -> None:
        """Move the output to its place: all of it, or nothing.

        Raises:
            PolicyError: Something appeared at the destination meanwhile.
            StorageError: The system reports an error.
        """
        for file in self._files:
            file.sync()
        with _signals_held(), _told("cannot put in place", self.out):
            _fsync_directory(self.temporary)
            if self.is_directory:
                # The umask's permissions, as any new directory would have.
                os.chmod(self.temporary, 0o777 & ~_umask())
                moves = [(self.temporary, self.out)]
                if self.overwrite and os.path.isdir(self.out):
                    # It is about to be at the temporary's path, where other runs look for a lock.
                    self._locks.append(_lock(self.out, self.out))
            else:
                names = sorted(os.listdir(self.temporary), key=lambda n: not n.endswith(RECORD))
                moves = [
                    (os.path.join(self.temporary, n), os.path.join(self.parent, n)) for n in names
                ]
            self._put_in_place(moves)

    def _put_in_place(self, moves: Sequence[tuple[str, str]]) -> None:
        """Move everything, or nothing: what was moved before an error goes back."""
        done: list[tuple[str, str]] = []
        try:
            for source, target in moves:
                _move(source, target, overwrite=self.overwrite)
                done.append((source, target))
            _fsync_directory(self.parent)
        except BaseException:
            for source, target in reversed(done):
                with contextlib.suppress(OSError):  # what went wrong first is what to tell
                    # What was replaced lies at the source, and is exchanged again.
                    _move(target, source, overwrite=True)
            raise


def record_name(out: str, *, is_directory: bool) -> str:
    """File name of the record: inside a directory, or beside a file."""
    return RECORD if is_directory else f"{os.path.basename(os.path.abspath(out))}.{RECORD}"


def check_destination(
    out: str, *, is_directory: bool, overwrite: bool, inputs: Sequence[str]
) -> None:
    """Everything that can be said against a destination before work begins.

    Raises:
        PolicyError: It exists and may not be replaced, or touches an input.
        StorageError: Its folder is not there or not writable.
    """
    target = os.path.abspath(out)
    parent = os.path.dirname(target)
    if not os.path.isdir(parent):
        reason = "the folder to write to does not exist"
        raise StorageError(reason, file=parent, code="E-OUTPUT-FOLDER")
    if not os.access(parent, os.W_OK | os.X_OK):
        reason = "the folder to write to is not writable"
        raise StorageError(reason, file=parent, code="E-OUTPUT-FOLDER")
    places = [target]
    if not is_directory:
        places.append(os.path.join(parent, record_name(target, is_directory=False)))
    for place in places:
        check_apart(place, inputs)
    for place in places:
        if not os.path.lexists(place):
            continue
        _check_replaceable(place, is_directory=is_directory)
        if not overwrite:
            raise PolicyError(
                "exists already",
                file=place,
                hint="--overwrite (overwrite=True) replaces it",
                code="E-OUTPUT-EXISTS",
            )


def _check_replaceable(place: str, *, is_directory: bool) -> None:
    """--overwrite replaces a model directory or a file, never a folder of other things."""
    mode = os.lstat(place).st_mode
    if not (stat.S_ISDIR(mode) if is_directory else stat.S_ISREG(mode)):
        wanted = "a directory" if is_directory else "a regular file"
        raise PolicyError(
            f"exists already, and is not {wanted}; only such is ever replaced here",
            file=place,
            hint="choose another output",
            code="E-OUTPUT-FOREIGN",
        )
    for name in os.listdir(place) if is_directory else []:
        known = fits(name, (*WEIGHTS, *SIDE_FILES, ADAPTER_CONFIG, CARD, RECORD, ".gitattributes"))
        if not known or not os.path.isfile(os.path.join(place, name)):
            raise PolicyError(
                f"exists already, and holds '{shown(name)}', which is not part of a model",
                file=place,
                hint="choose another output, or remove the directory yourself",
                code="E-OUTPUT-FOREIGN",
            )


def _lock_directory(path: str, out: str) -> int:
    for _ in range(100):
        with contextlib.suppress(FileExistsError), _told("cannot create", path):
            os.mkdir(path, 0o700)
        with contextlib.suppress(FileNotFoundError):  # the run that had it has just finished
            lock = _lock(path, out)
            if _is_at(lock, path):
                return lock
            os.close(lock)  # it was moved away between opening and locking
    raise BusyError("other runs keep writing this output", file=out)


def _lock(path: str, out: str) -> int:
    """A descriptor of a directory that holds its lock."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"cannot open: {error.strerror}", file=path) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise BusyError("another run is writing this output", file=out) from None
    return lock


def _is_at(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _clear(directory: str) -> None:
    """Remove what a killed run left; it is ours, for we hold the lock."""
    for entry in os.scandir(directory):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def _move(source: str, target: str, *, overwrite: bool) -> None:
    """Rename; an existing target is exchanged (so it is never absent) or refused."""
    exists = os.path.lexists(target)
    if exists and not overwrite:
        raise PolicyError(_APPEARED, file=target, code="E-OUTPUT-EXISTS")
    if _renameat2(source, target, _EXCHANGE if exists else _NOREPLACE):
        return
    if exists and os.path.isdir(target):  # a file system without renameat2
        aside = f"{source}-old"
        os.rename(target, aside)
        try:
            os.rename(source, target)
        except BaseException:
            os.rename(aside, target)
            raise
        os.rename(aside, source)
    else:
        os.replace(source, target)


def _sync_range(fd: int, start: int, stop: int, what: int) -> None:
    """Have a range written to the disk, where there is the call.

    An error must be told here: the system reports it once, and `fsync` would not see it again.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
    if call is None:
        return
    if call(fd, ctypes.c_longlong(start), ctypes.c_longlong(stop - start), what):
        number = ctypes.get_errno()
        if number not in _NO_SUCH_CALL:
            raise OSError(number, os.strerror(number))


def _renameat2(source: str, target: str, flags: int) -> bool:
    """True if done, False if this system or file system does not have the call."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    if number == errno.EEXIST:
        raise PolicyError(_APPEARED, file=target, code="E-OUTPUT-EXISTS")
    raise OSError(number, os.strerror(number))


def _fsync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait until the block is done.

    By handlers, not by a signal mask: another thread would take the signal, and Python would
    still run the handler here.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs handlers in the main thread alone
        return
    arrived: list[int] = []
    held = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda n, _: arrived.append(n)) for number in held]
    try:
        yield
    finally:
        for number, handler in zip(held, before, strict=True):
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for late in arrived:
            signal.raise_signal(late)


@contextlib.contextmanager
def _told(what: str, path: str) -> Iterator[None]:
    """Turn the system's errors into ours."""
    try:
        yield
    except (SurgeryError, FileExistsError):
        raise
    except OSError as error:
        raise StorageError(f"{what}: {error.strerror}", file=path) from error
