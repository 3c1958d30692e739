"""The names of a model directory's files."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
RECORD = "wsurg-record.json"
CARD = "README.md"

# What travels with the weights. Everything else is left out, and listed.
SIDE_FILES = (
    *("config.json", "generation_config.json", "tokenizer*.json", "special_tokens_map.json"),
    *("vocab.*", "merges.txt", "*.model", "spiece*", "sentencepiece*", "chat_template.*"),
    *("added_tokens.json", "preprocessor_config.json", "processor_config.json"),
    *("LICENSE*", "NOTICE*"),
)
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin")


def fits(name: str, patterns: Iterable[str]) -> bool:
    """True if a file name fits one of the patterns; case matters."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def is_adapter_layout(layout: Mapping[str, str]) -> bool:
    """True for the layout of an adapter, whose one file has a name of its own."""
    return ADAPTER in layout.values()
