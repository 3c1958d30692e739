"""The files that are copied with the weights: configurations, tokenizers, texts; never code."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Mapping
from dataclasses import replace

from weightsurgery.checkpoint import FileRef
from weightsurgery.errors import shown
from weightsurgery.formats.files import InputFile
from weightsurgery.formats.folder import Folder
from weightsurgery.formats.layout import (
    CARD,
    CHAT_TEMPLATES,
    RECORD,
    SIDE_FILES,
    TEXTS,
    fits,
    joined,
)
from weightsurgery.formats.placeholders import LONGEST_LOOK, refuse_placeholder

MAX_SIDE_FILE = 100_000_000  # bytes; a side file is held in memory whole


def find_side_files(
    folder: Folder,
    weights: Collection[str],
    others: Mapping[str, str],
    *,
    parts: Collection[str] = (),
    anew: Collection[str] = (CARD, RECORD),
) -> tuple[tuple[FileRef, ...], tuple[tuple[str, str], ...]]:
    """The files of a folder that are copied with its weights, and those that are not.

    Args:
        folder: The model's, or that of one of its parts.
        weights: Names of the weights files that were read.
        others: Names of weights files that were not, each with the reason.
        parts: Names of folders in it that are opened on their own.
        anew: Names of files that are written for each output.

    Returns:
        The files to copy, and the names of all others, each with the reason.

    Raises:
        FormatError: A file to copy is a Git LFS pointer, or a web page.
        PolicyError: One is a link that leads out, and links may not be followed.
        StorageError: One cannot be opened.
    """
    kept: list[FileRef] = []
    left_out: list[tuple[str, str]] = []
    for name in folder.entries:
        if name in weights or name in anew or name in parts:
            continue
        if name == CHAT_TEMPLATES:
            files, rest = _chat_templates(folder)
            kept += files
            left_out += rest
            continue
        why = others.get(name) or _why_not(folder, name, SIDE_FILES)
        if why:
            left_out.append((shown(name), why))
        else:
            kept.append(_checked(folder, name).ref())
    return tuple(kept), tuple(left_out)


def _chat_templates(folder: Folder) -> tuple[list[FileRef], list[tuple[str, str]]]:
    """The chat templates beside the main one, which lie in a folder of their own."""
    inner = folder.enter(CHAT_TEMPLATES)
    if inner is None:
        return [], [(CHAT_TEMPLATES, "not a folder")]
    why = {name: _why_not(inner, name, ("*.jinja",)) for name in inner.entries}
    kept = [_checked(inner, name).ref() for name in inner.entries if not why[name]]
    return (
        [replace(file, name=joined(CHAT_TEMPLATES, file.name)) for file in kept],
        [(joined(CHAT_TEMPLATES, shown(name)), reason) for name, reason in why.items() if reason],
    )


def _why_not(folder: Folder, name: str, patterns: Collection[str]) -> str:
    """Why a file does not travel, "" if it does."""
    path = os.path.join(folder.path, name)
    if not fits(name, patterns):
        is_folder = os.path.isdir(path) and not os.path.islink(path)
        return "a folder that is not part of the model" if is_folder else _NOT_LISTED
    if not name.isprintable():
        return "a name that cannot be printed"
    try:
        found = os.stat(path)
    except OSError:
        return "not a regular file"  # a dangling link
    if not stat.S_ISREG(found.st_mode):
        return "not a regular file"
    if found.st_size > MAX_SIDE_FILE:
        return f"{found.st_size:,} bytes; the limit is {MAX_SIDE_FILE:,}"
    return ""


_NOT_LISTED = "not on the list of files to copy"


def _checked(folder: Folder, name: str) -> InputFile:
    """Open a file without which the output would not load.

    Raises:
        FormatError: It is a Git LFS pointer, or a web page.
    """
    file = folder.open(name)
    if not fits(name, TEXTS):  # which may well be pages, and serve as they are
        start = file.read_bytes(0, min(file.size, LONGEST_LOOK))
        refuse_placeholder(start, file=file.path, expected="a file to be copied beside the weights")
    return file
