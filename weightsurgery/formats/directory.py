"""Model directories: one answer to "which weights?", or a refusal that names both."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from weightsurgery.checkpoint import Checkpoint, FileRef, united
from weightsurgery.errors import (
    FormatError,
    PolicyError,
    SettingError,
    SurgeryError,
    first_few,
    shown,
)
from weightsurgery.formats.adapter import is_adapter, open_adapter
from weightsurgery.formats.config import without_leftovers
from weightsurgery.formats.folder import Folder, list_folder
from weightsurgery.formats.front_matter import read_front_matter
from weightsurgery.formats.layout import (
    ADAPTER_CONFIG,
    CARD,
    DIFFUSERS_INDEX,
    DIFFUSERS_SINGLE,
    DIFFUSERS_STEM,
    INDEX,
    INDEX_NAMES,
    PICKLE_ENDINGS,
    PICKLED,
    PICKLED_WEIGHTS,
    PICKLES,
    PIPELINE,
    RECORD,
    SINGLE,
    STEM,
    WEIGHTS,
    as_single,
    fits,
    joined,
)
from weightsurgery.formats.manifest import Manifest, read_manifest
from weightsurgery.formats.sharded import (
    MAX_JSON,
    Shards,
    find_set,
    open_files,
    open_indexed,
    open_set,
    refuse_part,
)
from weightsurgery.formats.side_files import find_side_files
from weightsurgery.formats.strict_json import parse_config

_MOST_LOOKED_AT = 1000
_STEMS = (STEM, DIFFUSERS_STEM, PICKLED.partition(".")[0])
_OF_A_MODEL = {"architectures", "_class_name"}  # keys of a config.json
_OTHER_FORMATS = (*PICKLE_ENDINGS, ".onnx", ".msgpack", ".h5", ".gguf")
_INCOMPLETE = "the download may be incomplete"


def open_directory(
    directory: str,
    *,
    label: str,
    weights: str | None = None,
    key: str | None = None,
    follow_links: bool = False,
) -> Checkpoint:
    """Open a model directory: headers, index and config are read and checked, weights are not.

    A model of several parts is one checkpoint, whose tensors have their part's folder in front of
    their names.

    Args:
        directory: The directory.
        label: What to call it in messages.
        weights: Name of the weights file (or index) to use where there are several answers.
        key: Name of the state dict to read in PyTorch files.
        follow_links: Follow symbolic links that lead out of the directory.

    Raises:
        FormatError: A file of it breaks its format's rules, or shards or parts are missing.
        PolicyError: Two files claim to be the weights, `weights` is one shard of several, or a
            link leads out of the directory.
        SettingError: There is no file called `weights`, or no state dict called `key`.
        StorageError: A file cannot be read.
    """
    folder = list_folder(directory, label=label, key=key, follow_links=follow_links)
    if weights is None and is_adapter(folder.entries):
        opened = open_adapter(folder)
    else:
        manifest = read_manifest(folder)
        opened = (
            _open_model(folder, weights)
            if manifest is None
            else _open_parts(folder, manifest, weights)
        )
    refuse_key(key, label, opened.files)
    return replace(opened, key=key)


def _open_model(
    folder: Folder,
    weights: str | None = None,
    parts: Collection[str] = (),
    anew: Collection[str] = (CARD, RECORD),
) -> Checkpoint:
    """Open the weights of one folder, and what lies beside them."""
    config = _read_config(folder)
    found = _open_weights(folder, config, weights)
    read = {file.name for file in found.files}
    side_files, left_out = find_side_files(folder, read, found.left_out, parts=parts, anew=anew)
    card, odd = _read_card(folder) if CARD in anew else ({}, [])
    opened = Checkpoint(
        found.tensors,
        label=folder.label,
        metadata=found.metadata,
        layout=found.written_layout,
        is_directory=True,
        files=tuple(found.files),
        side_files=side_files,
        left_out=left_out,
        warnings=(*found.warnings, *odd),
        config=config,
        card=card,
    )
    return without_leftovers(opened)


def _open_parts(folder: Folder, manifest: Manifest, weights: str | None) -> Checkpoint:
    """Open a model of several parts as one.

    Raises:
        FormatError: No part has weights, or a component's folder is missing.
        SettingError: No part has a file called `weights`.
    """
    folders = {path: folder.enter(path) if path else folder for path in ("", *manifest.folders)}
    listed = {path: inner for path, inner in folders.items() if path or manifest.is_root_part}
    chosen = {path: _named_as(inner, weights) for path, inner in listed.items() if inner}
    if weights is not None and not any(chosen.values()):
        raise SettingError(
            f"weights file not found: {shown(weights)}, in no part that {manifest.file} lists",
            file=folder.path,
            code="E-WEIGHTS-NAME",
        )
    parts: dict[str, Checkpoint] = {}
    for path, inner in folders.items():
        below = _first_names(manifest.folders, joined(path, ""))
        anew = () if path else (CARD, RECORD)
        if inner is None:
            if manifest.file == PIPELINE or path in manifest.weighty or folder.holds(path):
                what = "is not a folder" if folder.holds(path) else "is a folder that is missing"
                raise _incomplete(folder, f"'{shown(path)}' {what}", manifest)
        elif path in listed and _holds_weights(inner):
            parts[path] = _open_model(inner, chosen[path], parts=below, anew=anew)
        elif path in manifest.weighty or (path and _read_config(inner).keys() & _OF_A_MODEL):
            raise _incomplete(inner, "no weights that can be read", manifest, inner.entries)
        else:
            parts[path] = _without_weights(inner, parts=below, anew=anew)
    _refuse_mixed(folder, parts)
    if not any(parts.values()):
        raise FormatError(
            f"none of the parts that {manifest.file} lists has weights",
            file=folder.path,
            hint=_INCOMPLETE,
            code="E-NO-WEIGHTS",
        )
    whole = united(parts, label=folder.label)
    return replace(whole, warnings=(*whole.warnings, *manifest.warnings))


def _incomplete(
    folder: Folder, reason: str, manifest: Manifest, entries: Collection[str] = ()
) -> FormatError:
    """A part is listed whose weights the library would look for in vain."""
    others = [shown(name) for name in entries if name.endswith(_OTHER_FORMATS)]
    return FormatError(
        f"{reason}; {manifest.file} lists it",
        file=folder.path,
        hint=f"convert {first_few(others)} to safetensors" if others else _INCOMPLETE,
        code="E-NO-WEIGHTS" if entries else "E-PARTS",
    )


def _named_as(folder: Folder, weights: str | None) -> str | None:
    """A part's file of that name, or the one that is called so in this kind of part.

    `model.fp16.safetensors` of a text encoder is `diffusion_pytorch_model.fp16.safetensors` in a
    unet, and an index where there are shards.
    """
    if weights is None:
        return None
    single = as_single(weights)
    stem = next((one for one in _STEMS if single.startswith(f"{one}.")), None)
    *variant, ending = single.removeprefix(f"{stem}.").split(".")
    index = ".".join((ending, "index", *variant, "json"))
    same = [f"{one}{single.removeprefix(stem)}" for one in _STEMS] if stem else []
    indexes = [f"{one}.{index}" for one in _STEMS] if stem else []
    return next((name for name in (weights, *same, *indexes) if name in folder.entries), None)


def _refuse_mixed(folder: Folder, parts: Mapping[str, Checkpoint]) -> None:
    """Refuse tensors that are called as if they were in a part below their own.

    Raises:
        FormatError: There is one.
    """
    for path, part in parts.items():
        front = joined(path, "")
        inner = [f for f in parts if f.startswith(front) and f != path and parts[f]]
        below = tuple(f"{f.removeprefix(front)}/" for f in inner)
        for name in filter(lambda name: name.startswith(below), part):
            raise FormatError(
                f"a name in the folder '{shown(name.partition('/')[0])}', which is another part",
                file=joined(folder.path, path) if path else folder.path,
                tensor=name,
                code="E-PARTS",
            )


def _first_names(paths: Iterable[str], front: str = "") -> set[str]:
    """The first name of each path below a folder."""
    below = (path.removeprefix(front) for path in paths if path.startswith(front))
    return {path.partition("/")[0] for path in below}


def _holds_weights(folder: Folder) -> bool:
    return any(fits(name, (*WEIGHTS, *PICKLES)) for name in folder.entries)


def _without_weights(
    folder: Folder, parts: Collection[str], anew: Collection[str] = (CARD, RECORD)
) -> Checkpoint:
    """A folder of configurations alone, such as a tokenizer's."""
    side_files, left_out = find_side_files(folder, (), {}, parts=parts, anew=anew)
    card, odd = _read_card(folder) if CARD in anew else ({}, [])
    return Checkpoint(
        {},
        label=folder.label,
        is_directory=True,
        side_files=side_files,
        left_out=left_out,
        warnings=tuple(odd),
        card=card,
    )


