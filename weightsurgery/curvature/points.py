"""Weights between BASE and TUNED, put into a model in memory and taken out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from weightsurgery.alignment import align
from weightsurgery.checkpoint import Checkpoint, TensorView
from weightsurgery.dtypes import DTYPES
from weightsurgery.errors import MismatchError
from weightsurgery.kernels import Block, to_float
from weightsurgery.models import Model, set_weights
from weightsurgery.pairs import Pair

_MISMATCHED = "keep integers"  # such as positions: no point lies between them


@contextmanager
def between(model: Model, base: Checkpoint) -> Iterator[Callable[[float], None]]:
    """Gives a function that sets the model's weights to base + share·(tuned - base).

    What BASE lacks stays TUNED's. At the end the weights are TUNED's again, bit for bit.

    Raises:
        MismatchError: BASE and the model do not fit each other, or its weights in memory are not
            those it was loaded from.
    """
    try:
        align(base, model.checkpoint, mismatched=_MISMATCHED, partial="refuse")
    except MismatchError as error:
        hint = "the points begin at the base that this model was fine-tuned from"
        raise MismatchError(
            error.reason, file=error.file, tensor=error.tensor, hint=hint, code=error.code
        ) from None
    if model.storage is None:
        raise ValueError("the model was not loaded from a checkpoint")
    for name, view in model.storage.as_loaded(model.checkpoint):
        values = model.names[name].detach().view(-1)
        for start, stop in view.blocks():
            if values[start:stop].cpu().numpy().tobytes() != view.read(start, stop).tobytes():
                raise MismatchError(
                    "the weights in memory are not those on disk, from which points between base "
                    "and tuned are computed",
                    tensor=name,
                    hint="load the model again",
                    code="E-MODEL-WEIGHTS",
                )

    def move(share: float) -> None:
        set_weights(model, _point(model.checkpoint, base, share))

    try:
        yield move
    finally:
        set_weights(model, model.checkpoint)


def _point(tuned: Checkpoint, base: Checkpoint, share: float) -> Checkpoint:
    """Base + share·(tuned - base) in float32; TUNED where BASE has nothing."""
    views = dict(tuned.tensors)
    for pair in align(base, tuned, mismatched=_MISMATCHED).eligible:
        views[pair.name] = _between(pair, np.float32(share))
    return replace(tuned, tensors=views)


def _between(pair: Pair, share: np.float32) -> TensorView:
    def read_both(start: int, stop: int) -> tuple[Block, Block]:
        found = _float32(pair.tuned, start, stop)
        for first, last in pair.spans(start, stop):
            if pair.base is not None:
                t, b = found[first - start : last - start], _float32(pair.base, first, last)
                found[first - start : last - start] = b + share * (t - b)
        return found, found

    return TensorView(pair.name, pair.tuned.shape, DTYPES["F32"], read_both)


def _float32(view: TensorView, start: int, stop: int) -> Block:
    return to_float(view.read(start, stop)).astype(np.float32)
