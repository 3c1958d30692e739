"""An output's recipe done again on BASE and TUNED, where with a mask they are all that it took."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NoReturn

from weightsurgery.checkpoint import Checkpoint
from weightsurgery.errors import FormatError, SettingError, shown
from weightsurgery.formats.recorded import Recorded
from weightsurgery.proof.inputs import named
from weightsurgery.proof.rebuild import cut_as_recorded, inputs_of, rebuild, steps_of
from weightsurgery.stream import Engine
from weightsurgery.version import __version__

_STEPS = 16  # each may be a ranking, which reads both models twice


def do_again(
    recorded: Recorded, given: Mapping[int, Checkpoint], engine: Engine
) -> tuple[Checkpoint | None, str]:
    """What the recorded steps give, computed from the models that are given now.

    Args:
        recorded: The record.
        given: Place among the record's inputs, to that input.
        engine: How to run a ranking.

    Returns:
        The result, not read yet, and ""; or None, and why the steps cannot be done again here.

    Raises:
        FormatError: A step lacks an input or a setting, has one too many, or one out of range.
        NonFiniteError: A score is NaN or infinite.
    """
    recipe, version = recorded.content["recipe"], recorded.content["tool"]["version"]
    if version != __version__:
        return None, f"weightsurgery {shown(version)} made it, and this is {__version__}"
    further = [i for i in inputs_of(recipe) if i not in given]
    if further:
        name = recorded.content["inputs"][further[0]]["name"]
        return None, f"its steps took '{shown(name)}' too"
    if any(step["settings"].get("counts") is not None for step in steps_of(recipe)):
        return None, "its steps took token counts too"
    if sum(step["operator"] != "rename" for step in steps_of(recipe)) > _STEPS:
        return None, f"it has more than {_STEPS} steps"
    entries = recorded.content["inputs"]
    known = {number: named(one, entries[number]) for number, one in given.items()}
    find_counts = partial(_no_counts, recorded.path)
    try:
        made = rebuild(recipe, known, path=recorded.path, find_counts=find_counts, engine=engine)
    except SettingError as error:
        reason = f"its steps cannot be done again: {error.reason}"
        raise FormatError(reason, file=recorded.path, code="E-RECORD") from error
    return cut_as_recorded(made, recorded), ""


def _no_counts(path: str, told: Any, _tuned: Checkpoint) -> NoReturn:
    reason = f"the token counts are {shown(repr(told))}"
    raise FormatError(reason, file=path, code="E-RECORD")