def _read_card(folder: Folder) -> tuple[dict[str, Any], list[str]]:
    """The keys of the model card that an output's card repeats, and warnings."""
    if CARD not in folder.entries:
        return {}, []
    try:
        return read_front_matter(folder.open(CARD))
    except SurgeryError as error:  # a link that leads out, say: the model does without its card
        return {}, [f"{CARD}: not read: {error.reason}"]


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
    if fits(chosen, INDEX_NAMES):
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
        hint = f"choose one with --weights {named[0]}" if file else "keep one in the directory"
        raise PolicyError(
            f"ambiguous weights: {' and '.join(map(shown, claims))}",
            file=folder.path,
            hint=hint + _for_an_adapter(folder, adapters),
            code="E-TWO-ANSWERS",
        )
    return answers[0]


def _for_an_adapter(folder: Folder, adapters: list[str]) -> str:
    """Where the adapter is, in a directory that holds a model and at least its configuration."""
    if ADAPTER_CONFIG not in adapters:
        return ""
    if len(adapters) > 1:
        return "; for the adapter, move its two files to a directory of their own"
    place = _find_below(folder, {ADAPTER_CONFIG: "an adapter"})
    return f"; for the adapter, give its folder {place[1]}" if place else ""


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
    if adapters and not others:  # of a model's own folder, it would have been opened
        return FormatError(
            "an adapter, without the weights that it is for",
            file=folder.path,
            hint="merge it with the library that made it, or apply it to its base with "
            "`wsurg apply-adapter`",
            code="E-NO-WEIGHTS",
        )
    indexes = [name for name in folder.entries if fits(name, INDEX_NAMES)]
    seen = [*adapters, *indexes, *others, *pickles]
    named = indexes or others
    choice = named[0] if len(named) == 1 else "FILE"
    return FormatError(
        f"no {SINGLE} and no {INDEX} in this directory"
        + (f"; it holds {', '.join(map(shown, seen[:5]))}" if seen else ""),
        file=folder.path,
        hint=f"choose one with --weights {shown(choice)}" if seen else _below(folder),
        code="E-NO-WEIGHTS",
    )


def _below(folder: Folder) -> str:
    """Advice where a directory has no weights: trainers save each state in a folder of it."""
    known = {ADAPTER_CONFIG: "an adapter", SINGLE: "a model", INDEX: "a model"}
    found = _find_below(folder, known)
    return f"its folder {found[1]} contains {found[0]}" if found else "is this a model directory?"


def _find_below(folder: Folder, known: dict[str, str]) -> tuple[str, str] | None:
    """What a folder of a directory holds, by the files that tell it, and the folder's name."""
    for name in folder.entries[-_MOST_LOOKED_AT:][::-1]:
        path = os.path.join(folder.path, name)
        kind = next((k for file, k in known.items() if os.path.isfile(f"{path}/{file}")), "")
        if kind:
            return kind, shown(name)
    return None
