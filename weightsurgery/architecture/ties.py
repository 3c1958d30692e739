"""Tied weights: stored tensors, one or several, that are one tensor of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weightsurgery.architecture.canonical import relative
from weightsurgery.architecture.facts import Architecture, Tie


@dataclass(frozen=True)
class Ties:
    """The canonical names that are one tensor.

    Attributes:
        sources: Each tied name to the one that it is tied to.
        possible: The same for ties that this model does not have, but that its class can have.
        numbered: Templates of names that may be tied to others of the same template: layers that
            share their weights. Which ones do, only their values tell.
    """

    sources: Mapping[str, str]
    possible: Mapping[str, str]
    numbered: frozenset[str] = frozenset()

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
    held = architecture.ties_of(config)
    others = tuple(tie for tie in architecture.ties if tie not in held)
    numbered = (relative(architecture, name) for tie in held for name in (tie.target, tie.source))
    return Ties(
        _named(architecture, held),
        _named(architecture, others),
        frozenset(name for name in numbered if "*" in name),
    )


def _named(architecture: Architecture, ties: tuple[Tie, ...]) -> dict[str, str]:
    """Canonical names of ties, without those by number."""
    return {
        relative(architecture, tie.target): relative(architecture, tie.source)
        for tie in ties
        if "*" not in tie.target and "*" not in tie.source
    }
