"""What is written stays apart from what is read."""

from __future__ import annotations

import os
from collections.abc import Sequence

from weightsurgery.errors import PolicyError, shown


def check_apart(target: str, inputs: Sequence[str]) -> None:
    """Refuse a destination that is an input, lies in one, or holds one.

    Raises:
        PolicyError: It does.
    """
    real = os.path.realpath(target)
    for path in inputs:
        source = os.path.realpath(path)
        same = os.path.exists(target) and os.path.exists(path) and os.path.samefile(target, path)
        inside = os.path.isdir(source) and is_within(real, source)
        if same or inside or is_within(source, real):
            raise PolicyError(
                f"the output would overlap the input {shown(path)}",
                file=target,
                hint="choose another output",
                code="E-OUTPUT-OVERLAP",
            )


def is_within(path: str, folder: str) -> bool:
    """Whether a path is a folder's own, or lies in it; both without links."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
