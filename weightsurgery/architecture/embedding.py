"""The word embedding: which stored tensor has a row for each token."""

from __future__ import annotations

from collections.abc import Mapping

from weightsurgery import anatomy
from weightsurgery.architecture.canonical import read_names, relative, template
from weightsurgery.architecture.composite import find_architecture
from weightsurgery.architecture.facts import Architecture
from weightsurgery.architecture.ties import find_ties
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.ties import is_output_head


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


def vocabulary_axes(known: Architecture) -> Mapping[str, int]:
    """The dimension that grows with the vocabulary, by canonical name with its numbers replaced.

    Args:
        known: The architecture.
    """
    return {template(relative(known, name)): axis for name, axis in known.vocabulary.items()}


def vocabulary_axis(checkpoint: Checkpoint, name: str) -> int | None:
    """The dimension of a stored tensor that grows with the vocabulary, None if none does.

    Args:
        checkpoint: A model; without a known architecture names decide.
        name: Of one of its tensors.
    """
    known = find_architecture(checkpoint.config)
    if known is None:
        return 0 if name == anatomy.find_embedding(checkpoint) or is_output_head(name) else None
    canonical = read_names([name], known).places[name].canonical
    return vocabulary_axes(known).get(template(canonical))
