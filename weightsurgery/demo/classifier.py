"""A classifier to be trained: an encoder with a new head."""

from __future__ import annotations

from pathlib import Path

from weightsurgery.formats import disk
from weightsurgery.formats.place import told
from weightsurgery.models import Quiet


def new_classifier(base: Path, folder: Path, *, seed: int = 0) -> Path:
    """Save an encoder with a new two-label head, and its tokenizer.

    Args:
        base: A model directory of an encoder.
        folder: Where to; left alone if it is there.
        seed: Of the head's random weights.

    Returns:
        The folder.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if folder.exists():
        return folder
    with Quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=2, local_files_only=True, use_safetensors=True
        )
        partial = folder.with_name(f".{folder.name}.partial")
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(base, local_files_only=True).save_pretrained(partial)
    with told("cannot write", str(folder)):
        disk.rename_new(str(partial), str(folder))
    return folder
