"""Inputs, a place to write to, and what may stand in the way there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import hostile
from weightsurgery import from_arrays
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.errors import SurgeryError
from weightsurgery.formats import open_checkpoint, save
from weightsurgery.stream import Engine

RECORD = "wsurg-record.json"
KINDS = pytest.mark.parametrize("kind", ["file", "model"])
IN_THE_WAY: dict[str, Callable[[Path], Any]] = {
    "file": lambda path: path.write_bytes(b"precious"),
    "directory": Path.mkdir,
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "FIFO": os.mkfifo,
}


class Scene:
    """A folder with inputs `in/x.safetensors` and `in/model/`, and an empty folder `place/`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.file = root / "in" / "x.safetensors"
        self.model = hostile.sharded(root / "in" / "model", {"tokenizer.json": {}})
        self.place = root / "place"
        self.file.write_bytes(hostile.weights("a", "b"))
        self.place.mkdir()

    def open(self, kind: str) -> Checkpoint:
        """The file or the model."""
        return open_checkpoint(self.file if kind == "file" else self.model)

    def out(self, kind: str) -> Path:
        """Where a file or a model is to be written."""
        return self.place / ("out.safetensors" if kind == "file" else "out")


def other(kind: str) -> Checkpoint:
    """Something else to write than the scene's inputs."""
    return from_arrays(hostile.arrays("c", "d"), is_directory=kind == "model", label="other")


def must_refuse(
    scene: Scene, checkpoint: Checkpoint, out: str | Path, kind: type, reason: str, **options: Any
) -> SurgeryError:
    """Saving raises the error, and nothing in the scene is different afterwards."""
    before = hostile.contents(scene.root)
    with hostile.deadline(), pytest.raises(kind, match=reason) as told:
        save(checkpoint, str(out), **options)
    assert type(told.value) is kind
    assert hostile.contents(scene.root) == before
    return told.value


def at_progress(number: int, do: Callable[[], Any]) -> Engine:
    """An engine that does something at the N-th report of progress."""
    reports: list[int] = []

    def progress(_what: str, _done: int, _total: int) -> None:
        reports.append(1)
        if len(reports) == number:
            do()

    return Engine(workers=2, progress=progress)
