"""Conversion rules at work: what the loading library stacks, joins, cuts and transposes.

The operations are done on index spaces, so nothing is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightsurgery.architecture.conversion import UnsupportedError
from weightsurgery.architecture.facts import Rule
from weightsurgery.architecture.pieces import Assembly, join, regroup, split, stack, transpose

# What the operations of a converter see: tensors under the pattern they are known by.
_State = dict[str, list[Assembly]]


@dataclass(frozen=True)
class _Task:
    """A converter, and what its operations may ask.

    Attributes:
        rule: The converter.
        target: The full name of its first target.
        shapes: Shapes of the model's tensors, as far as they are known.
        config: The model's configuration.
    """

    rule: Rule
    target: str
    shapes: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any]

    def full_name(self, pattern: str) -> str:
        """The full name of what stands under a pattern."""
        return self.target.replace(self.rule.targets[0], pattern, 1)

    def last_name(self, pattern: str, *, alone: bool) -> str:
        """What an operation calls its result: the target where there is one of each, else as is."""
        return self.rule.targets[0] if alone and len(self.rule.targets) == 1 else pattern


def assemble(
    rule: Rule,
    target: str,
    sources: Mapping[str, Sequence[Assembly]],
    *,
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
) -> dict[str, Assembly]:
    """Do on index spaces what a converter does on tensors.

    Args:
        rule: The converter.
        target: The full name of its first target.
        sources: For each source pattern the stored tensors, in natural order of their names.
        shapes: Shapes of the model's tensors, as far as they are known.
        config: The model's configuration.

    Returns:
        The model's tensors that come out, by full name.

    Raises:
        UnsupportedError: It does something that pieces cannot describe, or the tensors do not fit.
    """
    task = _Task(rule, target, shapes, config)
    state: _State = {pattern: list(found) for pattern, found in sources.items()}
    for name, settings in rule.operations:
        if name not in _OPERATIONS:
            raise UnsupportedError(f"the conversion '{name}' is not supported")
        state = _OPERATIONS[name](task, state, settings)
    return {task.full_name(pattern): _one(found) for pattern, found in state.items()}


def _one(found: Sequence[Assembly]) -> Assembly:
    if len(found) != 1:
        raise UnsupportedError(f"one tensor expected, found {len(found)}")
    return found[0]


def _only(state: _State) -> Assembly:
    if len(state) != 1:
        raise UnsupportedError("several tensors where one is expected")
    return _one(next(iter(state.values())))


def _merge(task: _Task, state: _State, settings: Mapping[str, Any]) -> _State:
    alone = len(state) == 1
    return {
        task.last_name(pattern, alone=alone): [stack(found, settings.get("dim", 0))]
        for pattern, found in state.items()
    }


def _concatenate(task: _Task, state: _State, settings: Mapping[str, Any]) -> _State:
    parts = [part for pattern in task.rule.sources for part in state.get(pattern, ())]
    if not parts:
        raise UnsupportedError("parts of it are missing")
    return {task.rule.targets[0]: [join(parts, settings.get("dim", 0))]}


def _chunk(task: _Task, state: _State, settings: Mapping[str, Any]) -> _State:
    part, axis = _only(state), settings.get("dim", 0)
    targets = list(task.rule.targets)
    if settings.get("num_shards_attribute"):
        count = _setting(task.config, settings["num_shards_attribute"])
        targets = [targets[0].replace("*", str(i)) for i in range(count)]
    rows = part.shape[axis]
    step = math.ceil(rows / len(targets))
    sizes = [min(step, rows - start) for start in range(0, rows, step)] if step else []
    if len(sizes) != len(targets):
        raise UnsupportedError(f"{rows} rows cannot be split into {len(targets)}")
    return {t: [p] for t, p in zip(targets, split(part, axis, sizes), strict=True)}


def _split(task: _Task, state: _State, settings: Mapping[str, Any]) -> _State:
    axis = settings.get("dim", 0)
    shapes = [task.shapes.get(task.full_name(pattern)) for pattern in task.rule.targets]
    if any(shape is None for shape in shapes):
        raise UnsupportedError("the sizes of the parts are not known")
    parts = split(_only(state), axis, [shape[axis] for shape in shapes if shape is not None])
    return {t: [p] for t, p in zip(task.rule.targets, parts, strict=True)}


def _interleave(task: _Task, state: _State, settings: Mapping[str, Any]) -> _State:
    part, axis = _only(state), settings.get("dim", 0)
    rows = part.shape[axis]
    if rows % 2:
        raise UnsupportedError(f"{rows} rows cannot be interleaved")
    sizes = (2, rows // 2) if settings.get("inverse") else (rows // 2, 2)
    return {task.rule.targets[0]: [regroup(part, axis, sizes, (1, 0))]}


def _transpose(task: _Task, state: _State, settings: Mapping[str, Any]) -> _State:
    part = _only(state)
    several = len(task.rule.targets) > 1
    name = next(iter(state)) if several else task.rule.targets[0]
    if settings.get("check_dims"):
        expected = task.shapes.get(task.target)
        if expected is None:
            raise UnsupportedError("whether it is transposed depends on a shape that is not known")
        if expected == part.shape:
            return {name: [part]}
    return {name: [transpose(part, settings.get("dim0", 0), settings.get("dim1", 1))]}


def _permute(task: _Task, state: _State, settings: Mapping[str, Any]) -> _State:
    permuted = settings.get("permute_layer_names")
    alone = len(task.rule.sources) == 1 and len(task.rule.targets) == 1
    result: _State = {}
    for pattern, found in state.items():
        name = task.last_name(pattern, alone=alone)
        if permuted is not None and not any(one in pattern for one in permuted):
            result[name] = found
            continue
        part = _one(found)
        config = task.config.get(settings.get("subconfig_key") or "", task.config)
        heads = _setting(config, "num_attention_heads")
        half = part.shape[0] // heads // 2
        sizes = (heads, 2, half) if settings.get("inverse") else (heads, half, 2)
        result[name] = [regroup(part, 0, sizes, (0, 2, 1))]
    return result


def _share_experts(task: _Task, state: _State, settings: Mapping[str, Any]) -> _State:
    """Experts of two kinds in one list: its first part is the text's, its second the images'."""
    targets = task.rule.targets
    result: _State = {}
    for number, target in enumerate(targets):
        parts = []
        for pattern in task.rule.sources:
            found = state.get(pattern, [])
            step = math.ceil(len(found) / len(targets))
            chosen = found[number * step : (number + 1) * step]
            if not chosen:
                raise UnsupportedError("experts are missing")
            parts.append(stack(chosen, settings.get("stack_dim", 0)))
        result[target] = [join(parts, settings.get("concat_dim", 1))]
    return result


def _setting(config: Any, key: str) -> int:
    """A positive integer of the configuration, or of its text model's.

    Raises:
        UnsupportedError: It has none.
    """
    text = config.get("text_config") if isinstance(config, Mapping) else None
    for place in (config, text):
        value = place.get(key) if isinstance(place, Mapping) else None
        if type(value) is int and value > 0:
            return value
    raise UnsupportedError(f"config.json does not give {key}")


_OPERATIONS: Mapping[str, Callable[[_Task, _State, Mapping[str, Any]], _State]] = {
    "Chunk": _chunk,
    "Concatenate": _concatenate,
    "ErnieFuseAndSplitTextVisionExperts": _share_experts,
    "Interleave": _interleave,
    "MergeModulelist": _merge,
    "PermuteForRope": _permute,
    "Split": _split,
    "Transpose": _transpose,
}
