"""Checkpoints of a training that is under way, so that an interrupted one can go on.

Their folder must be one's own: the seal of a checkpoint tells damage, not malice. torch loads its
parts as weights only, so nothing in them is run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from weightsurgery.errors import PolicyError, StorageError, SurgeryError, shown
from weightsurgery.formats import disk
from weightsurgery.formats.files import InputFile
from weightsurgery.formats.output import write_file
from weightsurgery.formats.place import lock

IDENTITY = "wsurg-training.json"
_SEAL = "wsurg-checkpoint.json"
_KEPT = 2  # checkpoints: one may be half-written


@dataclass(frozen=True)
class Resumable:
    """A folder of a training's checkpoints.

    Attributes:
        folder: Where they lie; made where there is none.
        every: Steps between two.
        identity: Which training it is: its settings, and digests of model and examples. Only the
            same training goes on from its checkpoints.
    """

    folder: str
    every: int
    identity: Mapping[str, Any]

    @contextmanager
    def prepared(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Make the folder and hold it; gives it and what Trainer needs to be told.

        Raises:
            BusyError: Another run trains there now.
            PolicyError: The folder is of another training, or of something else.
            StorageError: It cannot be read or written.
        """
        try:
            disk.make_directories(self.folder)
        except OSError as error:
            raise StorageError(
                f"{error.strerror or error}", file=self.folder, code="E-CHECKPOINT-STORAGE"
            ) from None
        held = lock(self.folder, self.folder)
        try:
            yield self._prepare()
        finally:
            os.close(held)

    def _prepare(self) -> tuple[str, dict[str, Any]]:
        wanted = self._told()
        path = os.path.join(self.folder, IDENTITY)
        try:
            if os.listdir(self.folder):
                self._check(path, wanted)
            else:
                write_file(path, wanted.encode())
        except OSError as error:
            raise StorageError(
                f"{error.strerror or error}", file=self.folder, code="E-CHECKPOINT-STORAGE"
            ) from None
        saving = {
            "save_strategy": "steps",
            "save_steps": self.every,
            "save_total_limit": _KEPT,
        }
        return self.folder, saving

    def _check(self, path: str, wanted: str) -> None:
        hint = "give an empty folder"
        if not os.path.isfile(path):
            raise PolicyError(
                "is not empty and no training's",
                file=self.folder,
                hint=hint,
                code="E-CHECKPOINT-FOLDER",
            )
        with open(path, encoding="utf-8", errors="replace") as file:
            found = file.read()
        if found == wanted:
            return
        try:
            before = json.loads(found)
            differing = [key for key, value in self.identity.items() if before.get(key) != value]
        except (ValueError, AttributeError):
            raise PolicyError(
                f"{IDENTITY} is damaged", file=self.folder, hint=hint, code="E-CHECKPOINT-FOLDER"
            ) from None
        raise PolicyError(
            f"holds checkpoints of another training, which differs in {shown(differing[0])}"
            if differing
            else f"{IDENTITY} is another version's",
            file=self.folder,
            hint=hint,
            code="E-CHECKPOINT-FOLDER",
        )

    def done(self) -> int:
        """Steps that the last whole checkpoint holds; looks at the folder, and makes none.

        Raises:
            PolicyError: The folder is of another training, or of something else.
            StorageError: It cannot be read.
        """
        try:
            if not os.path.lexists(self.folder) or not os.listdir(self.folder):
                return 0
            self._check(os.path.join(self.folder, IDENTITY), self._told())
            return next((steps for steps, path in self._saved() if _is_whole(path)), 0)
        except OSError as error:
            raise StorageError(
                f"{error.strerror or error}", file=self.folder, code="E-CHECKPOINT-STORAGE"
            ) from None

    def last(self) -> str | None:
        """The last checkpoint that is as it was saved; None if there is none."""
        return next((path for _, path in self._saved() if _is_whole(path)), None)

    def _saved(self) -> list[tuple[int, str]]:
        """Steps and path of every checkpoint, the last first."""
        found = [
            (int(number), os.path.join(self.folder, name))
            for name in os.listdir(self.folder)
            for kind, _, number in [name.partition("-")]
            if kind == "checkpoint" and number.isdecimal()
        ]
        return sorted(found, reverse=True)

    def _told(self) -> str:
        return json.dumps(self.identity, sort_keys=True, indent=2) + "\n"


def seal(checkpoint: str) -> None:
    """Note what a checkpoint is made of, when all of it is written.

    Raises:
        StorageError: It cannot be read or written.
    """
    path = os.path.join(checkpoint, _SEAL)
    try:
        write_file(path, json.dumps(_digests(checkpoint)).encode())
    except OSError as error:
        raise StorageError(
            f"{error.strerror or error}", file=checkpoint, code="E-CHECKPOINT-STORAGE"
        ) from None


def _digests(checkpoint: str) -> dict[str, str]:
    """SHA-256 of every file but the seal."""
    names = sorted({*os.listdir(checkpoint)} - {_SEAL})
    return {name: InputFile(os.path.join(checkpoint, name)).sha256() for name in names}


def _is_whole(checkpoint: str) -> bool:
    """Whether it has the files it was saved with: a half-written or damaged one is passed over."""
    try:
        with open(os.path.join(checkpoint, _SEAL), encoding="utf-8") as file:
            return bool(json.load(file) == _digests(checkpoint))
    except (OSError, ValueError, RecursionError, SurgeryError):
        return False
