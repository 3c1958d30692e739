"""Every error weightsurgery raises on purpose, and the exit code each one gives.

Each has a code too, a short word that stays the same while messages get better; `error_codes`
tells what they mean.

SurgeryError                1   (base class; never raised itself)
├── SettingError            2   a setting is out of range, unknown, or contradicts another
├── FormatError             3   an input is malformed
├── MismatchError           4   the inputs do not fit each other
│   └── NonFiniteError      4   NaN or infinity where arithmetic is asked
├── PolicyError             5   refused by policy
├── StorageError            6   the disk or the operating system said no
│   └── ChangedError        6   an input changed while it was read
├── BusyError               7   another run is writing the same output
├── GateError              10   a gate (`diff --fail-if`) failed
└── DemoError               1   a command of the demo failed
"""

from __future__ import annotations

import codecs
import os

_LONGEST_NAME = 200
codecs.lookup("unicode_escape")  # imported now, not while a hostile file is open


def shown(text: object) -> str:
    r"""Make hostile text safe to print: control characters escaped, cut at 200 characters.

    Example:
        >>> shown("a\nb\x1b[31m")
        'a\\nb\\x1b[31m'
    """
    start = str(text)[: _LONGEST_NAME + 1]  # no more of a hundred megabytes
    escaped = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in start
    )
    return escaped if len(escaped) <= _LONGEST_NAME else escaped[: _LONGEST_NAME - 1] + "…"


def counted(count: int, one: str, many: str = "") -> str:
    """A number and what there are so many of; the plural is `one` with an s unless it is given.

    Example:
        >>> counted(1, "tensor"), counted(2000, "matrix", "matrices")
        ('1 tensor', '2,000 matrices')
    """
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def first_few(texts: list[str], between: str = ", ") -> str:
    """The first three of several, and how many more there are.

    Example:
        >>> first_few(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    before = between if between != ", " else " "
    more = f"{before}and {len(texts) - 3:,} more" if len(texts) > 3 else ""
    return f"{between.join(texts[:3])}{more}"


class SurgeryError(Exception):
    """Base class: one line that says what, where, and what to do.

    Args:
        reason: What is wrong: what was expected, what was found.
        file: The file concerned, if one is.
        tensor: The tensor concerned, if one is.
        hint: What the user can do about it.
        code: The rule that was broken, one of `error_codes.CODES`; the error's own where none is
            given.
    """

    exit_code = 1
    code = "E-BUG"

    def __init__(
        self,
        reason: str,
        *,
        file: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
        hint: str = "",
        code: str = "",
    ) -> None:
        self.code = code or type(self).code
        self.reason = reason
        self.file = None if file is None else os.fspath(file)
        self.tensor = tensor
        self.hint = hint
        where = "" if self.file is None else f"{shown(self.file) or repr('')}: "
        where += "" if tensor is None else f"tensor '{shown(tensor)}': "
        super().__init__(where + reason + (f"; {hint}" if hint else ""))


class SettingError(SurgeryError):
    """A setting is out of range, unknown, or contradicts another."""

    exit_code = 2
    code = "E-SETTING"


def not_installed(package: str, extra: str, otherwise: str = "") -> SettingError:
    """The error for a package that one of ours needs for an extra thing.

    Args:
        package: What is missing.
        extra: The extra of weightsurgery that brings it.
        otherwise: What can be done without it.
    """
    hint = f"pip install 'weightsurgery[{extra}]' (in a clone: '.[{extra}]')"
    hint += f", or {otherwise}" if otherwise else ""
    return SettingError(
        f"the package {package} is not installed", hint=hint, code="E-NOT-INSTALLED"
    )


def conflict(reason: str, hint: str = "") -> SettingError:
    """The error for settings that exclude each other, or of which one needs another.

    Args:
        reason: Which.
        hint: What to leave out, or to give besides.
    """
    return SettingError(reason, hint=hint, code="E-SETTING-CONFLICT")


class FormatError(SurgeryError):
    """An input is malformed."""

    exit_code = 3
    code = "E-FORMAT"


class MismatchError(SurgeryError):
    """The inputs do not fit each other."""

    exit_code = 4
    code = "E-MISMATCH"


class NonFiniteError(MismatchError):
    """NaN or infinity where arithmetic is asked."""

    code = "E-NONFINITE"


class PolicyError(SurgeryError):
    """Refused by policy; the message names the flag, or the way round."""

    exit_code = 5
    code = "E-POLICY"


class StorageError(SurgeryError):
    """The disk or the operating system said no."""

    exit_code = 6
    code = "E-STORAGE"


class ChangedError(StorageError):
    """An input changed while it was read."""

    code = "E-CHANGED"


class BusyError(SurgeryError):
    """Another run is writing the same output."""

    exit_code = 7
    code = "E-BUSY"


class GateError(SurgeryError):
    """A gate failed: the comparison was made, and its answer is no."""

    exit_code = 10
    code = "E-GATE"


class DemoError(SurgeryError):
    """A command of the demo failed; its own message says why."""

    code = "E-DEMO-STEP"
