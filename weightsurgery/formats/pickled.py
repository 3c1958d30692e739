"""Pickled PyTorch checkpoints: checked, loaded by a confined child, read from what it wrote.

The pickle is never read in this process. The child's only product is a safetensors file in a
private temporary directory; it is opened by the strict reader and unlinked at once, so that
nothing can be left behind, whatever happens afterwards. If this process is killed before, the
system ends the child, and the next run removes the directory.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

from weightsurgery.checkpoint import TensorView
from weightsurgery.errors import (
    FormatError,
    PolicyError,
    SettingError,
    StorageError,
    SurgeryError,
    shown,
)
from weightsurgery.formats import confined
from weightsurgery.formats.files import InputFile
from weightsurgery.formats.safetensors import open_safetensors
from weightsurgery.formats.strict_json import parse
from weightsurgery.formats.temporary import private_folder
from weightsurgery.formats.tmpdir import check_tmpdir
from weightsurgery.formats.torch_zip import check_archive

SECONDS = 60  # of CPU time for any file; twice that on the clock
_BYTES_A_SECOND = 20_000_000  # that even a slow disk reads and writes
_IMPORT = 120  # seconds more on the clock, for the child to import torch
_MEMORY = 512 << 20  # bytes for any file, besides three times its size
_MOST = 16 << 20  # bytes of tensors for any file, besides four times its size: shared ones count
_KILLERS = (signal.SIGXCPU, signal.SIGALRM, signal.SIGKILL)
_KEPT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "LC_ALL")  # of the environment


def open_pickled(file: InputFile) -> tuple[dict[str, TensorView], list[str]]:
    """Check a pickled checkpoint, and have a confined process turn it into safetensors.

    Args:
        file: The archive that torch.save wrote.

    Returns:
        The tensors, and warnings: which share memory in the archive, what is no tensor.

    Raises:
        FormatError: The archive is malformed.
        PolicyError: It asks for more than weights need: other classes, time, memory.
        SettingError: torch is not installed.
        StorageError: There is no room for the temporary file, TMPDIR is no directory, or a file
            cannot be read.
    """
    check_archive(file)
    check_tmpdir()
    with private_folder() as private:
        _require_room(private, file)
        made = os.path.join(private, "weights.safetensors")
        _convert(file, made, private)
        file.check_unchanged()
        views, metadata = _open_product(made, file)
    shared, warnings = _told(metadata, file)
    name = shown(os.path.basename(file.path))
    sharing = [
        f"{name}: {', '.join(map(shown, names[:5]))}{', …' if len(names) > 5 else ''} share memory;"
        " each is read as a tensor of its own"
        for names in shared
    ]
    return views, [*sharing, *(f"{name}: {shown(warning)}" for warning in warnings)]


def _told(metadata: dict[str, str], file: InputFile) -> tuple[list[list[str]], list[str]]:
    """What the child tells beside the tensors: names that share memory, and warnings."""
    told = parse(metadata.get("told", "").encode(), file=file.path, what="the child's report")
    told = told if isinstance(told, dict) else {}
    texts, groups = told.get("warnings"), told.get("shared")
    lists = [texts, *(groups if isinstance(groups, list) else [None])]
    if not all(isinstance(x, list) and all(isinstance(y, str) for y in x) for x in lists):
        raise FormatError(
            "the process that loaded it tells of it what is no list of texts",
            file=file.path,
            code="E-PICKLE-PRODUCT",
        )
    return lists[1:], lists[0]


def _open_product(made: str, file: InputFile) -> tuple[dict[str, TensorView], dict[str, str]]:
    try:
        return open_safetensors(InputFile(made, follow=False))
    except SurgeryError as error:  # it would name the temporary file
        raise FormatError(
            f"the process that loaded it wrote no valid safetensors file: {error.reason}",
            file=file.path,
            code="E-PICKLE-PRODUCT",
        ) from error


def _require_room(private: str, file: InputFile) -> None:
    found = os.statvfs(private)
    free = found.f_bavail * found.f_frsize
    if free < file.size:
        raise StorageError(
            f"{file.size:,} bytes are needed for a moment in {os.path.dirname(private)}, "
            f"{free:,} are free",
            file=file.path,
            hint="set TMPDIR to a directory with more room",
            code="E-PICKLE-ROOM",
        )


def _convert(file: InputFile, made: str, private: str) -> None:
    """Run the child, and tell how it ended if it did not end well."""
    seconds = SECONDS + file.size // _BYTES_A_SECOND
    limits = [4 * file.size + _MOST, 3 * file.size + _MEMORY, seconds]
    said = os.path.join(private, "said")
    command = [sys.executable, "-I", confined.__file__, str(file.fileno()), made]
    with open(said, "wb") as stderr, _running([*command, *map(str, limits)], file, stderr) as child:
        try:
            code: int | None = child.wait(_IMPORT + 2 * seconds)
        except subprocess.TimeoutExpired:
            code = None
    if code != 0:
        raise _explain(code, _last_line(said), file.path, seconds)


@contextmanager
def _running(command: list[str], file: InputFile, stderr: BinaryIO) -> Iterator[Any]:
    """The child, in a group of its own, which is gone at the end: also after Ctrl-C and SIGTERM.

    Its stdin is a pipe to which only this process could write: its end tells the child that this
    process has ended, however that was.
    """
    private = os.path.dirname(stderr.name)
    alive, here = os.pipe()
    # Between fork and the name `child` a signal's exception would leave it running.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        child = subprocess.Popen(
            command,
            stdin=alive,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            cwd=private,
            env=_environment(private),
            pass_fds=(file.fileno(),),
            start_new_session=True,
        )
    except BaseException:
        os.close(here)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        raise
    finally:
        os.close(alive)
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield child
    finally:
        with suppress(ProcessLookupError):  # it ended by itself
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        os.close(here)


def _environment(private: str) -> dict[str, str]:
    """What the child is told of this process's environment: next to nothing."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    own = dict.fromkeys(("HOME", "TMPDIR"), private)
    return {**kept, **own, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _last_line(said: str) -> str:
    with open(said, "rb") as file:
        file.seek(max(0, os.path.getsize(said) - 4096))
        line = file.read().rpartition(b"\n")[2]
    try:
        told: Any = json.loads(line)
    except ValueError:
        return ""
    return told if isinstance(told, str) else ""


def _explain(code: int | None, reason: str, path: str, seconds: int) -> SurgeryError:
    """The error for a child that ended with this code; None if it did not end."""
    slow = f"loading it took longer than {seconds} seconds, and was stopped"
    if code is None or -code in (signal.SIGXCPU, signal.SIGALRM):
        hint = "it may be made to hang; do not trust it"
        return PolicyError(slow, file=path, hint=hint, code="E-PICKLE-LIMIT")
    if -code in _KILLERS or code == confined.TOO_MUCH:
        reason = shown(reason) or "loading it was killed, perhaps for its memory"
        hint = "it may be made to exhaust memory or disk"
        return PolicyError(reason, file=path, hint=hint, code="E-PICKLE-LIMIT")
    if code == confined.REFUSED:
        hint = "do not load it in any other way"
        return PolicyError(shown(reason), file=path, hint=hint, code="E-PICKLE-REFUSED")
    if code == confined.UNFIT:
        hint = "whoever made it can save what is meant, as plain tensors"
        return PolicyError(shown(reason), file=path, hint=hint, code="E-PICKLE-UNFIT")
    if code == confined.UNABLE and reason:
        return SettingError(shown(reason), file=path, code="E-PICKLE-UNABLE")
    if code == confined.NO_ROOM:
        hint = "set TMPDIR to a directory with room"
        return StorageError(shown(reason), file=path, hint=hint, code="E-PICKLE-ROOM")
    told = code == confined.MALFORMED and reason
    reason = shown(reason) if told else f"the process that loaded it ended with code {code}"
    return FormatError(reason, file=path, code="E-PICKLE-LOAD")
