"""The steps of a recipe, applied again: each operator by its name, with the recorded settings."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Union, get_args, get_origin, get_type_hints

import weightsurgery.operators
from weightsurgery.adapters.extract import extract_adapter
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.comparison import drift
from weightsurgery.errors import FormatError, PolicyError, shown
from weightsurgery.formats.layout import is_adapter_layout
from weightsurgery.formats.recorded import Recorded
from weightsurgery.masks import changed_mask
from weightsurgery.registry import OPERATORS, Operator
from weightsurgery.stream import Engine
from weightsurgery.token_counts import TokenCounts
from weightsurgery.version import __version__

Given = Mapping[str, Checkpoint]
FindCounts = Callable[[Any, Checkpoint], TokenCounts]
"""What a record says of token counts, and TUNED, to the counts themselves."""

_FUNCTIONS: dict[str, Callable[..., Checkpoint]] = {
    "extract-adapter": extract_adapter,
    "drift": drift,
}
EXACT = ("mix", "purify", "epur", "rename", "mask")
"""Steps that give the same bits on any machine: they choose among bits that are there."""
_TOLD = "which the record tells of and does not hold"
_REFUSED = {
    **dict.fromkeys(("finetune", "train-adapter", "meraser"), f"it is a training on data {_TOLD}"),
    **dict.fromkeys(
        ("fisher", "fisher-standard-error", "hutchinson"), f"it was computed from data {_TOLD}"
    ),
    "mismatch": "it makes data, no checkpoint; `wsurg mismatch` with its seed does it again",
}


def check_replayable(recorded: Recorded) -> None:
    """Refuse a record of which some step cannot be done again, before anything is read.

    Args:
        recorded: The record.

    Raises:
        PolicyError: Another version made it, it lacks hashes, or a step is a training, was computed
            on a device, or is not known here.
        FormatError: It was altered since it was written.
    """
    path = recorded.path
    if not recorded.intact:
        reason = "altered since it was written: its record_sha256 is another"
        raise FormatError(reason, file=path, code="E-RECORD")
    version = recorded.content["tool"]["version"]
    if version != __version__:
        raise PolicyError(
            f"made by weightsurgery {shown(version)}; this is {__version__}",
            file=path,
            hint="replay it with that version: another may give other bytes",
            code="E-REPLAY-VERSION",
        )
    files = [file for given in recorded.content["inputs"] for file in given["files"]]
    if any(file["sha256"] is None for file in (*files, *recorded.files.values())):
        reason = "made with --no-hash: nothing tells its inputs by"
        raise PolicyError(reason, file=path, code="E-REPLAY-NO-HASH")
    for step in steps_of(recorded.content["recipe"]):
        reason = _refusal(step)
        if reason:
            raise PolicyError(
                f"the step '{shown(step['operator'])}' cannot be replayed: {reason}",
                file=path,
                hint="run its command again and compare the SHA-256 in the two records",
                code="E-REPLAY-STEP",
            )


def steps_of(recipe: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Every operator of a recipe, innermost first."""
    for inner in recipe.get("inputs", {}).values():
        yield from steps_of(inner)
    if "operator" in recipe:
        yield recipe


def inputs_of(recipe: Mapping[str, Any]) -> Iterator[int]:
    """The number of each input that a recipe reads."""
    if "input" in recipe:
        yield recipe["input"]
    for inner in recipe.get("inputs", {}).values():
        yield from inputs_of(inner)


def _refusal(step: Mapping[str, Any]) -> str:
    """Why a step cannot be done again; "" if it can."""
    name = step["operator"]
    if name in _REFUSED:
        return _REFUSED[name]
    if step["settings"].get("device") is not None:
        return "it was computed on a device, whose bits differ from one to another"
    if name in (*OPERATORS, *_FUNCTIONS, "rename", "mask"):
        return ""
    return "no operator here has this name"


