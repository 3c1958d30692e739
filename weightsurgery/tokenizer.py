"""The tokenizer beside a model's weights, as transformers loads it."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from weightsurgery.checkpoint import Checkpoint
from weightsurgery.errors import MismatchError, shown
from weightsurgery.formats.layout import fits

_VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "spiece*", "sentencepiece*")


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Load the tokenizer of a model directory.

    Args:
        checkpoint: What was opened.

    Raises:
        MismatchError: It has none, or a package that converts it is not installed.
    """
    from transformers import AutoTokenizer

    reason, lacking = "no vocabulary", _lacking_packages(checkpoint)
    try:
        # Without one, transformers makes a tokenizer that knows no word.
        if any(fits(file.name, _VOCABULARIES) for file in checkpoint.side_files):
            return AutoTokenizer.from_pretrained(
                os.path.dirname(checkpoint.files[0].path),
                trust_remote_code=False,
                local_files_only=True,
                use_fast=True,
            )
    except Exception as error:  # a malformed file gives errors of all kinds
        reason = " ".join(str(error).split())
    if lacking:
        raise MismatchError(
            f"its tokenizer is a sentencepiece model; {' and '.join(lacking)} not installed",
            file=checkpoint.label,
            hint="pip install 'weightsurgery[train]'",
            code="E-TOKENIZER",
        )
    raise MismatchError(
        f"no tokenizer that can be loaded: {shown(reason)}",
        file=checkpoint.label,
        hint="put tokenizer.json and tokenizer_config.json beside the weights",
        code="E-TOKENIZER",
    )


def _lacking_packages(checkpoint: Checkpoint) -> list[str]:
    """The packages that turn a sentencepiece model into a tokenizer and are not installed."""
    names = [file.name for file in checkpoint.side_files]
    if "tokenizer.json" in names or not any(name.endswith(".model") for name in names):
        return []
    modules = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
    return [package for package, module in modules.items() if not _is_installed(module)]


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False
