"""PEFT adapters on disk: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from typing import Any

from weightsurgery.checkpoint import Checkpoint, FileRef, TensorView
from weightsurgery.errors import FormatError, PolicyError, shown
from weightsurgery.formats.folder import Folder
from weightsurgery.formats.layout import (
    ADAPTER,
    ADAPTER_CONFIG,
    DIFFUSERS_STEM,
    INDEX,
    PICKLE_ENDINGS,
    PICKLED_ADAPTER,
    PICKLES,
    SINGLE,
    TOKENIZER,
    TRAINING,
    fits,
)
from weightsurgery.formats.record import public_name
from weightsurgery.formats.strict_json import dump, parse_object

_MAX_CONFIG = 100_000_000  # bytes
_SHARDS = ("model-*.safetensors", "model.*.safetensors", f"{DIFFUSERS_STEM}*.safetensors")
_OTHERS = ("adapter_model*.bin", "adapter_model*.safetensors", *PICKLES)


def is_adapter(entries: Collection[str]) -> bool:
    """True for a directory that holds an adapter and no weights of a model.

    Args:
        entries: The names in it.
    """
    weights = [n for n in entries if n in (SINGLE, INDEX) or fits(n, _SHARDS)]
    return ADAPTER_CONFIG in entries and not weights


def open_adapter(folder: Folder) -> Checkpoint:
    """Open an adapter: its tensors by their own names, its configuration in `config`.

    Args:
        folder: The adapter's.

    Raises:
        FormatError: A file is missing or breaks its format's rules.
        PolicyError: There are other weights beside them, or as for `open_torch`.
        StorageError: A file cannot be read.
    """
    entries = folder.entries
    pickled = ADAPTER not in entries and PICKLED_ADAPTER in entries
    if ADAPTER not in entries and not pickled:
        reason = f"{ADAPTER_CONFIG} without {ADAPTER}"
        raise FormatError(reason, file=folder.path, code="E-NO-WEIGHTS")
    chosen = PICKLED_ADAPTER if pickled else ADAPTER
    others = [n for n in sorted(entries) if n != chosen and fits(n, _OTHERS)]
    if others:
        raise PolicyError(
            f"ambiguous weights: {chosen} and {shown(others[0])}",
            file=folder.path,
            hint="keep one of the two in the folder",
            code="E-TWO-ANSWERS",
        )
    config = folder.open(ADAPTER_CONFIG)
    settings = parse_object(config.read_all(_MAX_CONFIG), file=config.path, what="configuration")
    if not isinstance(settings.get("peft_type"), str):
        reason = "no peft_type; expected a PEFT adapter's"
        raise FormatError(reason, file=config.path, code="E-ADAPTER-CONFIG")
    weights = folder.open_weights(chosen)
    tensors, layout = dict(weights.tensors), dict.fromkeys(weights.tensors, ADAPTER)
    files, warnings = [weights.file.ref()], [*weights.warnings]
    for name in filter(_holds_weights, entries):
        if name == chosen:
            continue
        more = folder.open_weights(name)
        twice = sorted(more.tensors.keys() & tensors.keys())
        if twice:
            raise PolicyError(
                f"ambiguous weights: {chosen} and {shown(name)} both have '{shown(twice[0])}'",
                file=folder.path,
                hint="keep one of the two in the folder",
                code="E-TWO-ANSWERS",
            )
        tensors |= more.tensors
        layout |= dict.fromkeys(more.tensors, name)
        files.append(more.file.ref())
        warnings += more.warnings
    beside = [folder.open(name) for name in entries if fits(name, TOKENIZER)]
    return Checkpoint(
        tensors,
        label=folder.label,
        key=folder.key,
        metadata=weights.metadata,
        layout=layout,
        is_directory=True,
        files=tuple(files),
        side_files=(config.ref(), *(file.ref() for file in beside)),
        warnings=tuple(warnings),
        config=settings,
    )


def _holds_weights(name: str) -> bool:
    """True for a file of weights that training left beside an adapter, such as a projector's."""
    return name.endswith((".safetensors", *PICKLE_ENDINGS)) and not fits(name, TRAINING)


def new_adapter(tensors: Mapping[str, TensorView], config: Mapping[str, Any]) -> Checkpoint:
    """An adapter that is made here, as a checkpoint that `save` writes as PEFT does.

    Args:
        tensors: Under the names of PEFT's files.
        config: The contents of adapter_config.json.
    """
    return Checkpoint(
        tensors,
        label="adapter",
        metadata={"format": "pt"},
        layout=dict.fromkeys(tensors, ADAPTER),
        is_directory=True,
        side_files=(_made_file(ADAPTER_CONFIG, dump(config)),),
        config=config,
    )


def name_base(base: Checkpoint) -> dict[str, str | None]:
    """The fields of an adapter's configuration that tell its base, without where it lies.

    Args:
        base: The model that the adapter belongs to.
    """
    commit = base.hub_id.partition("@")[2]
    name = public_name(base).partition("@")[0]
    return {"base_model_name_or_path": name, "revision": commit or None}


def _made_file(name: str, content: bytes) -> FileRef:
    """A small file that is made here, not read."""

    def hashed(_stop: threading.Event | None) -> str:
        raise ValueError(f"{name} is no input")

    def nothing() -> None: ...

    return FileRef(name, name, len(content), lambda: content, lambda: nothing, hashed, nothing)
