"""Model directories: one answer to "which weights?", or a refusal that names both."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from typing import Any

from weightsurgery.checkpoint import Checkpoint, FileRef
from weightsurgery.errors import FormatError, PolicyError, SettingError, shown
from weightsurgery.formats.adapter import is_adapter, open_adapter
from weightsurgery.formats.config import without_leftovers
from weightsurgery.formats.files import InputFile
from weightsurgery.formats.folder import Folder, list_folder
from weightsurgery.formats.layout import (
    ADAPTER_CONFIG,
    CARD,
    DIFFUSERS_INDEX,
    DIFFUSERS_SINGLE,
    INDEX,
    PICKLE_ENDINGS,
    PICKLED_WEIGHTS,
    PICKLES,
    RECORD,
    SIDE_FILES,
    SINGLE,
    TEXTS,
    fits,
)
from weightsurgery.formats.placeholders import LONGEST_LOOK, refuse_placeholder
from weightsurgery.formats.sharded import (
    MAX_JSON,
    Shards,
    find_set,
    open_files,
    open_indexed,
    open_set,
    refuse_part,
)
from weightsurgery.formats.strict_json import parse_config

_MOST_LOOKED_AT = 1000
MAX_SIDE_FILE = 100_000_000  # bytes; a side file is held in memory whole


def open_directory(
    directory: str,
    *,
    label: str,
    weights: str | None = None,
    key: str | None = None,
    follow_links: bool = False,
) -> Checkpoint:
    """Open a model directory: headers, index and config are read and checked, weights are not.

    Args:
        directory: The directory.
        label: What to call it in messages.
        weights: Name of the weights file (or index) to use where there are several answers.
        key: Name of the state dict to read in PyTorch files.
        follow_links: Follow symbolic links that lead out of the directory.

    Raises:
        FormatError: A file of it breaks its format's rules, or shards are missing.
        PolicyError: Two files claim to be the weights, `weights` is one shard of several, or a
            link leads out of the directory.
        SettingError: There is no file called `weights`, or no state dict called `key`.
        StorageError: A file cannot be read.
    """
    folder = list_folder(directory, label=label, key=key, follow_links=follow_links)
    if weights is None and is_adapter(folder.entries):
        adapter = open_adapter(folder)
        refuse_key(key, label, adapter.files)
        return adapter
    config = _read_config(folder)
    found = _open_weights(folder, config, weights)
    refuse_key(key, label, found.files)
    read = {file.name for file in found.files}
    side_files, left_out = _side_files(folder, read, found.left_out)
    opened = Checkpoint(
        found.tensors,
        label=label,
        key=key,
        metadata=found.metadata,
        layout=found.written_layout,
        is_directory=True,
        files=tuple(found.files),
        side_files=side_files,
        left_out=left_out,
        warnings=tuple(found.warnings),
        config=config,
    )
    return without_leftovers(opened)


def refuse_key(key: str | None, label: str, files: Iterable[FileRef] = ()) -> None:
    """Refuse the name of a state dict where no PyTorch file was read.

    Raises:
        SettingError: There is such a name, and no such file.
    """
    if key is not None and not any(file.name.endswith(PICKLE_ENDINGS) for file in files):
        raise SettingError(
            "`key` names a state dict of a PyTorch file, but this is safetensors",
            file=label,
            code="E-KEY-NAME",
        )


def _read_config(folder: Folder) -> dict[str, Any]:
    if "config.json" not in folder.entries:
        return {}
    file = folder.open("config.json")
    return parse_config(file.read_all(MAX_JSON), file=file.path)


def _open_weights(folder: Folder, config: dict[str, Any], weights: str | None) -> Shards:
    if weights is None:
        chosen = _choose(folder, config)
        if isinstance(chosen, list):
            return open_set(folder, chosen)
    else:
        if weights not in folder.entries:
            raise SettingError(
                f"weights file not found: {shown(weights)}",
                file=folder.path,
                code="E-WEIGHTS-NAME",
            )
        refuse_part(folder, weights)
        chosen = weights
    if chosen.endswith(".index.json"):
        return open_indexed(folder, chosen)
    return open_files(folder, [chosen])


def _choose(folder: Folder, config: dict[str, Any]) -> str | list[str]:
    """The weights file or the index; the names of all shards where there is no index."""
    entries = folder.entries
    known = (SINGLE, INDEX, DIFFUSERS_SINGLE, DIFFUSERS_INDEX, *PICKLED_WEIGHTS)
    answers: list[str | list[str]] = [name for name in known if name in entries]
    if not answers:
        shards = find_set(folder, ".safetensors") or find_set(folder, ".bin")
        answers += [shards] if shards else []
    pickles = [name for name in entries if fits(name, PICKLES)]
    if any(a in PICKLED_WEIGHTS or a[0] in pickles for a in answers):
        pickles = []  # that is their answer
    # An adapter_config.json is enough: transformers then loads the base model that it names.
    adapters = [n for n in entries if n.startswith("adapter_model.") or n == ADAPTER_CONFIG]
    if not answers:
        raise _no_weights(folder, adapters, pickles)
    named = [name if isinstance(name, str) else name[0] for name in answers]
    claims = [*named, *pickles[:1], *adapters[:1]]
    if "transformers_weights" in config:
        claims.append("config.json's transformers_weights")
    if len(claims) > 1:
        file = isinstance(answers[0], str)
        raise PolicyError(
            f"ambiguous weights: {' and '.join(map(shown, claims))}",
            file=folder.path,
            hint=f"choose one with --weights {named[0]}" if file else "keep one in the directory",
            code="E-TWO-ANSWERS",
        )
    return answers[0]


def _no_weights(folder: Folder, adapters: list[str], pickles: list[str]) -> Exception:
    others = [
        name
        for name in folder.entries
        if name.endswith(".safetensors") and name not in (SINGLE, *adapters)
    ]
    if adapters and ADAPTER_CONFIG not in folder.entries and not others:
        return FormatError(
            f"{shown(adapters[0])} without {ADAPTER_CONFIG}",
            file=folder.path,
            hint="take it from where the adapter is from: it tells the factors' scale",
            code="E-NO-WEIGHTS",
        )
    indexes = [name for name in folder.entries if name.endswith(".index.json")]
    seen = [*adapters, *indexes, *others, *pickles]
    choice = indexes[0] if len(indexes) == 1 else "FILE"
    return FormatError(
        f"no {SINGLE} and no {INDEX} in this directory"
        + (f"; it holds {', '.join(map(shown, seen[:5]))}" if seen else ""),
        file=folder.path,
        hint=f"choose one with --weights {shown(choice)}" if seen else _below(folder),
        code="E-NO-WEIGHTS",
    )


def _below(folder: Folder) -> str:
    """Where in a directory without weights they are: trainers save each state in a folder."""
    known = {ADAPTER_CONFIG: "an adapter", SINGLE: "a model", INDEX: "a model"}
    for name in folder.entries[-_MOST_LOOKED_AT:][::-1]:
        path = os.path.join(folder.path, name)
        kind = next((k for file, k in known.items() if os.path.isfile(f"{path}/{file}")), "")
        if kind:
            return f"{kind} is in its folder {shown(name)}"
    return "is this a model directory?"


def _side_files(
    folder: Folder, weights: set[str], others: dict[str, str]
) -> tuple[tuple[FileRef, ...], tuple[tuple[str, str], ...]]:
    """The files that travel with the weights, and those that do not, each with the reason."""
    kept, left_out = [], []
    for name in folder.entries:
        if name in weights or name in (CARD, RECORD):  # these two are written anew
            continue
        if name in others:
            left_out.append((shown(name), others[name]))
        elif not fits(name, SIDE_FILES):
            left_out.append((shown(name), "not on the list of files that travel"))
        elif not name.isprintable():
            left_out.append((shown(name), "a name that cannot be printed"))
        elif not _leads_to_regular(os.path.join(folder.path, name)):
            left_out.append((name, "not a regular file"))
        else:
            file = folder.open(name)
            if file.size > MAX_SIDE_FILE:
                left_out.append((name, f"{file.size:,} bytes; the limit is {MAX_SIDE_FILE:,}"))
            else:
                _refuse_placeholder(file, name)
                kept.append(file.ref())
    return tuple(kept), tuple(left_out)


def _refuse_placeholder(file: InputFile, name: str) -> None:
    """Refuse a side file without which the output would be no model.

    Raises:
        FormatError: It is a Git LFS pointer, or a web page.
    """
    if not fits(name, TEXTS):  # which may well be pages, and serve as they are
        start = file.read_bytes(0, min(file.size, LONGEST_LOOK))
        refuse_placeholder(start, file=file.path, expected="a file that travels with the weights")


def _leads_to_regular(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False  # a dangling link; the caller lists it
