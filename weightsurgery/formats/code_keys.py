"""Keys of configuration files that make transformers run code, or load other weights."""

from __future__ import annotations

from typing import Any

CODE_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code", "transformers_weights")


def names_kernel(key: str, value: Any) -> bool:
    """True where attention or experts are to be computed by code from a repository.

    The value is a repository's name; or a map with one, where each part of a model has its own.

    Example:
        >>> names_kernel("_attn_implementation", "org/kernel@v1")
        True
        >>> names_kernel("attn_implementation", {"": "sdpa", "text_config": "eager"})
        False
    """
    text = str(value)
    return "_implementation" in key and ("/" in text or "kernels" in text)
