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
        recorded: Its record.
        files: The recorded files that could be opened.
        views: The recorded tensors that could be opened, file by file, in their order there.
        problems: What is wrong.
    """

    out: str
    recorded: Recorded
    files: dict[str, InputFile] = field(default_factory=dict)
    views: list[TensorView] = field(default_factory=list)
    problems: list[dict[str, Any]] = field(default_factory=list)

    def wrong(self, file: str, tensor: str | None, problem: str, detail: str = "") -> None:
        """Note a problem."""
        self.problems.append({"file": file, "tensor": tensor, "problem": problem, "detail": detail})

    def tells(self, file: str) -> bool:
        """Whether a problem of the whole file, such as its size, is noted already."""
        return any(p["file"] == file and p["tensor"] is None for p in self.problems)
