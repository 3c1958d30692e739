"""Where an output goes, where it is built, the lock there, and the way from one to the other."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator

from weightsurgery.errors import BusyError, PolicyError, StorageError, SurgeryError
from weightsurgery.formats import disk
from weightsurgery.formats.layout import RECORD
from weightsurgery.formats.signals import signals_held

MARKER = ".commit"  # a file that tells that files were being moved to their places
_LOG = logging.getLogger(__name__)


def record_name(out: str, *, is_directory: bool) -> str:
    """File name of the record: inside a directory, or beside a file."""
    return RECORD if is_directory else f"{os.path.basename(os.path.abspath(out))}.{RECORD}"


def temporary_of(out: str) -> str:
    """Where an output is built, beside its place."""
    target = os.path.abspath(out)
    short = hashlib.blake2b(os.fsencode(os.path.basename(target)), digest_size=6).hexdigest()
    return os.path.join(os.path.dirname(target), f".wsurg-{short}")


def left_over(out: str) -> int:
    """Bytes that a killed run on this output left, which the next run clears or goes on with."""
    found = 0
    for folder, _, names in os.walk(temporary_of(out)):
        for name in names:
            with contextlib.suppress(OSError):
                found += os.lstat(os.path.join(folder, name)).st_size
    return found


def lock_directory(path: str, out: str) -> int:
    """A descriptor that holds the lock of an output's temporary directory, which is made.

    Raises:
        BusyError: Another run has it.
        StorageError: It cannot be made, opened or locked.
        PolicyError: Somebody else made it.
    """
    for _ in range(100):
        made = False
        with contextlib.suppress(FileExistsError), told("cannot create", path):
            disk.make_directory(path)
            made = True
        with contextlib.suppress(FileNotFoundError):  # the run that had it has just finished
            try:
                held = lock(path, out)
            except StorageError:
                if made:
                    clean(path)
                raise
            if is_at(held, path):
                if not made:
                    _check_owner(held, path)
                return held
            disk.close(held)  # it was moved away between opening and locking
    raise BusyError("other runs keep writing this output", file=out)


def _check_owner(held: int, path: str) -> None:
    """Refuse a directory of another user, who could change what is built in it; let go of it then.

    Raises:
        PolicyError: It is another user's.
    """
    if os.fstat(held).st_uid == os.geteuid():
        return
    disk.close(held)
    raise PolicyError(
        "where the output would be built lies a folder of another user",
        file=path,
        hint="remove it, or write to a folder where nobody else can",
        code="E-OUTPUT-OWNER",
    )


def lock(path: str, out: str) -> int:
    """A descriptor of a directory that holds its lock.

    Raises:
        BusyError: Another run has it.
        StorageError: It cannot be opened or locked.
    """
    try:
        held = disk.open_directory(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"cannot open: {error.strerror}", file=path) from error
    try:
        disk.lock(held)
    except BlockingIOError:
        os.close(held)
        raise BusyError("another run is writing this output", file=out) from None
    except OSError as error:
        os.close(held)
        raise StorageError(f"cannot lock: {error.strerror}", file=path) from error
    return held


def is_at(descriptor: int, path: str) -> bool:
    """Whether a descriptor's directory is still at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def clean(temporary: str, keep: tuple[str, ...] = ()) -> None:
    """Remove the temporary directory, or what in it is not to be kept."""
    for _ in range(2):
        try:
            if keep:
                disk.clear(temporary, keep)
            else:
                disk.remove_directory(temporary)
            return
        except OSError as error:
            why = error.strerror
    _LOG.warning("%s could not be removed (%s); the next run does", temporary, why)


def recover(out: str) -> None:
    """Take back half of a commit, if a run was killed in the middle of one."""
    temporary = temporary_of(out)
    if not any(os.path.lexists(p) for p in (_marker(temporary), f"{temporary}{disk.ASIDE}")):
        return
    with signals_held(), contextlib.suppress(BusyError), told("cannot restore", out):
        held = lock_directory(temporary, out)
        try:
            undo(temporary, os.path.abspath(out))
            clean(temporary)
        finally:
            disk.close(held)


def _marker(temporary: str) -> str:
    return os.path.join(temporary, MARKER)


def undo(temporary: str, out: str) -> None:
    """Put back what a killed run had moved, if it had not moved all; the lock is ours."""
    aside = f"{temporary}{disk.ASIDE}"
    if os.path.lexists(aside):  # the old directory, where the system cannot exchange two
        if os.path.lexists(out):
            disk.remove_directory(aside)
        else:
            disk.rename_new(aside, out)
    if not os.path.isfile(_marker(temporary)):
        return
    with open(_marker(temporary), "rb") as file:
        new = set(file.read(1000).decode("ascii", "replace").split())
    names = [record_name(out, is_directory=False), os.path.basename(out)]
    # Half is done only while a new file still waits here; once all had moved, what lies at their
    # places now is the output, or what somebody put there since.
    if any(_is_one_of(new, os.path.join(temporary, name)) for name in names):
        for name in names:
            place = os.path.join(os.path.dirname(out), name)
            if _is_one_of(new, place):
                move(place, os.path.join(temporary, name), overwrite=True)
    disk.remove(_marker(temporary))


def identity(path: str) -> str:
    """What tells a file from all others, also where it was moved; a removed one's inode returns."""
    found = os.lstat(path)
    return f"{found.st_ino}:{found.st_size}:{found.st_mtime_ns}"


def _is_one_of(identities: set[str], path: str) -> bool:
    return os.path.lexists(path) and identity(path) in identities


def move(source: str, target: str, *, overwrite: bool) -> None:
    """Rename; an existing target is exchanged (so it is never absent) or refused.

    Raises:
        PolicyError: Something is there that may not be replaced.
    """
    try:
        if overwrite and os.path.lexists(target):
            disk.exchange(source, target)
        else:
            disk.rename_new(source, target)
    except FileExistsError:
        reason = "appeared while this run was working"
        raise PolicyError(reason, file=target, code="E-OUTPUT-EXISTS") from None


@contextlib.contextmanager
def told(what: str, path: str) -> Iterator[None]:
    """Turn the system's errors into ours.

    Raises:
        StorageError: The system reported one.
    """
    try:
        yield
    except (SurgeryError, FileExistsError):
        raise
    except OSError as error:
        raise StorageError(f"{what}: {error.strerror}", file=path) from error
