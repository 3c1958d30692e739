"""Where the law of ratio 1 cannot hold, and why: docs/reference/architectures.md lists it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """A case in which an output is not what the law says.

    Attributes:
        case: What the models are like.
        result: What is written.
        reason: Why it cannot be otherwise.
    """

    case: str
    result: str
    reason: str


LIMITS = (
    Limit(
        "TUNED ties its output head to the word embedding, BASE has a head of its own",
        "`--ratio 1` gives BASE's embedding in both places; BASE's head is listed under"
        " `only_in_base` with `tied` true",
        "outputs keep TUNED's config.json, which makes the two one tensor",
    ),
)
