"""Where the law of ratio 1 cannot hold, and why: docs/reference/architectures.md lists it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """A case in which the law does not hold.

    Attributes:
        case: What the models are like.
        result: What happens.
        reason: Why it cannot be otherwise.
    """

    case: str
    result: str
    reason: str


UNTIED_BASE = Limit(
    "TUNED ties its output head to the word embedding, BASE has a head of its own",
    "`mix --ratio 1` gives BASE's embedding in both places; BASE's head is listed under"
    " `only_in_base` with `tied` true",
    "outputs keep TUNED's config.json, which makes the two one tensor",
)
SHARED_LAYERS = Limit(
    "Zamba and Zamba 2: TUNED stores a copy of the shared layer for each place where it is used,"
    " BASE stores it once",
    "refused (`E-PAIR-COVERAGE`)",
    "which layers share weights depends on the layer layout in config.json, and the facts do not"
    " cover layouts",
)
LIMITS = (UNTIED_BASE, SHARED_LAYERS)
