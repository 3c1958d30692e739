"""Trained weights as a checkpoint that mirrors the one they were loaded from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from weightsurgery.alignment import matches
from weightsurgery.checkpoint import Checkpoint, ReadBoth, Step, TensorView
from weightsurgery.errors import NonFiniteError, SettingError, shown
from weightsurgery.kernels import Block, all_finite, to_dtype, to_float
from weightsurgery.models import Model, set_weights
from weightsurgery.storage import Placed


def trained_checkpoint(model: Model, *, step: Step) -> Checkpoint:
    """What the model's module holds now, under the names, dtypes and shards of its checkpoint.

    Each trainable parameter is rounded once to its stored dtype, and the module gets the rounded
    values, so that it computes what a model loaded from the saved files would. Elements that
    training did not move keep their stored bytes; all other tensors are the checkpoint's own.

    Args:
        model: Whose parameters of `requires_grad` were trained.
        step: What trained them.

    Raises:
        NonFiniteError: A trained value is NaN, infinite, or too large for its dtype.
    """
    if model.storage is None:
        raise ValueError("the model was not loaded from a checkpoint")
    views = dict(model.checkpoint.tensors)
    trained = {key: one for key, one in model.names.items() if one.requires_grad}
    for one in model.storage.as_stored(model.checkpoint, trained, copies=True):
        view = views[one.name]
        block = _rounded(view, one)
        if not all_finite(block):
            raise NonFiniteError(
                f"after training it holds NaN, or infinity as {view.dtype.name}",
                file=model.path,
                tensor=one.name,
                hint="lower the learning rate",
            )
        views[one.name] = replace(view, read_both=_reader(view, block), status="edited")
    result = replace(model.checkpoint, tensors=views)
    set_weights(model, result)
    return result.made_by(replace(step, repeatable=False))


def trained_names(model: Model, freeze: Sequence[str] = ()) -> list[str]:
    """Every tensor on disk that holds a parameter to train; tied ones each time.

    Args:
        model: From `load_model`.
        freeze: Globs over names on disk: what is not trained.
    """
    if model.storage is None:
        raise ValueError("the model was not loaded from a checkpoint")
    frozen = set(frozen_names(model, freeze))
    copies = {name: key for name, key in model.storage.whole.items() if key in model.names}
    found = [name for name, key in copies.items() if key not in frozen]
    parts = [key for key in model.storage.parts if key not in frozen]
    return [*found, *dict.fromkeys(name for key in parts for name in model.stored_in(key))]


def frozen_names(model: Model, freeze: Sequence[str]) -> list[str]:
    """Those of the model's `names` whose stored tensors the globs match.

    Args:
        model: From `load_model`.
        freeze: Globs over names on disk.

    Raises:
        SettingError: They match some of the stored tensors that one parameter is made of.
    """
    found = []
    for name in model.names:
        stored = model.stored_in(name)
        matched = [one for one in stored if matches(one, freeze)]
        if matched and len(matched) < len(stored):
            rest = next(one for one in stored if one not in matched)
            raise SettingError(
                f"freeze matches '{shown(matched[0])}' but not '{shown(rest)}'; transformers loads "
                "both as one parameter, which is trained or frozen as a whole",
                code="E-FREEZE-PART",
            )
        found += [name] if matched else []
    return found


def _rounded(view: TensorView, placed: Placed) -> Block:
    """A parameter's values in a stored tensor's dtype; elements it does not hold as stored."""
    if placed.runs == ((0, view.size),):
        values = placed.view.read(0, view.size)
    else:
        values = to_float(view.read(0, view.size)).astype(np.float32)
        for start, stop in placed.runs:
            values[start:stop] = placed.view.read(start, stop)
    return to_dtype(values, view.dtype.numpy) if view.dtype.bits != 32 else values


def _reader(view: TensorView, block: Block) -> ReadBoth:
    def read_both(start: int, stop: int) -> tuple[Block, Block]:
        stored, before = view.read_both(start, stop)
        after = block[start:stop].copy()
        if view.dtype.name == "F64":  # was narrowed for training: what did not move is as it was
            moved = before.astype(np.float32) != after.astype(np.float32)
            after = np.where(moved, after, before)
        return stored, after

    return read_both
