"""Errors in the words of the command line: flags for parameters, and only flags that there are.

The library says `max_length`, for that is what its caller wrote; who typed a command wrote
--max-length.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import click

from weightsurgery.errors import SurgeryError

_FLAG = re.compile(r"--[a-z][a-z-]*")
_CLAUSES = re.compile(r"(; |, or |\? )")
_DANGLING = re.compile(r"(; |, or |(?<=\?) )$")
_OTHER_PROGRAMS = ("wsurg ", "pip ")  # whose flags are not this command's
_PYTHON = re.compile(r" \(\w+=True\)")
# Where a word stands for a parameter; elsewhere "data" and "labels" are ordinary words.
_PLACES = tuple(
    map(
        re.compile,
        (
            r"(?<![\w.'\"/-])([a-z]+(?:_[a-z]+)+)(?![\w.'\"/-])",  # max_length
            r"`([a-z]+)`",
            r"(?<![\w'])([a-z]+)=(?=[a-z])",  # embeddings=pool
            r"^([a-z]+)(?= (?:is|are|needs|leaves) )",
            r"^([a-z]+)(?= and [a-z]+ leave )",
            r"(?<= and )([a-z]+)(?= leave )",
            r"(?<=give )([a-z]+)(?=$|,| too)",
        ),
    )
)


def in_flags(error: SurgeryError, parameters: Sequence[click.Parameter]) -> SurgeryError:
    """The same error as somebody should read it who typed the command.

    Args:
        error: From the library.
        parameters: The command's.
    """
    flags = {p.name or "": max(p.opts, key=len) for p in parameters if isinstance(p, click.Option)}
    known = [spelled for p in parameters for spelled in (*p.opts, *p.secondary_opts)]
    return type(error)(
        _translated(error.reason, flags),
        file=error.file,
        tensor=error.tensor,
        hint=_possible(_translated(error.hint, flags), known),
        code=error.code,
    )


def _translated(text: str, flags: Mapping[str, str]) -> str:
    """Parameters as flags."""

    def flag(match: re.Match[str]) -> str:
        spelled = flags.get(match[1])
        return match[0] if spelled is None else spelled + (" " if match[0].endswith("=") else "")

    text = _PYTHON.sub("", text)
    for place in _PLACES:
        text = place.sub(flag, text)
    return text


def _possible(hint: str, known: Sequence[str]) -> str:
    """A hint without the clauses that name flags the command does not have."""
    parts = _CLAUSES.split(hint)
    kept = ""
    for clause, end in zip(parts[::2], [*parts[1::2], ""], strict=True):
        others = any(program in clause for program in _OTHER_PROGRAMS)
        if others or set(_FLAG.findall(clause)) <= set(known):
            kept += clause + end
    return _DANGLING.sub("", kept)
