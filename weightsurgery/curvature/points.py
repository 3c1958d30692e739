"""Weights between BASE and TUNED, put into a model in memory and taken out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from weightsurgery.alignment import align
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.errors import MismatchError
from weightsurgery.kernels import Block, to_float
from weightsurgery.models import Model

if TYPE_CHECKING:
    import torch

_MISMATCHED = "keep integers"  # such as positions: no point lies between them


@contextmanager
def between(model: Model, base: Checkpoint) -> Iterator[Callable[[float], None]]:
    """Gives a function that sets the model's weights to base + share·(tuned - base).

    What BASE lacks stays TUNED's. At the end the weights are TUNED's again, bit for bit.

    Raises:
        MismatchError: BASE and the model do not fit each other, or its weights in memory are not
            those it was loaded from.
    """
    import torch

    try:
        align(base, model.checkpoint, mismatched=_MISMATCHED, partial="refuse")
    except MismatchError as error:
        hint = "the points begin at the base that this model was fine-tuned from"
        raise MismatchError(
            error.reason, file=error.file, tensor=error.tensor, hint=hint, code=error.code
        ) from None
    for name, values, _, tuned in _blocks(model, base):
        if values.cpu().numpy().tobytes() != tuned.tobytes():
            raise MismatchError(
                "the weights in memory are not those on disk, from which points between base and "
                "tuned are computed",
                tensor=name,
                hint="load the model again",
                code="E-MODEL-WEIGHTS",
            )

    def move(share: float) -> None:
        for _, values, b, t in _blocks(model, base):
            values.copy_(torch.from_numpy(b + np.float32(share) * (t - b)))

    try:
        yield move
    finally:
        for _, values, _, tuned in _blocks(model, base):
            values.copy_(torch.from_numpy(tuned))


def _blocks(model: Model, base: Checkpoint) -> Iterator[tuple[str, torch.Tensor, Block, Block]]:
    """(name, run of a parameter, BASE's elements, TUNED's elements); float32."""
    for pair in align(base, model.checkpoint, mismatched=_MISMATCHED).eligible:
        if pair.base is None or pair.name not in model.names:
            continue
        values = model.names[pair.name].data.view(-1)
        for start, end in pair.tuned.blocks():
            for first, last in pair.spans(start, end):
                b, t = (
                    to_float(view.read(first, last)).astype(np.float32, copy=False)
                    for view in (pair.base, pair.tuned)
                )
                yield pair.name, values[first:last], b, t
