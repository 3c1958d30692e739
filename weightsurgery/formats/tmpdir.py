"""The system's directory for temporary files, where the user has chosen it."""

from __future__ import annotations

import contextlib
import os
import tempfile

from weightsurgery.errors import StorageError

_CHOICES = ("TMPDIR", "TEMP", "TMP")  # as tempfile goes through them


def check_tmpdir() -> None:
    """Refuse a TMPDIR that cannot be used; Python would pass it over, and take another directory.

    Raises:
        StorageError: It is no directory, or not writable.
    """
    name = next((choice for choice in _CHOICES if os.environ.get(choice)), "")
    given = os.environ.get(name, "")
    if not given or tempfile.gettempdir() == os.path.abspath(given):
        return
    reason = "nothing can be written there" if os.path.isdir(given) else "it is no directory"
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=given):
        return  # the program has chosen another by itself
    raise StorageError(
        f"{name} names it for temporary files, but {reason}",
        file=given,
        hint=f"set {name} to a directory with room, or unset it",
        code="E-PICKLE-TMPDIR",
    )
