"""Where a model's parameters in memory lie in the stored tensors they are loaded from.

transformers renames tensors, stacks experts, and joins, cuts or transposes matrices when it loads
a model. The facts of `architecture` undo that: what belongs to a parameter in memory (gradients,
trained values) goes back to the tensors of the file, element by element.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from weightsurgery.architecture.conversion import UnsupportedError
from weightsurgery.architecture.matching import Counterpart, Matcher, read_sides
from weightsurgery.checkpoint import Checkpoint, TensorView, from_arrays
from weightsurgery.dtypes import DTYPES
from weightsurgery.errors import MismatchError
from weightsurgery.kernels import Block, to_float

_COMPARED = 4096  # elements at each end of a parameter


@dataclass(frozen=True)
class Placed:
    """Values of parameters as the elements of one stored tensor.

    Attributes:
        name: The stored tensor.
        view: The values in float32, in the stored tensor's order and shape.
        keys: The parameters that the values are of.
        runs: The elements (start, stop) that a parameter holds; the model does not load the rest.
    """

    name: str
    view: TensorView
    keys: tuple[str, ...]
    runs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Storage:
    """The stored tensors of a model's trainable parameters.

    A parameter's key is its name on disk if one stored tensor holds it as it is, else its name in
    memory.

    Attributes:
        parameters: Key to parameter; a parameter with several names (tied weights) once.
        whole: Stored tensor to the key of the parameter it holds; tied copies each.
        parts: Key of a parameter that is made of stored tensors, to those tensors.
        memory: Name in memory to key, for all names.
        config: The configuration, with the class that was loaded.
    """

    parameters: Mapping[str, Any]
    whole: Mapping[str, str]
    parts: Mapping[str, tuple[str, ...]]
    memory: Mapping[str, str]
    config: Mapping[str, Any]

    def stored_in(self, key: str) -> tuple[str, ...]:
        """The stored tensors that a parameter is loaded from; of tied copies the first."""
        return self.parts.get(key, (key,))

    def as_stored(
        self, checkpoint: Checkpoint, values: Mapping[str, Any], *, copies: bool = False
    ) -> Iterator[Placed]:
        """Values of the parameters' shapes, cut as the file is.

        Args:
            checkpoint: What the model was loaded from.
            values: Key to a float32 tensor; parameters that it lacks are left out.
            copies: Also give the further stored copies of tied tensors.
        """
        arrays = {key: one.detach().cpu().numpy() for key, one in values.items()}
        for name, view in from_arrays(_named(self.whole, arrays)).items():
            key = self.whole[name]
            if copies or name == key:
                yield Placed(name, view, (key,), ((0, view.size),))
        if not self.parts.keys() & arrays.keys():
            return
        memory = from_arrays(_named(self.memory, arrays), config=self.config)
        matcher = _matcher(memory, replace(checkpoint, config=self.config))
        names = dict.fromkeys(n for key in self.parts if key in arrays for n in self.parts[key])
        for name in names:
            found = matcher.find(name, alone=True)
            if found is None:
                raise ValueError(f"{name} was found when the model was loaded")
            keys = dict.fromkeys(self.memory[one] for one in found.names)
            view = replace(found.view, name=name)
            yield Placed(name, view, tuple(keys), found.runs or ((0, view.size),))

    def as_loaded(self, checkpoint: Checkpoint) -> Iterator[tuple[str, TensorView]]:
        """What transformers would load each parameter with, in float32.

        Args:
            checkpoint: Of the model's names and shapes.

        Raises:
            MismatchError: It lacks a parameter, or has it in another shape.
        """
        for key, parameter in self.parameters.items():
            if key not in self.parts:
                view = checkpoint.get(key)
                yield key, _checked(key, view, tuple(parameter.shape), checkpoint)
        if not self.parts:
            return
        matcher = _matcher(_widened(checkpoint, self.config), _shapes(self.parameters, self.memory,
                                                                     self.config))  # fmt: skip
        first = {key: name for name, key in reversed(list(self.memory.items()))}
        for key in self.parts:
            found = _find(matcher, first[key], self.parameters[key].numel())
            view = None if found is None else found.view
            yield key, _checked(key, view, tuple(self.parameters[key].shape), checkpoint)


def _named(names: Mapping[str, str], arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name: arrays[key] for name, key in names.items() if key in arrays}


def _checked(
    key: str, view: TensorView | None, shape: tuple[int, ...], checkpoint: Checkpoint
) -> TensorView:
    if view is None or view.shape != shape:
        raise MismatchError(
            "the model has a parameter that these weights lack, or that has another shape",
            file=checkpoint.label,
            tensor=key,
            code="E-MODEL-WEIGHTS",
        )
    return _wide(view)


def find_storage(module: Any, checkpoint: Checkpoint) -> Storage:
    """Find the stored tensors of a loaded model's trainable parameters.

    Args:
        module: The transformers model.
        checkpoint: What it was loaded from.

    Raises:
        MismatchError: A parameter has none, or transformers loaded other values.
    """
    named = {
        name: parameter
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if parameter.requires_grad
    }
    config = {
        **checkpoint.config,
        "model_type": module.config.model_type,
        "architectures": [type(module).__name__],
    }
    names = {name: name for name in named}
    matcher = _matcher(_widened(checkpoint, config), _shapes(named, names, config))
    found = {name: _find(matcher, name, one.numel()) for name, one in named.items()}
    storage = _settle(named, found, config)
    lost = [name for name in named if name not in storage.memory]
    if lost:
        raise MismatchError(
            "no stored tensor holds the elements of this parameter of the loaded model",
            file=checkpoint.label,
            tensor=lost[0],
            hint="save the model with `save_pretrained(..., save_original_format=False)`",
            code="E-MODEL-WEIGHTS",
        )
    _compare(storage, checkpoint)
    return storage


def _settle(
    named: Mapping[str, Any], found: Mapping[str, Counterpart | None], config: Mapping[str, Any]
) -> Storage:
    keys: dict[int, str] = {}
    parameters: dict[str, Any] = {}
    whole: dict[str, str] = {}
    parts: dict[str, tuple[str, ...]] = {}
    for name, one in found.items():
        if one is None:
            continue
        parameter = named[name]
        is_whole = not one.runs and one.view.shape == tuple(parameter.shape)
        if not is_whole and not one.runs:
            continue
        key = keys.setdefault(id(parameter), one.names[0] if is_whole else name)
        parameters.setdefault(key, parameter)
        if is_whole:
            whole.setdefault(one.names[0], key)
        elif key == name:
            parts[key] = one.names
    memory = {name: keys[id(one)] for name, one in named.items() if id(one) in keys}
    return Storage(parameters, whole, parts, memory, config)


def _find(matcher: Matcher, name: str, size: int) -> Counterpart | None:
    """The stored elements of a parameter, if all of it is stored."""
    try:
        found = matcher.find(name, alone=True)
    except UnsupportedError:
        return None
    is_partial = found is not None and found.runs and found.runs != ((0, size),)
    return None if is_partial else found


def _matcher(base: Checkpoint, tuned: Checkpoint) -> Matcher:
    return Matcher(*read_sides(base, tuned))


def _shapes(
    parameters: Mapping[str, Any], names: Mapping[str, str], config: Mapping[str, Any]
) -> Checkpoint:
    """The model in memory as a checkpoint of names and shapes."""

    def read_both(*run: int) -> tuple[Block, Block]:
        raise ValueError(f"elements {run} of a tensor of which only the shape is known")

    views = {
        name: TensorView(name, tuple(parameters[key].shape), DTYPES["F32"], read_both)
        for name, key in names.items()
    }
    return Checkpoint(views, config=config)


def _widened(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint as it is loaded: in float32, by the class that was loaded."""
    views = {name: _wide(view) for name, view in checkpoint.items() if view.dtype.arithmetic}
    return replace(checkpoint, tensors=views, config=config)


def _wide(view: TensorView) -> TensorView:
    def read_both(start: int, stop: int) -> tuple[Block, Block]:
        block = to_float(view.read(start, stop)).astype(np.float32, copy=False)
        return block, block

    return TensorView(view.name, view.shape, DTYPES["F32"], read_both)


def _compare(storage: Storage, checkpoint: Checkpoint) -> None:
    """Refuse a model whose values are not those that the facts say were loaded."""
    for key, view in storage.as_loaded(checkpoint):
        values = storage.parameters[key].detach().reshape(-1)
        for start, stop in {
            (0, min(_COMPARED, view.size)),
            (max(0, view.size - _COMPARED), view.size),
        }:
            loaded = values[start:stop].cpu().numpy()
            if loaded.tobytes() != view.read(start, stop).tobytes():
                raise MismatchError(
                    "transformers loads other values than the file's tensors give",
                    file=checkpoint.label,
                    tensor=key,
                    hint="save the model with `save_pretrained(..., save_original_format=False)`",
                    code="E-MODEL-WEIGHTS",
                )
