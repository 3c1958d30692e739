"""Tied weights: stored tensors, one or several, that are one tensor of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weightsurgery.architecture.canonical import relative
from weightsurgery.architecture.facts import Architecture, Tie

_STATES = (None, False, True)  # of `tie_word_embeddings`: absent, false, true


@dataclass(frozen=True)
class Ties:
    """The canonical names that are one tensor.

    Attributes:
        sources: Each tied name to the one that it is tied to.
        possible: The same for ties that this model does not have, but that its class can have.
    """

    sources: Mapping[str, str]
    possible: Mapping[str, str]

    def group(self, name: str) -> list[str]:
        """The names that are one tensor with a name: the one they are tied to, then the others.

        Args:
            name: A canonical name; alone in its group if it is not tied.
        """
        source = self.sources.get(name, name)
        return [source, *(target for target, one in self.sources.items() if one == source)]


def find_ties(architecture: Architecture | None, config: Mapping[str, Any]) -> Ties:
    """The ties of a model, as its class and its configuration say.

    Args:
        architecture: The facts; None has no ties.
        config: The model's config.json.
    """
    if architecture is None:
        return Ties({}, {})
    state = _state(architecture, config)
    found: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for tie in architecture.ties:
        if "*" in tie.target or "*" in tie.source:
            continue  # boxes of detection models, by number
        names = {relative(architecture, tie.target): relative(architecture, tie.source)}
        found[not _holds(tie, state)].update(names)
    return Ties(*found)


def _state(architecture: Architecture, config: Mapping[str, Any]) -> tuple[int, int]:
    """What the model's configuration says of ties, and what its text model's does."""
    inner: Any = config
    for key in (architecture.text_config_key or "text_config").split("."):
        inner = inner.get(key) if isinstance(inner, Mapping) else None
    return _said(config), _said(inner)


def _said(config: Any) -> int:
    said = config.get("tie_word_embeddings") if isinstance(config, Mapping) else None
    return next((i for i, state in enumerate(_STATES) if said is state), 2 if said else 1)


def _holds(tie: Tie, state: tuple[int, int]) -> bool:
    place = 3 * state[0] + state[1] if len(tie.when) == 9 else state[0]
    return tie.when[place : place + 1] == "1"

