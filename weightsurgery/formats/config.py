"""Changes of a model's config.json."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from weightsurgery.checkpoint import Checkpoint, FileRef
from weightsurgery.formats.layout import joined
from weightsurgery.formats.strict_json import dump, parse_config
from weightsurgery.quantised import KEY, leftover_warnings

_DTYPE_KEYS = ("torch_dtype", "dtype")
_FLOATING = ("float64", "float32", "float16", "bfloat16", "double", "float", "half")


def with_config(checkpoint: Checkpoint, *, inside: str = "", **changes: Any) -> Checkpoint:
    """The same checkpoint with other values in its config.json, if it has one.

    Args:
        checkpoint: A model.
        inside: Dotted key of the nested configuration to change; "" for the outermost level.
        changes: Key to value.
    """
    path = inside.split(".") if inside else []
    return _changed(checkpoint, lambda config: _with_values(config, path, changes))


def _with_values(config: Any, path: list[str], changes: dict[str, Any]) -> dict[str, Any]:
    held = dict(config) if isinstance(config, dict) else {}
    if not path:
        return {**held, **changes}
    return {**held, path[0]: _with_values(held.get(path[0]), path[1:], changes)}


def with_dtype(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    """The same checkpoint with another dtype wherever its config.json tells a floating one.

    A model of several parts tells it for each of them: in `text_config`, `vision_config` and so on.
    What tells none, and the dtype of something else than floating numbers, stays as it is.

    Args:
        checkpoint: A model.
        dtype: In torch's words, such as "bfloat16".
    """
    for folder, config in {"": checkpoint.config, **checkpoint.parts}.items():
        if _with_dtype(config, dtype) != config:
            checkpoint = _changed(checkpoint, lambda config: _with_dtype(config, dtype), folder)
    return checkpoint


def without_leftovers(checkpoint: Checkpoint) -> Checkpoint:
    """The same model without a quantization_config that its plain tensors contradict.

    transformers goes by the key alone: it would ask for the quantization's package, or build
    quantized modules and look for scales that are not stored. So outputs are written without it,
    and a warning says so.

    Args:
        checkpoint: A model that was just opened.
    """
    warnings = leftover_warnings(checkpoint)
    if not warnings:
        return checkpoint
    found = _changed(checkpoint, _without_quantization)
    return replace(found, warnings=(*found.warnings, *warnings))


def _without_quantization(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_quantization(v) for k, v in value.items() if k != KEY}
    return [_without_quantization(v) for v in value] if isinstance(value, list) else value


def _changed(
    checkpoint: Checkpoint, change: Callable[[dict[str, Any]], dict[str, Any]], folder: str = ""
) -> Checkpoint:
    """The same checkpoint with another config.json, in its folder or in that of a part."""

    def changed(file: FileRef) -> FileRef:
        def content() -> bytes:
            return dump(change(parse_config(file.content(), file=file.path, what="config")))

        return replace(file, content=content)

    path = joined(folder, "config.json")
    files = (changed(file) if file.name == path else file for file in checkpoint.side_files)
    parts = dict(checkpoint.parts)
    if folder in parts:
        parts[folder] = change(dict(parts[folder]))
    config = checkpoint.config
    if not folder and config:
        config = change(dict(config))
    return replace(checkpoint, side_files=tuple(files), config=config, parts=parts)


def _with_dtype(value: Any, dtype: str) -> Any:
    if isinstance(value, dict):
        return {
            key: dtype if _tells_dtype(key, inner) else _with_dtype(inner, dtype)
            for key, inner in value.items()
        }
    return [_with_dtype(inner, dtype) for inner in value] if isinstance(value, list) else value


def _tells_dtype(key: str, value: Any) -> bool:
    named = isinstance(value, str) and value.removeprefix("torch.") in _FLOATING
    return named and key in _DTYPE_KEYS
