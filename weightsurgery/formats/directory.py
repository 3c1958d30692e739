"""Model directories: one answer to "which weights?", or a refusal that names both."""

from __future__ import annotations

import os
import stat
from collections import Counter
from typing import Any

from weightsurgery.checkpoint import Checkpoint, FileRef, TensorView
from weightsurgery.errors import FormatError, PolicyError, SettingError, StorageError, shown
from weightsurgery.formats.adapter import is_adapter, open_adapter
from weightsurgery.formats.files import InputFile, open_member
from weightsurgery.formats.layout import (
    ADAPTER_CONFIG,
    CARD,
    INDEX,
    PICKLE_ENDINGS,
    PICKLED,
    PICKLED_INDEX,
    PICKLES,
    RECORD,
    SIDE_FILES,
    SINGLE,
    TEXTS,
    fits,
    unpickled,
)
from weightsurgery.formats.pickled import open_pickled
from weightsurgery.formats.placeholders import LONGEST_LOOK, refuse_placeholder
from weightsurgery.formats.safetensors import open_safetensors, refuse_pickle
from weightsurgery.formats.strict_json import parse_object

MAX_JSON = 100_000_000
MAX_SIDE_FILE = 100_000_000  # bytes; a side file is held in memory whole


def open_directory(
    directory: str, *, label: str, weights: str | None = None, allow_pickle: bool = False
) -> Checkpoint:
    """Open a model directory: headers, index and config are read and checked, weights are not.

    Args:
        directory: The directory.
        label: What to call it in messages.
        weights: Name of the weights file (or index) to use where there are several answers.
        allow_pickle: Open pickled weights too.

    Raises:
        FormatError: A file of it breaks its format's rules.
        PolicyError: Two files claim to be the weights, only a pickle is there and that is not
            allowed, or a link leads out of the directory.
        SettingError: There is no file called `weights`.
        StorageError: A file cannot be read.
    """
    try:
        entries = sorted(os.listdir(directory))
    except OSError as error:
        reason = f"cannot list: {error.strerror}"
        raise StorageError(reason, file=directory, code="E-FILE-OPEN") from error
    if weights is None and is_adapter(entries):
        return open_adapter(directory, entries, label=label, allow_pickle=allow_pickle)
    config = _read_config(directory, entries)
    if weights is not None and weights not in entries:
        raise SettingError(
            f"there is no {shown(weights)} to take the weights from",
            file=directory,
            code="E-WEIGHTS-NAME",
        )
    chosen = weights or _choose(directory, entries, config, allow_pickle)
    tensors: dict[str, TensorView] = {}
    layout: dict[str, str] = {}
    metadata: dict[str, str] = {}
    files: list[FileRef] = []
    warnings: list[str] = []
    listed, total = None, None
    in_shard: Counter[str] = Counter()
    if chosen.endswith(".index.json"):
        index, listed, total = _read_index(directory, chosen)
        files.append(index)
        in_shard.update(listed.values())
    for shard in sorted(in_shard) if listed is not None else [chosen]:
        file = _open_shard(directory, shard, chosen)
        found, shard_metadata, told = _open_weights(file, shard, allow_pickle)
        warnings += told
        if listed is not None:
            _check_shard(file, found, listed, shard, in_shard[shard])
        tensors |= found
        layout |= dict.fromkeys(found, unpickled(shard))
        warnings += _conflicts(shard, shard_metadata, metadata)
        metadata |= shard_metadata
        files.append(file.ref())
    actual = sum(view.nbytes for view in tensors.values())
    if total is not None and total != actual:
        warnings += [
            f"{shown(chosen)}: total_size is {shown(total)}, the tensors take {actual:,} bytes"
        ]
    side_files, left_out = _side_files(directory, entries, {f.name for f in files} | {chosen})
    return Checkpoint(
        tensors,
        label=label,
        metadata=metadata,
        layout=layout,
        is_directory=True,
        files=tuple(files),
        side_files=side_files,
        left_out=left_out,
        warnings=tuple(warnings),
        config=config,
    )


def _read_config(directory: str, entries: list[str]) -> dict[str, Any]:
    if "config.json" not in entries:
        return {}
    file = open_member(directory, "config.json")
    return parse_object(file.read_all(MAX_JSON), file=file.path, what="config")


def _open_weights(
    file: InputFile, name: str, allow_pickle: bool
) -> tuple[dict[str, TensorView], dict[str, str], list[str]]:
    """A file's tensors, its header's metadata, and warnings."""
    if not name.endswith(PICKLE_ENDINGS):
        return *open_safetensors(file), []
    if not allow_pickle:
        raise refuse_pickle(file.path)
    found, told = open_pickled(file)
    return found, {}, told


