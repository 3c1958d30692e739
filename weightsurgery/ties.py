"""Tied weights: tensors that config.json declares to be one, though the file stores several."""

from __future__ import annotations

from weightsurgery.anatomy import find_embedding, kind_of
from weightsurgery.checkpoint import Checkpoint

_HEADS = ("lm_head", "embed_out", "cls.predictions.decoder")


def says_tied(checkpoint: Checkpoint) -> bool:
    """True if config.json ties the output head to the word embedding."""
    return checkpoint.config.get("tie_word_embeddings") is True


def is_output_head(name: str) -> bool:
    """True for the matrix that turns hidden states into token logits."""
    return name.rpartition(".")[0].endswith(_HEADS) and name.endswith("weight")


def tied_to(checkpoint: Checkpoint) -> dict[str, str]:
    """Stored copies to the tensor they are tied to, the word embedding.

    What config.json declares is not believed: the copies are edited alike, but each from its own
    bytes, and `diff` compares a copy whose bytes differ on its own.

    Args:
        checkpoint: A model with its config.

    Returns:
        {} unless config.json says `tie_word_embeddings` and the file stores a tensor twice.
    """
    embedding = find_embedding(checkpoint)
    if not says_tied(checkpoint) or embedding is None:
        return {}
    like = checkpoint[embedding]
    return {
        name: embedding
        for name, view in checkpoint.items()
        if name != embedding
        and (is_output_head(name) or kind_of(name) == "embedding")
        and (view.shape, view.dtype) == (like.shape, like.dtype)
    }
