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
        added: How many belong to tokens that BASE lacks.
        unpaired: The tensors without a counterpart, with the reason; task heads are not among
            them.
        partly: The tensors of which some elements have a counterpart, with the reason.
        architecture: The class whose facts were used, "" where it is unknown: then tensors were
            paired by names and shapes.
    """

    parameters: int
    paired: int
    heads: int
    added: int
    unpaired: Mapping[str, str]
    partly: Mapping[str, str]
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

    def is_enough(self, *, besides: int = 0) -> bool:
        """True if commands that write need no permission to go on.

        Neither task heads nor the rows of added tokens can have a counterpart; so many of the
        others must have one.

        Args:
            besides: Parameters that were left out on request.
        """
        return self.paired >= ENOUGH * (self.parameters - self.heads - self.added - besides)

    @property
    def summary(self) -> str:
        """One sentence on what has no counterpart, "" if everything has."""
        if self.is_complete:
            return ""
        found = []
        if self.unpaired:
            none = counted(len(self.unpaired), "tensor has none", "tensors have none")
            found.append(f"{none} ({_few(self.unpaired)})")
        if self.partly:
            some = counted(len(self.partly), "tensor has one", "tensors have one")
            found.append(f"{some} for some elements only ({_few(self.partly)})")
        share = f"{percent(self.share)} of TUNED's parameters have a counterpart in BASE"
        return f"{share}: {', '.join(found)}"

    def to_json(self) -> dict[str, Any]:
        """The report, as records and `--json` show it."""
        return {
            "share": self.share,
            "parameters": self.parameters,
            "paired": self.paired,
            "task_heads": self.heads,
            "added_tokens": self.added,
            "unpaired": _entries(self.unpaired),
            "partly_paired": _entries(self.partly),
            "architecture": self.architecture or None,
        }


def _entries(reasons: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"tensor": name, "reason": reason} for name, reason in reasons.items()]


def _few(names: Mapping[str, str]) -> str:
    return first_few([f"'{shown(name)}'" for name in names])


def percent(share: float) -> str:
    """A share as text, which says 100 % of nothing less.

    Example:
        >>> percent(1.0), percent(0.99999), percent(0.5)
        ('100 %', '99.999 %', '50.00 %')
    """
    if share == 1:
        return "100 %"
    texts = (f"{100 * share:.{digits}f}" for digits in range(2, 13))
    return f"{next((text for text in texts if not text.startswith('100')), '<100')} %"
