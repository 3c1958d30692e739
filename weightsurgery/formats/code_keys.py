"""Keys of configuration files that make transformers run code, or load other weights."""

from __future__ import annotations

from typing import Any

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
