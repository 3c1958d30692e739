"""Files in, files out: everything that knows what a checkpoint looks like on disk."""

from __future__ import annotations

import os
import re
from dataclasses import replace

from weightsurgery.checkpoint import Checkpoint
from weightsurgery.errors import FormatError, SettingError, StorageError
from weightsurgery.formats import hub
from weightsurgery.formats.directory import open_directory, refuse_key
from weightsurgery.formats.files import InputFile, did_you_mean
from weightsurgery.formats.layout import PICKLE_ENDINGS
from weightsurgery.formats.safetensors import open_file
from weightsurgery.formats.save import save
from weightsurgery.formats.sharded import part_warning
from weightsurgery.formats.torch_pickle import open_torch

__all__ = ["open_checkpoint", "save"]


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    weights: str | None = None,
    key: str | None = None,
    allow_pickle: bool = False,
    follow_links: bool = False,
) -> Checkpoint:
    """Open a checkpoint: headers are read and checked, weights are not.

    Args:
        path: A `.safetensors` file, a PyTorch file (.bin, .pt, .pth, .ckpt), a model directory
            (one file or several shards), or a hub id `org/name@revision`.
        weights: Name of the weights file to open if a directory contains several.
        key: Name of the state dict to read if a PyTorch file contains several, such as "ema".
        allow_pickle: Has no effect; accepted for code that was written for version 0.1. PyTorch
            files are read as data, and nothing in them can run.
        follow_links: Follow symbolic links that lead out of a model directory, wherever they
            lead. Only for a directory whose links you trust: what they lead to is read, and
            tokenizers and configurations among it are copied into outputs.

    Returns:
        The checkpoint; its tensors are read when somebody asks for them.

    Raises:
        FormatError: A file breaks its format's rules.
        PolicyError: Two files or state dicts claim to be the weights, a PyTorch file needs what
            weights do not need, `weights` is one shard of several, or a link leads out of the
            directory.
        SettingError: There is no file called `weights`, or `path` is a file itself; there is no
            state dict called `key`.
        StorageError: A file cannot be opened or read.
    """
    del allow_pickle
    text = os.fspath(path)
    if os.path.isdir(text):
        return open_directory(text, label=text, weights=weights, key=key, follow_links=follow_links)
    if os.path.lexists(text):
        if weights is not None:
            raise SettingError(
                "`weights` names a file of a model directory, but this is a file",
                file=text,
                code="E-WEIGHTS-NAME",
            )
        file = InputFile(text)
        if text.endswith(PICKLE_ENDINGS):
            return _with_warnings(_open_torch(file, key))
        refuse_key(key, text)
        return _with_warnings(open_file(file, label=text))
    if hub.is_hub_id(text):
        return _open_hub(text, weights, key)
    hint = did_you_mean(text)
    if not hint and _NAME.fullmatch(text) and not text.endswith(".safetensors"):
        hint = "a model of the hub is called org/name"
    raise StorageError("no such file or directory", file=text, hint=hint, code="E-FILE-MISSING")


_NAME = re.compile(r"[\w.-]+(@[\w./-]+)?")  # like a hub id without its owner


def _open_torch(file: InputFile, key: str | None) -> Checkpoint:
    tensors, warnings = open_torch(file, key)
    files, label = (file.ref(),), file.path
    return Checkpoint(tensors, label=label, key=key, files=files, warnings=tuple(warnings))


def _with_warnings(file: Checkpoint) -> Checkpoint:
    """A single file, with a warning if it is one of several shards."""
    part = part_warning(os.path.basename(file.label))
    return replace(file, warnings=(*file.warnings, *part)) if part else file


def _open_hub(text: str, weights: str | None, key: str | None) -> Checkpoint:
    incomplete: FormatError | None = None
    try:
        for snapshot in hub.snapshots(text):
            try:
                found = open_directory(snapshot, label=text, weights=weights, key=key)
            except FormatError as error:  # the cache may lack a part of it: go on to the hub
                incomplete = error
                continue
            commit = os.path.basename(snapshot)
            return replace(found, hub_id=f"{text.partition('@')[0]}@{commit}")
    except StorageError as error:
        hint = did_you_mean(text)
        if incomplete is None and hint:
            raise StorageError(error.reason, hint=hint, code=error.code) from error
        if incomplete is None:
            raise
    raise incomplete or StorageError("no snapshot", file=text, code="E-HUB")
