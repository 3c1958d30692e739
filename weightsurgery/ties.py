"""Tied weights: tensors that config.json declares to be one, though the file stores several."""

from __future__ import annotations

from dataclasses import dataclass

from weightsurgery.anatomy import find_embedding, kind_of, likely_embeddings
from weightsurgery.checkpoint import Checkpoint

_HEADS = ("lm_head", "embed_out", "cls.predictions.decoder")
# Decoders whose config.json may leave the key out and mean true, as transformers 4 wrote it.
_TIED_BY_DEFAULT = frozenset(
    (
        *("bloom", "cohere", "cohere2", "ctrl", "falcon", "falcon_mamba", "gemma", "gemma2"),
        *("gemma3_text", "gpt2", "gpt_bigcode", "gpt_neo", "lfm2", "mamba", "mpt", "openai-gpt"),
        *("opt", "recurrent_gemma", "smollm3", "starcoder2", "xglm"),
    )
)
# What has no output head to tie, whatever its config.json says.
_HEADLESS = ("Classification", "QuestionAnswering", "MultipleChoice", "Model")
_WITH_HEAD = ("LMHeadModel", "HeadsModel")
# Where a decoder's word embedding lies if its head is `lm_head.weight`. Encoder-decoders are not
# here, for T5 computes otherwise where the head is tied.
_BESIDE_LM_HEAD = (
    *("model.embed_tokens.weight", "transformer.wte.weight", "wte.weight"),
    *("backbone.embeddings.weight", "transformer.tokens_embed.weight"),
    "transformer.word_embeddings.weight",
)


@dataclass(frozen=True)
class Tie:
    """An output head that is one with the word embedding.

    Attributes:
        embedding: The word embedding's name.
        head: The head's name, stored or not; "" where it is not known.
    """

    embedding: str
    head: str


def says_tied(checkpoint: Checkpoint) -> bool:
    """True if config.json ties the output head to the word embedding, or leaves it at that."""
    said = checkpoint.config.get("tie_word_embeddings")
    kind = checkpoint.config.get("model_type")
    return said is True or (
        said is None and isinstance(kind, str) and kind in _TIED_BY_DEFAULT  # it may be a list
    )


def find_tie(checkpoint: Checkpoint) -> Tie | None:
    """The word embedding and the head that is tied to it; None where there is no such thing.

    None also where nobody can tell which two these are: see `find_unclear_tie`.

    A model that config.json neither ties nor unties, and that stores no head though it has one by
    its architecture, is taken to be tied.

    Args:
        checkpoint: A model with its config.
    """
    found = _could_be_tied(checkpoint)
    if found is None or len(found[0]) != 1 or len(found[1]) > 1:
        return None
    (embedding,), heads = found
    beside = "lm_head.weight" if embedding in _BESIDE_LM_HEAD else ""
    return Tie(embedding, heads[0] if heads else beside)


def find_unclear_tie(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The tensors that could be the tied embedding or its head, where nobody can tell which are.

    Args:
        checkpoint: A model with its config.

    Returns:
        () where nothing is tied, or where `find_tie` tells what.
    """
    found = _could_be_tied(checkpoint)
    if found is None or (len(found[0]) == 1 and len(found[1]) <= 1):
        return ()
    return (*found[0], *found[1])


def _could_be_tied(checkpoint: Checkpoint) -> tuple[list[str], list[str]] | None:
    """Embeddings and stored heads that a tie could be of; None where there is no tie."""
    embeddings = likely_embeddings(checkpoint)
    named = checkpoint.config.get("architectures")
    architectures = [str(one) for one in named] if isinstance(named, list) else []
    if not embeddings or (architectures and all(map(_is_headless, architectures))):
        return None
    heads = [name for name in checkpoint if is_output_head(name)]
    silent = checkpoint.config.get("tie_word_embeddings") is None
    if not says_tied(checkpoint) and not (silent and architectures and not heads):
        return None
    return embeddings, heads


def _is_headless(architecture: str) -> bool:
    return architecture.endswith(_HEADLESS) and not architecture.endswith(_WITH_HEAD)


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
        {} unless config.json ties them and the file stores a tensor twice.
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
