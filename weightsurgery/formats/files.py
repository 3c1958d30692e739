"""Input files: opened once, read with `pread`, checked again at the end, never changed."""

from __future__ import annotations

import difflib
import errno
import io
import itertools
import os
import stat
import threading
import weakref
from collections.abc import Callable
from typing import Any

from weightsurgery.checkpoint import FileRef
from weightsurgery.errors import ChangedError, FormatError, PolicyError, StorageError, shown
from weightsurgery.formats.running_hash import RunningHash

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class InputFile:
    """A regular file held open; every read goes through `pread` on its one descriptor.

    Not mmap: a file that is truncated under an mmap kills the process with SIGBUS, and mapped
    pages count as our memory.

    Args:
        path: The file. Opening does not block on a FIFO or a device; both are refused.
        follow: Whether it may be a symbolic link.

    Raises:
        StorageError: It does not exist or cannot be opened.
        FormatError: It is not a regular file.
    """

    def __init__(self, path: str, *, follow: bool = True) -> None:
        self.path = path
        try:
            self._fd = os.open(path, _FLAGS | (0 if follow else getattr(os, "O_NOFOLLOW", 0)))
        except OSError as error:
            hint = did_you_mean(path) if error.errno == errno.ENOENT else ""
            raise StorageError(
                f"cannot open: {error.strerror}", file=path, hint=hint, code=_code_of(error, path)
            ) from error
        weakref.finalize(self, os.close, self._fd)
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode):
            raise FormatError(
                "expected a regular file, found something else", file=path, code="E-FILE-KIND"
            )
        self._identity = identity_of(found)
        self.size = found.st_size
        self._hash: RunningHash | None = None

    def read_into(self, buffer: Any, offset: int) -> None:
        """Fill a writable buffer with the bytes at `offset`; nobody may change them afterwards.

        Raises:
            ChangedError: The file ends before the buffer is full: it was truncated meanwhile.
            StorageError: The system reports a read error.
        """
        self._fill(buffer, offset)
        if self._hash is not None:
            self._hash.offer(offset, buffer)

    def _fill(self, buffer: Any, offset: int) -> None:
        view = memoryview(buffer)
        while view.nbytes:
            try:
                got = os.preadv(self._fd, [view], offset)
            except OSError as error:
                raise StorageError(
                    f"cannot read: {error.strerror}", file=self.path, code="E-FILE-READ"
                ) from error
            if not got:
                raise ChangedError("the file became shorter while it was read", file=self.path)
            view, offset = view[got:], offset + got

    def read_bytes(self, offset: int, count: int) -> bytes:
        """`count` bytes at `offset`."""
        # Read into the very bytes that are returned: bytes(bytearray) would hold them twice.
        holder = io.BytesIO(bytes(count))
        self.read_into(holder.getbuffer(), offset)
        return holder.getvalue()

    def read_all(self, limit: int) -> bytes:
        """The whole file, refused above `limit` bytes.

        Raises:
            FormatError: The file is larger than the limit.
        """
        if self.size > limit:
            reason = f"{self.size:,} bytes; expected at most {limit:,}"
            raise FormatError(reason, file=self.path, code="E-FILE-LARGE")
        return self.read_bytes(0, self.size)

    def begin_hash(self) -> Callable[[], None]:
        """Hash what is read from now on, so that `sha256` has little left to do.

        Returns:
            What ends it, for a caller who did not get as far as `sha256`.
        """
        self._hash = RunningHash(self.size, self._read_apart)
        return self._end_hash

    def _end_hash(self) -> None:
        self._hash = None

    def sha256(self, stop: threading.Event | None = None) -> str:
        """SHA-256 of the whole file, in hexadecimal.

        Raises:
            CancelledError: `stop` was set before the end.
        """
        running, self._hash = self._hash, None
        return (running or RunningHash(self.size, self._read_apart)).finish(stop)

    def _read_apart(self, offset: int, count: int) -> bytes:
        data = bytearray(count)
        self._fill(data, offset)
        return bytes(data)

    def check_unchanged(self) -> None:
        """Compare device, inode, size and times of modification and change with those at opening.

        Raises:
            ChangedError: The file was written to, truncated or replaced.
        """
        try:
            now = {identity_of(os.fstat(self._fd)), identity_of(os.stat(self.path))}
        except OSError as error:
            raise ChangedError(
                f"gone while it was read: {error.strerror}", file=self.path
            ) from error
        if now != {self._identity}:
            raise ChangedError(
                "the file changed while it was read", file=self.path, hint="run again"
            )

    def __reduce__(self) -> Any:
        return _reopen, (self.path, self._identity)

    def ref(self) -> FileRef:
        """What checkpoints and records keep of this file."""
        name = os.path.basename(self.path)
        return FileRef(
            *(name, self.path, self.size, self._content),
            *(self.begin_hash, self.sha256, self.check_unchanged),
        )

    def _content(self) -> bytes:
        data = self.read_bytes(0, self.size)
        self.check_unchanged()  # now: a half-changed file would be told as malformed
        return data


