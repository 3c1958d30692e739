"""Trained weights as a checkpoint that mirrors the one they were loaded from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from weightsurgery.alignment import matches
from weightsurgery.checkpoint import Checkpoint, ReadBoth, Step, TensorView
from weightsurgery.errors import NonFiniteError
from weightsurgery.kernels import Block, all_finite, to_dtype
from weightsurgery.models import Model, stored_name

if TYPE_CHECKING:
    import torch


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
    views = dict(model.checkpoint.tensors)
    blocks: dict[int, Block] = {}  # tied copies share one
    for name, parameter in stored_parameters(model):
        view = views[name]
        values = parameter.detach().cpu().numpy().reshape(-1)
        block = blocks.get(id(parameter))
        if block is None or block.dtype != view.dtype.numpy:
            # A copy: the module may be trained further.
            block = to_dtype(values, view.dtype.numpy) if view.dtype.bits != 32 else values.copy()
            if not all_finite(block):
                raise NonFiniteError(
                    f"after training it holds NaN, or infinity as {view.dtype.name}",
                    file=model.path,
                    tensor=name,
                    hint="lower the learning rate",
                )
            blocks[id(parameter)] = block
        views[name] = replace(view, read_both=_reader(view, block), status="edited")
    for parameter in model.names.values():
        if parameter.requires_grad:
            _fill(parameter, blocks[id(parameter)])
    return replace(model.checkpoint, tensors=views).made_by(replace(step, repeatable=False))


def stored_parameters(
    model: Model, freeze: Sequence[str] = ()
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Every tensor on disk that stands for a parameter to train; tied ones each time."""
    module, checkpoint = model.module, model.checkpoint
    trained = {id(p) for n, p in model.names.items() if p.requires_grad and not matches(n, freeze)}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        stored = stored_name(name, module, checkpoint)
        if stored is None or id(parameter) not in trained:
            continue
        if checkpoint[stored].shape == tuple(parameter.shape):
            yield stored, parameter


def _reader(view: TensorView, block: Block) -> ReadBoth:
    def read_both(start: int, stop: int) -> tuple[Block, Block]:
        stored, before = view.read_both(start, stop)
        after = block[start:stop].copy()
        if view.dtype.name == "F64":  # was narrowed for training: what did not move is as it was
            moved = before.astype(np.float32) != after.astype(np.float32)
            after = np.where(moved, after, before)
        return stored, after

    return read_both


def _fill(parameter: torch.nn.Parameter, block: Block) -> None:
    import torch

    with torch.no_grad():
        values = torch.from_numpy(block.astype(np.float32)).view(parameter.shape)
        parameter.copy_(values)