def _choose(directory: str, entries: list[str], config: dict[str, Any], allow_pickle: bool) -> str:
    known = (SINGLE, INDEX, PICKLED, PICKLED_INDEX) if allow_pickle else (SINGLE, INDEX)
    answers = [name for name in known if name in entries]
    pickles = [name for name in entries if fits(name, PICKLES)]
    if PICKLED in answers or PICKLED_INDEX in answers:
        pickles = []  # that is their answer
    # An adapter_config.json is enough: transformers then loads the base model that it names.
    adapters = [n for n in entries if n.startswith("adapter_model.") or n == ADAPTER_CONFIG]
    others = [n for n in entries if n.endswith(".safetensors") and n not in (SINGLE, *adapters)]
    if not answers:
        if adapters and ADAPTER_CONFIG not in entries and not others:
            raise FormatError(
                f"{shown(adapters[0])} without {ADAPTER_CONFIG}",
                file=directory,
                hint="take it from where the adapter is from: it tells the factors' scale",
                code="E-NO-WEIGHTS",
            )
        if pickles and not allow_pickle:
            raise refuse_pickle(os.path.join(directory, pickles[0]))
        seen = [*adapters, *others, *pickles]
        raise FormatError(
            f"no {SINGLE} and no {INDEX} in this directory"
            + (f"; it holds {', '.join(map(shown, seen[:5]))}" if seen else ""),
            file=directory,
            hint="choose one with --weights FILE" if seen else "is this a model directory?",
            code="E-NO-WEIGHTS",
        )
    claims = [*answers, *pickles[:1], *adapters[:1]]
    if "transformers_weights" in config:
        claims.append("config.json's transformers_weights")
    if len(claims) > 1:
        raise PolicyError(
            f"two answers to which weights are meant: {' and '.join(map(shown, claims))}",
            file=directory,
            hint=f"choose one with --weights {answers[0]}",
            code="E-TWO-ANSWERS",
        )
    return answers[0]


def _conflicts(shard: str, new: dict[str, str], known: dict[str, str]) -> list[str]:
    """Warnings for header metadata that an earlier shard gives otherwise; the last one counts."""
    return [
        f"{shown(shard)}: its header metadata has another '{shown(key)}' than the shards before"
        for key in sorted(new.keys() & known.keys())
        if new[key] != known[key]
    ]


def _open_shard(directory: str, shard: str, chosen: str) -> InputFile:
    if os.path.lexists(os.path.join(directory, shard)):
        return open_member(directory, shard)
    raise FormatError(
        f"shard {shown(shard)} is missing; {shown(chosen)} lists it",
        file=directory,
        hint="the download may be incomplete",
        code="E-SHARD-MISSING",
    )


def _read_index(directory: str, name: str) -> tuple[FileRef, dict[str, str], Any]:
    file = open_member(directory, name)
    index = parse_object(file.read_all(MAX_JSON), file=file.path, what="index")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("no weight_map in the index", file=file.path, code="E-INDEX-MAP")
    ending = ".bin" if name.endswith(".bin.index.json") else ".safetensors"
    for tensor, shard in weight_map.items():
        if not _is_plain_name(shard, ending):
            raise FormatError(
                f"weight_map gives {shown(shard)}; expected a plain name ending in {ending}",
                file=file.path,
                tensor=tensor,
                code="E-INDEX-NAME",
            )
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return file.ref(), weight_map, total


def _is_plain_name(name: Any, ending: str) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(ending)
        and len(name) > len(ending)
        and name.isprintable()
        and not any(c in name for c in "/\\:")
        and len(name.encode("utf-8", "surrogatepass")) <= 255
    )


def _check_shard(
    file: InputFile, found: dict[str, TensorView], listed: dict[str, str], shard: str, count: int
) -> None:
    """Refuse a shard that has other tensors than the `count` that the index lists for it."""

    def bad(code: str, name: str, reason: str) -> FormatError:
        return FormatError(reason, file=file.path, tensor=name, code=code)

    for name in found:
        if name not in listed:
            raise bad("E-SHARD-HIDDEN", name, "in the shard but not in the index")
        if listed[name] != shard:
            reason = f"the index places it in {shown(listed[name])}"
            raise bad("E-SHARD-DUPLICATE", name, reason)
    # All that was found is listed here, so that fewer is what can still be wrong. No search where
    # nothing is: there may be thousands of shards, and this would read the index for each.
    lacking = (n for n, place in listed.items() if place == shard and n not in found)
    if len(found) < count:
        raise bad("E-SHARD-LACKS", next(lacking), "listed in the index but not in the shard")


def _side_files(
    directory: str, entries: list[str], weights: set[str]
) -> tuple[tuple[FileRef, ...], tuple[tuple[str, str], ...]]:
    kept, left_out = [], []
    for name in entries:
        if name in weights or name in (CARD, RECORD):  # these two are written anew
            continue
        path = os.path.join(directory, name)
        if not fits(name, SIDE_FILES):
            left_out.append((shown(name), "not on the list of files that travel"))
        elif not name.isprintable():
            left_out.append((shown(name), "a name that cannot be printed"))
        elif not _leads_to_regular(path):
            left_out.append((name, "not a regular file"))
        else:
            file = open_member(directory, name)
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