def _code_of(error: OSError, path: str) -> str:
    if error.errno == errno.ELOOP:
        return "E-LINK-LOOP"
    if error.errno == errno.ENOENT:
        return "E-LINK-DANGLING" if os.path.islink(path) else "E-FILE-MISSING"
    return "E-FILE-OPEN"


_SIBLINGS = 1000  # looked at for a name that was meant
_NEAR = 0.75


def did_you_mean(path: str) -> str:
    """A hint that names the nearest path there is; "" if none is near.

    Args:
        path: Where nothing is.
    """
    folder, name = os.path.split(path.rstrip("/"))
    try:
        if os.path.lexists(path):
            return ""
        if os.path.isdir(folder or "."):
            return _nearest(folder, name)
        above, parent = os.path.split(folder)
        found = _nearest(above, parent, then=name) if os.path.isdir(above or ".") else ""
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return ""
    return found


def _nearest(folder: str, name: str, then: str = "") -> str:
    with os.scandir(folder or ".") as entries:
        names = sorted(entry.name for entry in itertools.islice(entries, _SIBLINGS))
    for near in difflib.get_close_matches(name, names, 1, _NEAR):
        found = os.path.join(folder, near, then) if then else os.path.join(folder, near)
        if os.path.lexists(found):
            return f"did you mean '{shown(found)}'?"
    return ""


def _reopen(path: str, identity: tuple[int, ...]) -> InputFile:
    """The same file in another process."""
    file = InputFile(path)
    if file._identity != identity:
        raise ChangedError("not the file that was opened at first", file=path, hint="run again")
    return file


def identity_of(found: os.stat_result) -> tuple[int, ...]:
    """What tells a file from others and from itself at another time.

    The time of the last change is among it: no program can set it back, as it can the time of
    modification. Another name, owner or mode of the file changes it too.
    """
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def open_member(directory: str, name: str, *, follow_links: bool = False) -> InputFile:
    """Open a file of a model directory.

    Unless links are followed, a link may lead only into the blobs/ of the hub cache's repository
    that the directory is a snapshot of, or lies in a snapshot of.

    Args:
        directory: The directory as the user named it.
        name: A plain file name in it.
        follow_links: Whether a link may lead anywhere.

    Raises:
        PolicyError: It is a link that leads elsewhere.
        StorageError: It cannot be opened.
        FormatError: It is not a regular file.
    """
    path = os.path.join(directory, name)
    if not os.path.islink(path):
        return InputFile(path, follow=follow_links)  # it may become a link in between
    blobs = _blobs_of(os.path.realpath(directory))
    if not follow_links and os.path.dirname(os.path.realpath(path)) != blobs:
        raise PolicyError(
            "a symbolic link that leads out of the model directory",
            file=path,
            hint="put the file itself in the directory, or pass --follow-links "
            "(follow_links=True) if you trust every link in it",
            code="E-LINK-OUT",
        )
    return InputFile(path)


def _blobs_of(directory: str) -> str:
    """Where the links of a hub cache's snapshot, or of a folder in one, lead; "" for others.

    Args:
        directory: Without links.

    Example:
        >>> _blobs_of("/cache/models--org--name/snapshots/0123/unet")
        '/cache/models--org--name/blobs'
        >>> _blobs_of("/models/unet")
        ''
    """
    above, name = os.path.split(directory)
    while name:
        home, parent = os.path.split(above)
        if parent == "snapshots":
            return os.path.join(home, "blobs")
        above, name = home, parent
    return ""
