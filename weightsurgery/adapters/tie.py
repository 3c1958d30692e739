"""The word embedding and the output head that is one with it, and how to make them two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from weightsurgery import ties as guessed
from weightsurgery.architecture.canonical import read_names, relative
from weightsurgery.architecture.composite import find_architecture
from weightsurgery.architecture.facts import Architecture, class_of
from weightsurgery.architecture.ties import find_ties
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.formats.config import with_config

_FLAG = "tie_word_embeddings"
# Types whose forward pass asks whether the head is tied, or that ignore the setting: untied they
# compute something else.
_TIED_FOR_GOOD = frozenset(
    (
        *("t5", "mt5", "umt5", "longt5", "switch_transformers", "udop", "pop2piano"),
        *("t5gemma", "marian"),
    )
)


@dataclass(frozen=True)
class Tie:
    """An output head that is one with the word embedding.

    Attributes:
        embedding: The word embedding's name.
        head: The head's name, stored or not; "" where it is not known.
        can_untie: Whether config.json can make the two separate tensors.
    """

    embedding: str
    head: str
    can_untie: bool = True


def find_tie(checkpoint: Checkpoint) -> Tie | None:
    """The word embedding and the head that is tied to it; None where there is no such thing.

    None also where it is not clear which two these are: see `ties.find_unclear_tie`. The class
    and config.json decide; where the class is not known, names do.

    Args:
        checkpoint: A model with its config.
    """
    known = find_architecture(checkpoint.config)
    if known is None:
        found = guessed.find_tie(checkpoint)
        return None if found is None else Tie(found.embedding, found.head)
    if not known.embedding or not known.head or is_bare(checkpoint, known):
        return None
    embedding, head = relative(known, known.embedding), relative(known, known.head)
    group = find_ties(known, checkpoint.config).group(embedding)
    names = read_names(checkpoint, known).stored
    stored = [name for name in group if name in names]
    if head not in group or not stored:
        return None
    first = next((name for name in stored if name != head), head)
    after = find_ties(known, _untied_config(known, checkpoint.config))
    layers = find_ties(known, checkpoint.config).numbered
    return Tie(
        embedding=names[first],
        head=names.get(head, known.head) if first != head else known.head,
        can_untie=known.model_type not in _TIED_FOR_GOOD
        and head not in after.group(embedding)
        and first != head
        and after.numbered == layers,
    )


def is_bare(checkpoint: Checkpoint, known: Architecture) -> bool:
    """True for a base model alone, without an output head.

    config.json names no class and ties nothing, and the tensors' names lack the base's prefix.

    Args:
        checkpoint: A model with its config.
        known: Its architecture.
    """
    prefix = f"{known.prefix}."
    if checkpoint.config.get(_FLAG) is True:
        return False
    return not (class_of(checkpoint.config) or any(name.startswith(prefix) for name in checkpoint))


def find_unclear(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The tensors that could be the tied embedding or its head, where it is not clear which are.

    Args:
        checkpoint: A model with its config; a known class leaves nothing unclear.
    """
    known = find_architecture(checkpoint.config)
    return guessed.find_unclear_tie(checkpoint) if known is None else ()


def is_tied(checkpoint: Checkpoint) -> bool:
    """True if a model computes with one tensor for the word embedding and the output head.

    Args:
        checkpoint: A model with its config.
    """
    if find_architecture(checkpoint.config) is not None:
        return find_tie(checkpoint) is not None
    return guessed.says_tied(checkpoint) or not any(map(guessed.is_output_head, checkpoint))


def find_shared(checkpoint: Checkpoint, name: str) -> tuple[str, ...]:
    """The modules that use a stored tensor, where there are several.

    Args:
        checkpoint: A model with its config.
        name: Of one of its tensors.

    Returns:
        Canonical names, such as those of an encoder's and a decoder's embedding; () where one
        module uses it, where it is a vector, or where the architecture is not known.
    """
    known = find_architecture(checkpoint.config)
    if known is None or is_bare(checkpoint, known) or len(checkpoint[name].shape) < 2:
        return ()
    canonical = read_names([name], known).places[name].canonical
    group = find_ties(known, checkpoint.config).group(canonical)
    return tuple(group) if len(group) > 1 else ()


def untied(checkpoint: Checkpoint, tie: Tie) -> Checkpoint:
    """The model with its head stored apart from the embedding; as it is, where no head can be.

    What the same setting ties besides, such as a head's bias, is stored apart as well.

    Args:
        checkpoint: The model.
        tie: From `find_tie`.
    """
    if not tie.head or not tie.can_untie:
        return checkpoint
    known = find_architecture(checkpoint.config)
    copies = {tie.head: tie.embedding} if known is None else _copies(known, checkpoint, tie)
    tensors = dict(checkpoint)
    for name, source in copies.items():
        if name not in tensors:
            tensors[name] = replace(checkpoint[source], name=name, status="added")
    key = known.text_config_key if known is not None else ""
    changed = with_config(replace(checkpoint, tensors=tensors), tie_word_embeddings=False)
    return with_config(changed, inside=key, tie_word_embeddings=False) if key else changed


def _copies(known: Architecture, checkpoint: Checkpoint, tie: Tie) -> dict[str, str]:
    """The tensors to store once nothing is tied, each with the one that has its values."""
    stored = read_names(checkpoint, known).stored
    before = find_ties(known, checkpoint.config)
    after = find_ties(known, _untied_config(known, checkpoint.config))
    copies = {tie.head: tie.embedding}
    for one in known.ties_of(checkpoint.config):
        for name in (one.target, one.source):
            canonical = relative(known, name)
            there = any(other in stored for other in after.group(canonical))
            source = next((stored[o] for o in before.group(canonical) if o in stored), None)
            if source is not None and not there and "*" not in name and name != known.head:
                copies[name] = source
    return copies


def _untied_config(known: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    found = {**config, _FLAG: False}
    place = found
    for part in known.text_config_key.split(".") if known.text_config_key else ():
        inner = place.get(part)
        place[part] = dict(inner) if isinstance(inner, Mapping) else {}
        place = place[part]
    place[_FLAG] = False
    return found
