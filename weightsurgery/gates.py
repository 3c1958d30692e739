"""Gates: conditions under which `diff` fails, for scripts and continuous integration."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from weightsurgery.alignment import matches
from weightsurgery.comparison import METRICS, DiffReport
from weightsurgery.errors import GateError, SettingError

_COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
}
_GATE = re.compile(r"\s*(?:(\S+)\s*:)?\s*(\w+(?:\.\d+)?)\s*(>=|<=|==|!=|>|<)\s*(\S+)\s*")


@dataclass(frozen=True)
class Gate:
    """A condition under which `diff` fails: `[GLOB:]METRIC OPERATOR NUMBER`.

    Attributes:
        text: As the user wrote it.
        glob: Tensors it looks at; "" for the whole model.
        metric: One of `METRICS`.
        comparison: One of > >= < <= == !=.
        bound: The number.
    """

    text: str
    glob: str
    metric: str
    comparison: str
    bound: float

    def failures(self, report: DiffReport) -> list[str]:
        """What meets the condition, as lines; empty if the gate holds."""
        entries = [{"tensor": "model", **report.model}]
        if self.glob:
            entries = [e for e in report.tensors if matches(e["tensor"], (self.glob,))]
        compare = _COMPARE[self.comparison]
        return [
            f"{entry['tensor']}: {self.metric} is {entry[self.metric]:.6g}"
            for entry in entries
            if entry[self.metric] is not None and compare(entry[self.metric], self.bound)
        ]


def parse_gate(text: str) -> Gate:
    """Read a condition such as `relative_l2 > 0.1` or `*.bias: max_abs > 1`.

    Raises:
        SettingError: It cannot be read, or names no metric.

    Example:
        >>> parse_gate("relative_l2 > 0.1").bound
        0.1
    """
    found = _GATE.fullmatch(text)
    try:
        bound = float(found[4]) if found else None
    except ValueError:
        bound = None
    if found is None or bound is None:
        raise SettingError(
            f"cannot read the condition '{text}'", hint="write for example 'relative_l2 > 0.1'"
        )
    if found[2] not in METRICS:
        raise SettingError(f"no metric '{found[2]}'; there are {', '.join(METRICS)}")
    return Gate(text.strip(), found[1] or "", found[2], found[3], bound)


def check_gates(report: DiffReport, gates: Sequence[Gate]) -> None:
    """Raise if a condition is met.

    Raises:
        GateError: The first gate that fails, with what made it fail.
    """
    for gate in gates:
        failures = gate.failures(report)
        if failures:
            more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
            raise GateError(f"the gate '{gate.text}' failed: {failures[0]}{more}")
