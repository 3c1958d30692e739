"""Files in, files out: everything that knows what a checkpoint looks like on disk."""

from __future__ import annotations

import os
import re
from dataclasses import replace

from weightsurgery.checkpoint import Checkpoint
from weightsurgery.errors import FormatError, SettingError, StorageError
from weightsurgery.formats import hub
from weightsurgery.formats.directory import open_directory
from weightsurgery.formats.files import InputFile, did_you_mean
from weightsurgery.formats.layout import PICKLE_ENDINGS
from weightsurgery.formats.pickled import open_pickled
from weightsurgery.formats.safetensors import open_file, refuse_pickle
from weightsurgery.formats.save import save
from weightsurgery.formats.sharded import part_warning

__all__ = ["open_checkpoint", "save"]


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    weights: str | None = None,
    allow_pickle: bool = False,
    follow_links: bool = False,
) -> Checkpoint:
    """Open a checkpoint: headers are read and checked, weights are not.

    Args:
        path: A `.safetensors` file, a model directory (one file or several shards), or a hub id
            `org/name@revision`.
        weights: Name of the weights file to open if a directory contains several.
        allow_pickle: Open PyTorch's pickled checkpoints too (.bin, .pt, .pth, .ckpt). Each is
            checked and turned into safetensors at once, by a confined process with little time
            and memory, in a temporary directory that is gone when this returns.
        follow_links: Follow symbolic links that lead out of a model directory, wherever they
            lead. Only for a directory whose links you trust: what they lead to is read, and
            tokenizers and configurations among it are copied into outputs.

    Returns:
        The checkpoint; its tensors are read when somebody asks for them.

    Raises:
        FormatError: A file breaks its format's rules.
        PolicyError: Two files claim to be the weights, they are a pickle that is not allowed or
            asks for more than weights need, `weights` is one shard of several, or a link leads out
            of the directory.
        SettingError: There is no file called `weights`, or `path` is a file itself; torch, which
            reads pickles, is not installed.
        StorageError: A file cannot be opened or read.
    """
    text = os.fspath(path)
    if os.path.isdir(text):
        return open_directory(
            text,
            label=text,
            weights=weights,
            allow_pickle=allow_pickle,
            follow_links=follow_links,
        )
    if os.path.lexists(text):
        if weights is not None:
            raise SettingError(
                "`weights` names a file of a model directory, but this is a file",
                file=text,
                code="E-WEIGHTS-NAME",
            )
        if text.endswith(PICKLE_ENDINGS):
            return _open_pickle(text, allow_pickle)
        return _with_warnings(open_file(InputFile(text), label=text))
    if hub.is_hub_id(text):
        return _open_hub(text, weights, allow_pickle)
    hint = did_you_mean(text)
    if not hint and _NAME.fullmatch(text) and not text.endswith(".safetensors"):
        hint = "a model of the hub is called org/name"
    raise StorageError("no such file or directory", file=text, hint=hint, code="E-FILE-MISSING")


_NAME = re.compile(r"[\w.-]+(@[\w./-]+)?")  # like a hub id without its owner


def _open_pickle(path: str, allowed: bool) -> Checkpoint:
    if not allowed:
        raise refuse_pickle(path)
    file = InputFile(path)
    tensors, warnings = open_pickled(file)
    found = Checkpoint(tensors, label=path, files=(file.ref(),), warnings=tuple(warnings))
    return _with_warnings(found)


def _with_warnings(file: Checkpoint) -> Checkpoint:
    """A single file, with a warning if it is one of several shards."""
    part = part_warning(os.path.basename(file.label))
    return replace(file, warnings=(*file.warnings, *part)) if part else file


def _open_hub(text: str, weights: str | None, allow_pickle: bool) -> Checkpoint:
    incomplete: FormatError | None = None
    try:
        for snapshot in hub.snapshots(text, pickles=allow_pickle):
            try:
                found = open_directory(
                    snapshot, label=text, weights=weights, allow_pickle=allow_pickle
                )
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
