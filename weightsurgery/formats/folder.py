"""A model directory: its entries, and how its files may be opened."""

from __future__ import annotations

import os
from dataclasses import dataclass

from weightsurgery.checkpoint import TensorView
from weightsurgery.errors import PolicyError, StorageError
from weightsurgery.formats.files import InputFile, open_member
from weightsurgery.formats.layout import PICKLE_ENDINGS
from weightsurgery.formats.safetensors import open_safetensors
from weightsurgery.formats.torch_pickle import open_torch


@dataclass(frozen=True)
class Weights:
    """An open weights file.

    Attributes:
        file: The file.
        tensors: Its tensors.
        metadata: Its header's metadata.
        warnings: What was odd about it.
    """

    file: InputFile
    tensors: dict[str, TensorView]
    metadata: dict[str, str]
    warnings: list[str]


@dataclass(frozen=True)
class Folder:
    """A model directory.

    Attributes:
        path: The directory.
        label: What to call it in messages.
        entries: The names in it, sorted.
        key: Name of the state dict to read in PyTorch files; None where each has one.
        follow_links: Whether symbolic links may lead out of it.
    """

    path: str
    label: str
    entries: tuple[str, ...]
    key: str | None = None
    follow_links: bool = False

    def open(self, name: str) -> InputFile:
        """Open a file of the directory.

        Raises:
            PolicyError: It is a link that leads out, and links may not be followed.
            StorageError: It cannot be opened.
            FormatError: It is not a regular file.
        """
        return open_member(self.path, name, follow_links=self.follow_links)

    def open_weights(self, name: str) -> Weights:
        """Open a weights file and check its header; no weights are read.

        Raises:
            PolicyError: As for `open`, or for `open_torch`.
            StorageError: It cannot be opened or read.
            FormatError: It breaks a rule of its format.
            SettingError: It is a PyTorch file without a state dict called `key`.
        """
        file = self.open(name)
        if not name.endswith(PICKLE_ENDINGS):
            return Weights(file, *open_safetensors(file), [])
        tensors, warnings = open_torch(file, self.key)
        return Weights(file, tensors, {}, warnings)

    def enter(self, path: str) -> Folder | None:
        """A folder below this one, None if there is none.

        Args:
            path: Plain names with slashes between them.

        Raises:
            PolicyError: It is a symbolic link, and links may not be followed.
            StorageError: It cannot be listed.
        """
        place = self.path
        for name in path.split("/"):
            place = os.path.join(place, name)
            if os.path.islink(place) and not self.follow_links:
                raise PolicyError(
                    "a symbolic link in place of a folder of the model",
                    file=place,
                    hint="put the folder itself there, or pass --follow-links "
                    "(follow_links=True) if you trust every link in it",
                    code="E-LINK-OUT",
                )
        if not os.path.isdir(place):
            return None
        return list_folder(
            place, label=f"{self.label}/{path}", key=self.key, follow_links=self.follow_links
        )

    def holds(self, name: str) -> bool:
        """Whether the directory has an entry of this name now, also a dangling link."""
        return os.path.lexists(os.path.join(self.path, name))


def list_folder(
    directory: str, *, label: str, key: str | None = None, follow_links: bool = False
) -> Folder:
    """A directory and the names in it.

    Raises:
        StorageError: It cannot be listed.
    """
    try:
        entries = sorted(os.listdir(directory))
    except OSError as error:
        reason = f"cannot list: {error.strerror}"
        raise StorageError(reason, file=directory, code="E-FILE-OPEN") from error
    return Folder(directory, label, tuple(entries), key, follow_links)
