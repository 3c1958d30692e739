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
from weightsurgery.errors import GateError, SettingError, first_few, shown
from weightsurgery.statistics import METRICS

COUNTS = ("unpaired", "only_in_base")
"""Numbers of tensors: TUNED's without a counterpart, task heads left out, and BASE's."""

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
        metric: One of `METRICS` or `COUNTS`.
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
        meets no condition. A glob that matches only tensors that were not compared fails: nobody
        knows what they would show.

        Raises:
            SettingError: The glob matches no tensor.
        """
        if self.metric in COUNTS:
            return self._counted(report)
        entries = [{"tensor": "model", **report.model}]
        if self.glob:
            left = _left(report)
            check_glob(self.glob, [*(entry["tensor"] for entry in report.tensors), *left])
            entries = [e for e in report.tensors if matches(e["tensor"], (self.glob,))]
            if not entries:
                chosen = [name for name in left if matches(name, (self.glob,))]
                return [f"{shown(name)}: not compared ({left[name]})" for name in chosen]
        values = [(entry["tensor"], self._value(entry)) for entry in entries]
        return [
            f"{shown(name)}: {self.metric} is {value:.6g}"
            for name, value in values
            if value is not None and _COMPARE[self.comparison](value, self.bound)
        ]

    def _counted(self, report: DiffReport) -> list[str]:
        """The same for a number of tensors."""
        names = list(_names(report, self.metric))
        if self.glob:
            compared = [entry["tensor"] for entry in report.tensors]
            check_glob(self.glob, [*compared, *_left(report)])
            names = [name for name in names if matches(name, (self.glob,))]
        if not _COMPARE[self.comparison](len(names), self.bound):
            return []
        few = f": {first_few([shown(name) for name in names])}" if names else ""
        return [f"{self.metric} is {len(names):,}{few}"]

    def _value(self, entry: Mapping[str, Any]) -> float | None:
        value: float | None = entry[self.metric]
        infinite = value is None and self.metric == "relative_l2" and entry["l2"]
        return math.inf if infinite else value


def _left(report: DiffReport) -> dict[str, str]:
    """All tensors that were not compared, each with the reason."""
    heads = {e["tensor"]: e["reason"] for e in report.alignment["kept_from_tuned"]}
    return {**heads, **_names(report, "only_in_base")}


def _names(report: DiffReport, metric: str) -> dict[str, str]:
    """The tensors that a count is of, each with the reason."""
    alignment = report.alignment
    if metric == "unpaired":
        entries = alignment["coverage"]["unpaired"]
    else:
        entries = [e for e in alignment["only_in_base"] if not e["tied"]]
    return {entry["tensor"]: entry["reason"] for entry in entries}


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
    if found[2] not in (*METRICS, *COUNTS):
        raise SettingError(
            f"unknown metric '{found[2]}'; expected {', '.join((*METRICS, *COUNTS))}",
            code="E-GATE-CONDITION",
        )
    return Gate(text.strip(), found[1] or "", found[2], found[3], bound)


def gate_results(report: DiffReport, gates: Sequence[Gate]) -> list[dict[str, Any]]:
    """What each gate says, as `--json` shows it.

    Args:
        report: From `diff`.
        gates: The conditions.

    Returns:
        For each gate its condition, whether it failed, and what made it fail.

    Raises:
        SettingError: A glob matches no tensor.
    """
    found = [(gate, gate.failures(report)) for gate in gates]
    return [
        {"condition": gate.text, "failed": bool(failures), "failures": failures}
        for gate, failures in found
    ]


def check_gates(report: DiffReport, gates: Sequence[Gate]) -> None:
    """Raise if a condition is met.

    Args:
        report: From `diff`.
        gates: The conditions.

    Raises:
        GateError: The first gate that fails, with what made it fail.
        SettingError: A glob matches no tensor.
    """
    refuse_failed(gate_results(report, gates))


def refuse_failed(results: Sequence[Mapping[str, Any]]) -> None:
    """Raise if a gate failed.

    Args:
        results: From `gate_results`.

    Raises:
        GateError: The first gate that fails, with what made it fail.
    """
    for result in results:
        failures = result["failures"]
        if failures:
            more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
            raise GateError(f"the gate '{result['condition']}' failed: {failures[0]}{more}")
