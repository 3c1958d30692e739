"""Checkpoints of a training that is under way, so that an interrupted one can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weightsurgery.errors import PolicyError, StorageError, shown

IDENTITY = "wsurg-training.json"
_STATE = "trainer_state.json"  # the last file that Trainer writes of a checkpoint
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

    def prepare(self) -> tuple[str, dict[str, Any]]:
        """Make the folder; gives it and what Trainer needs to be told.

        Raises:
            PolicyError: The folder is of another training, or of something else.
            StorageError: It cannot be read or written.
        """
        wanted = json.dumps(self.identity, sort_keys=True, indent=2) + "\n"
        path = os.path.join(self.folder, IDENTITY)
        try:
            os.makedirs(self.folder, exist_ok=True)
            if os.listdir(self.folder):
                self._check(path, wanted)
            else:
                with open(path, "x", encoding="utf-8") as file:
                    file.write(wanted)
        except OSError as error:
            raise StorageError(f"{error.strerror or error}", file=self.folder) from None
        saving = {
            "save_strategy": "steps",
            "save_steps": self.every,
            "save_total_limit": _KEPT,
        }
        return self.folder, saving

    def _check(self, path: str, wanted: str) -> None:
        hint = "give an empty folder"
        if not os.path.isfile(path):
            raise PolicyError("is not empty and no training's", file=self.folder, hint=hint)
        with open(path, encoding="utf-8", errors="replace") as file:
            found = file.read()
        if found == wanted:
            return
        try:
            before = json.loads(found)
            differing = [key for key, value in self.identity.items() if before.get(key) != value]
        except (ValueError, AttributeError):
            raise PolicyError(f"{IDENTITY} is damaged", file=self.folder, hint=hint) from None
        raise PolicyError(
            f"holds checkpoints of another training, which differs in {shown(differing[0])}"
            if differing
            else f"{IDENTITY} is another version's",
            file=self.folder,
            hint=hint,
        )

    def last(self) -> str | None:
        """The last whole checkpoint; None if there is none."""
        found = [
            (int(number), os.path.join(self.folder, name))
            for name in os.listdir(self.folder)
            for kind, _, number in [name.partition("-")]
            if kind == "checkpoint" and number.isdecimal()
        ]
        return next((path for _, path in sorted(found, reverse=True) if _is_whole(path)), None)


def _is_whole(checkpoint: str) -> bool:
    try:
        with open(os.path.join(checkpoint, _STATE), encoding="utf-8") as file:
            json.load(file)
    except (OSError, ValueError):  # Trainer was interrupted within it
        return False
    return True
