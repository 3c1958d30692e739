"""The word embedding: which stored tensor has a row for each token."""

from __future__ import annotations

from weightsurgery import anatomy
from weightsurgery.architecture.canonical import read_names, relative
from weightsurgery.architecture.composite import find_architecture
from weightsurgery.architecture.ties import find_ties
from weightsurgery.checkpoint import Checkpoint


def find_embedding(checkpoint: Checkpoint) -> str | None:
    """The stored tensor that is the word embedding, under whichever of its tied names.

    Args:
        checkpoint: A model; without a known architecture its names decide.

    Returns:
        Its name; None where no tensor, or more than one, looks like it.
    """
    known = find_architecture(checkpoint.config)
    if known is not None and known.embedding:
        names, ties = read_names(checkpoint, known), find_ties(known, checkpoint.config)
        for canonical in ties.group(relative(known, known.embedding)):
            if names.stored.get(canonical) is not None:
                return names.stored[canonical]
    return anatomy.find_embedding(checkpoint)