def rebuild(
    recipe: Mapping[str, Any],
    inputs: Mapping[int, Checkpoint],
    *,
    path: str,
    find_counts: FindCounts,
    engine: Engine,
) -> Checkpoint:
    """Apply a recipe's operators to its inputs.

    Args:
        recipe: As a record holds it, from one that passed `check_replayable`.
        inputs: Place among the record's inputs, to that input, opened.
        path: Of the record, for messages.
        find_counts: Finds token counts.
        engine: Workers and progress.

    Returns:
        What the recipe makes; nothing is written yet.

    Raises:
        FormatError: A step lacks an input or a setting, or has one too many.
        SettingError: A setting is out of range.
    """
    if "input" in recipe:
        number: int = recipe["input"]
        return inputs[number]
    name, settings = recipe["operator"], recipe["settings"]
    given = {
        role: rebuild(inner, inputs, path=path, find_counts=find_counts, engine=engine)
        for role, inner in recipe["inputs"].items()
    }
    try:
        made = _done(name, settings, given, find_counts, engine)
        told = made.step.settings if made.step else {}
        if told.keys() != settings.keys():  # a default of today might not be that of then
            raise _WrongError(f"settings are {shown(sorted(settings))}; expected {sorted(told)}")
    except (_WrongError, KeyError) as error:
        reason = f"step '{shown(name)}': {shown(error)}"
        raise FormatError(reason, file=path, code="E-RECORD") from error
    return made


def _done(
    name: str, settings: Mapping[str, Any], given: Given, find_counts: FindCounts, engine: Engine
) -> Checkpoint:
    """What one step makes of its inputs."""
    if name == "rename":
        return given["checkpoint"].renamed(_names(settings["names"], given["checkpoint"]))
    if name == "mask":
        return changed_mask(given["edited"])
    if name in OPERATORS:
        return _apply(OPERATORS[name], settings, given, find_counts, engine)
    function = _FUNCTIONS[name]
    _check_settings(function, settings)
    run = {"engine": engine} if "engine" in inspect.signature(function).parameters else {}
    made: Checkpoint = function(given["base"], given["tuned"], **settings, **run)
    return made


def cut_as_recorded(made: Checkpoint, recorded: Recorded) -> Checkpoint:
    """A model cut into files as it was then: --max-shard-size is no part of a recipe."""
    if not made.is_directory or is_adapter_layout(made.layout):
        return made
    layout = {name: entry["file"] for name, entry in recorded.tensors.items() if name in made}
    return replace(made, layout=layout)


class _WrongError(Exception):
    """A step of a record does not fit its operator."""


def _names(names: Any, checkpoint: Checkpoint) -> dict[str, str]:
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise _WrongError("names are no map of names to names")
    if not names.keys() <= checkpoint.keys():
        raise _WrongError("names are of tensors that there are not")
    return names


def _apply(
    operator: Operator,
    settings: Mapping[str, Any],
    given: Given,
    find_counts: FindCounts,
    engine: Engine,
) -> Checkpoint:
    singular = operator.variadic.removesuffix("s")
    several = [c for n, c in given.items() if operator.variadic and n.split(" ")[0] == singular]
    arguments = [
        checkpoint
        for name in operator.inputs
        for checkpoint in (several if name == operator.variadic else [given[name]])
    ]
    further = {n: given[n] for n in operator.optional if n in given}
    if len(arguments) + len(further) != len(given):
        raise _WrongError("an input too many")
    unknown = settings.keys() - operator.settings.keys()
    if unknown:
        raise _WrongError(f"no setting is called {shown(min(unknown))}")
    values = dict(settings)
    for name, (kind, _, _) in operator.settings.items():
        optional = TokenCounts in get_args(kind) and values.get(name) is not None
        if kind is TokenCounts or optional:
            values[name] = find_counts(values.get(name), given["tuned"])
    return operator.function(*arguments, **values, **further, engine=engine)


def _check_settings(function: Callable[..., Checkpoint], settings: Mapping[str, Any]) -> None:
    hints = get_type_hints(function)
    parameters = inspect.signature(function).parameters
    known = {n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY} - {"engine"}
    for name, value in settings.items():
        if name not in known or not _is_a(hints[name], value):
            raise _WrongError(f"{shown(name)} is {shown(repr(value))}")


def _is_a(kind: Any, value: Any) -> bool:
    """True if a value from JSON is of an annotated type."""
    if get_origin(kind) in (Union, types.UnionType):
        return any(_is_a(inner, value) for inner in get_args(kind))
    if get_origin(kind) is not None:  # Sequence[str]
        inner = get_args(kind)[0]
        return isinstance(value, list) and all(_is_a(inner, v) for v in value)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind


assert weightsurgery.operators  # noqa: S101  imported for what it registers
