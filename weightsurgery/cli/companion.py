"""What an operator's command does besides the operator: options of its own, work before and after.

It lies in a module beside this one that has a `COMPANION`: `purify_steps` for `purify`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from weightsurgery.checkpoint import Checkpoint
from weightsurgery.report.outcome import outcome_tables
from weightsurgery.report.tables import Table

Inputs = Sequence[Checkpoint]
Given = Mapping[str, Any]


@dataclass(frozen=True)
class Companion:
    """The steps of a command besides its operator; each does nothing unless it is given.

    Attributes:
        parameters: Options of the command that are none of the operator's.
        check: From click's context: refuses what says nothing; gives parameters that are to count
            otherwise than as typed.
        also_used: From the command's parameters: settings of the operator that serve a step too.
        before: From the inputs, the operator's settings and the command's parameters: checkpoints
            for the operator's optional arguments.
        after: From the inputs, the operator's result and the command's parameters: the result that
            is written.
        found: From the inputs and the command's parameters, once all is written: what is told
            beside the record.
        tables: From the output's path and all that is told: how it is shown.
        judge: From all that is told, once it is shown: refuses what was written.
    """

    parameters: tuple[click.Parameter, ...] = ()
    check: Callable[[click.Context], dict[str, Any]] = lambda *_: {}
    also_used: Callable[[Given], tuple[str, ...]] = lambda *_: ()
    before: Callable[[Inputs, Given, Given], dict[str, Checkpoint]] = lambda *_: {}
    after: Callable[[Inputs, Checkpoint, Given], Checkpoint] = lambda *given: given[1]
    found: Callable[[Inputs, Given], dict[str, Any]] = lambda *_: {}
    tables: Callable[[str, Given], list[Table]] = outcome_tables
    judge: Callable[[Given], None] = lambda *_: None


def companion_of(name: str) -> Companion:
    """The steps of a command; one that does nothing, for most.

    Args:
        name: The operator's.
    """
    home = f"weightsurgery.cli.{name.replace('-', '_')}_steps"
    if importlib.util.find_spec(home) is None:
        return Companion()
    found: Companion = importlib.import_module(home).COMPANION
    return found
