"""Models of the zoo to compute with: a folder with weights and tokenizer, and what is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests import tiny_models
from tests.architectures import (
    DECODERS,
    ENCODERS,
    MIXTURES,
    STATE_SPACE,
    Architecture,
    random_model,
    seed_of,
)
from weightsurgery.models import Quiet

_CAUSAL = {**DECODERS, **MIXTURES, **STATE_SPACE}
CAUSAL = {
    name: row for name, row in _CAUSAL.items() if row.model.endswith(("ForCausalLM", "HeadModel"))
}
CLASSIFIERS = {
    name: row
    for name, row in {**ENCODERS, **DECODERS}.items()
    if row.model.endswith("ForSequenceClassification")
}
ALL = {**CAUSAL, **CLASSIFIERS}


def folder_of(root: Path, name: str) -> Path:
    """A model as transformers saves it, with a tokenizer of as many words as it has rows."""
    path = root / name
    if path.exists():
        return path
    row = ALL[name]
    with Quiet():
        random_model(row, seed_of(name), base=False).save_pretrained(path)
    tiny_models.tokenizer(classifier=is_classifier(row)).save_pretrained(path)
    return path


def is_classifier(row: Architecture) -> bool:
    """True for a classifier of texts."""
    return row.model.endswith("ForSequenceClassification")


def reloaded(folder: Path, name: str) -> Any:
    """The model as transformers loads it."""
    import transformers

    with Quiet():
        kind = getattr(transformers, ALL[name].model)
        return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def saved(module: Any, folder: Path) -> dict[str, torch.Tensor]:
    """What transformers writes of a model: the tensors, under its names on disk."""
    with Quiet():
        module.save_pretrained(folder)
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }
