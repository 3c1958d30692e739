"""Keys of configuration files that make transformers run code, or load other weights."""

from __future__ import annotations

from typing import Any

from weightsurgery.checkpoint import FileRef
from weightsurgery.errors import shown
from weightsurgery.formats.layout import fits
from weightsurgery.formats.strict_json import dump, parse_config

CODE_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code", "transformers_weights")


def names_kernel(key: str, value: Any) -> bool:
    """True where attention or experts are to be computed by code from a repository.

    The value is a repository's name; or a map with one, where each part of a model has its own.
    What is deeper than that is none that transformers knows, and is taken for one unsearched.

    Example:
        >>> names_kernel("_attn_implementation", "org/kernel@v1")
        True
        >>> names_kernel("attn_implementation", {"": "sdpa", "text_config": "eager"})
        False
    """
    if "_implementation" not in key:
        return False
    several = isinstance(value, dict | list)
    parts = (value.values() if isinstance(value, dict) else value) if several else [value]
    return any(
        isinstance(part, dict | list) or "/" in str(part) or "kernels" in str(part)
        for part in parts
    )


def travelling(side: FileRef) -> tuple[bytes, list[str]]:
    """A side file as it goes into an output: a config without the keys that load code or weights.

    Args:
        side: The file; read now, for what is written is what is checked.

    Returns:
        Its bytes, as they are where nothing was removed, and the removed keys.

    Raises:
        FormatError: A config is not valid JSON.
        ChangedError: It changed since it was opened.
    """
    content = side.content()
    if not is_config(side.name):
        return content, []
    removed: set[str] = set()
    clean = _strip(parse_config(content, file=side.path, what="config"), removed)
    return (dump(clean) if removed else content), sorted(removed)


def is_config(path: str) -> bool:
    """True for a configuration, in which keys may load code or weights."""
    name = path.rpartition("/")[2]
    return name.endswith("config.json") or fits(name, ("config_*.json",))


def _strip(value: Any, removed: set[str]) -> Any:
    if isinstance(value, dict):
        kept = {}
        for key, inner in value.items():
            if key in CODE_KEYS or names_kernel(key, inner):
                removed.add(shown(key))
            else:
                kept[key] = _strip(inner, removed)
        return kept
    return [_strip(inner, removed) for inner in value] if isinstance(value, list) else value
