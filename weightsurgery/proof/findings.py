"""What `verify` has found so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from weightsurgery.checkpoint import TensorView
from weightsurgery.formats.files import InputFile
from weightsurgery.formats.recorded import Recorded


@dataclass
class Found:
    """What is there, and what is wrong with it.

    Attributes:
        out: The output.
        is_directory: Whether it is a folder.
        recorded: Its record.
        files: The recorded files that could be opened.
        views: The recorded tensors that could be opened, file by file, in their order there.
        problems: What is wrong.
    """

    out: str
    is_directory: bool
    recorded: Recorded
    files: dict[str, InputFile] = field(default_factory=dict)
    views: list[TensorView] = field(default_factory=list)
    problems: list[dict[str, Any]] = field(default_factory=list)
    _told: set[str] = field(default_factory=set)

    def wrong(self, file: str, tensor: str | None, problem: str, detail: str = "") -> None:
        """Note a problem."""
        self.problems.append({"file": file, "tensor": tensor, "problem": problem, "detail": detail})
        if tensor is None:
            self._told.add(file)

    def tells(self, file: str) -> bool:
        """Whether a problem of the whole file, such as its size, is noted already."""
        return file in self._told
