"""Gates: conditions under which `diff` fails, for scripts and continuous integration."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightsurgery.alignment import check_glob, matches
from weightsurgery.comparison import DiffReport
from weightsurgery.errors import GateError, SettingError, shown
from weightsurgery.statistics import METRICS

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
        """What meets the condition, as lines; empty if the gate holds.

        A relative drift from a base of zeros counts as infinite; what is otherwise undefined
        meets no condition.

        Raises:
            SettingError: The glob matches no tensor that was compared.
        """
        entries = [{"tensor": "model", **report.model}]
        if self.glob:
            check_glob(self.glob, [entry["tensor"] for entry in report.tensors])
            entries = [e for e in report.tensors if matches(e["tensor"], (self.glob,))]
        values = [(entry["tensor"], self._value(entry)) for entry in entries]
        return [
            f"{shown(name)}: {self.metric} is {value:.6g}"
            for name, value in values
            if value is not None and _COMPARE[self.comparison](value, self.bound)
        ]

    def _value(self, entry: Mapping[str, Any]) -> float | None:
        value: float | None = entry[self.metric]
        infinite = value is None and self.metric == "relative_l2" and entry["l2"]
        return math.inf if infinite else value


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
    if found is None or bound is None or not math.isfinite(bound):
        raise SettingError(
            f"cannot read the condition '{text}'",
            hint="write for example 'relative_l2 > 0.1'",
            code="E-GATE-CONDITION",
        )
    if found[2] not in METRICS:
        raise SettingError(
            f"no metric '{found[2]}'; there are {', '.join(METRICS)}", code="E-GATE-CONDITION"
        )
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
