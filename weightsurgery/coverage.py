"""Coverage: which share of TUNED's parameters has a counterpart in BASE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weightsurgery.errors import counted, first_few, shown

ENOUGH = 0.95  # below this share, commands that write refuse


@dataclass(frozen=True)
class Coverage:
    """How much of TUNED was looked at. Tied weights count once; integers do not count.

    Attributes:
        parameters: TUNED's floating-point parameters, task heads that BASE lacks among them.
        paired: How many of them have a counterpart in BASE.
        heads: How many belong to task heads that BASE lacks.
        unpaired: The tensors that have no counterpart, or not for all of their elements, with
            the reason; task heads are not among them.
        architecture: The class whose facts were used, "" where it is unknown: then tensors were
            paired by names and shapes.
    """

    parameters: int
    paired: int
    heads: int
    unpaired: Mapping[str, str]
    architecture: str = ""

    @property
    def share(self) -> float:
        """Share of what is no task head that has a counterpart, 0 to 1."""
        expected = self.parameters - self.heads
        return self.paired / expected if expected else 1.0

    @property
    def is_complete(self) -> bool:
        """True if everything but task heads has a counterpart."""
        return self.paired == self.parameters - self.heads

    @property
    def is_enough(self) -> bool:
        """True if commands that write go on without being told to."""
        return self.share >= ENOUGH

    @property
    def summary(self) -> str:
        """One sentence on what has no counterpart, "" if everything has."""
        if self.is_complete:
            return ""
        names = first_few([f"'{shown(name)}'" for name in self.unpaired])
        few = counted(len(self.unpaired), "tensor has", "tensors have")
        percent = min(self.share, 0.999999) if self.paired else 0.0
        return (
            f"{_percent(percent)} of TUNED's parameters have a counterpart in BASE; "
            f"{few} none, or not for every element: {names}"
        )

    def to_json(self) -> dict[str, Any]:
        """The report, as records and `--json` show it."""
        return {
            "share": self.share,
            "parameters": self.parameters,
            "paired": self.paired,
            "task_heads": self.heads,
            "unpaired": [
                {"tensor": name, "reason": reason} for name, reason in self.unpaired.items()
            ],
            "architecture": self.architecture or None,
        }


def _percent(share: float) -> str:
    """A share as text that never rounds up to all."""
    for digits in range(2, 7):
        text = f"{share:.{digits}%}"
        if not text.startswith("100"):
            return text
    return "less than 100 %"
