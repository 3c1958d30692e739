"""What a model says of examples: the loss of each, and the class it predicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from weightsurgery.datasets.batches import (
    IGNORED,
    Encoded,
    batches,
    longest_first,
)
from weightsurgery.datasets.sizes import bounded_batch_size
from weightsurgery.errors import NonFiniteError, SettingError
from weightsurgery.models import Model
from weightsurgery.sliced_loss import token_losses
from weightsurgery.stream import Progress
from weightsurgery.tasks import CLASSIFICATION

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Predictions:
    """One entry for each example, in the order they were given.

    Attributes:
        losses: Cross entropy in nats; for a causal model the sum over the answer's tokens.
        weights: What a loss counts for in the mean: 1, or the number of those tokens.
        classes: The class of largest logit; -1 for a causal model.
        labels: The class it should be; -1 for a causal model.
    """

    losses: NDArray[np.float64]
    weights: NDArray[np.int64]
    classes: NDArray[np.int64]
    labels: NDArray[np.int64]

    @property
    def loss(self) -> float:
        """The mean over examples, or over the tokens of all answers."""
        return float(self.losses.sum() / max(1, self.weights.sum()))

    @property
    def correct(self) -> int:
        """How many examples of a classifier get the class they should."""
        return int((self.classes == self.labels).sum())


def predict(
    model: Model,
    examples: Sequence[Encoded],
    *,
    batch_size: int = 64,
    progress: Progress | None = None,
    what: str = "evaluating",
) -> Predictions:
    """Run a model over examples, without gradients or dropout.

    Examples of like length share a batch, the longest come first; the results are in the order of
    `examples`.

    Args:
        model: From `load_model`; its training mode is as before afterwards.
        examples: From `encode_sentences` or `encode_instructions`, at least one.
        batch_size: Examples at a time.
        progress: Called as progress(what, examples done, examples in all).
        what: The word for `progress`.

    Raises:
        SettingError: There is no example, or `batch_size` is below 1.
        NonFiniteError: A loss is NaN or infinite.
    """
    import torch

    if batch_size < 1:
        raise SettingError(f"batch_size is {batch_size}; expected at least 1")
    if not examples:
        raise SettingError("no examples", code="E-NOTHING-TO-DO")
    batch_size = bounded_batch_size(model, examples, batch_size)
    order = longest_first(examples)
    table: NDArray[Any] = np.empty((0, 3))
    was_training = model.module.training
    model.module.eval()
    try:
        with torch.inference_mode():
            for inputs, labels in batches(model, [examples[i] for i in order], batch_size):
                judged = _judge(model, inputs, labels).double().cpu().numpy()
                _check_finite(model, judged[:, 0], order[len(table) :])
                table = np.concatenate([table, judged])
                if progress is not None:
                    progress(what, len(table), len(examples))
    finally:
        model.module.train(was_training)
    losses, weights, classes = table[np.argsort(order, kind="stable")].T
    expected = [one.labels[0] if model.task == CLASSIFICATION else -1 for one in examples]
    return Predictions(losses, weights.astype(int), classes.astype(int), np.array(expected, int))


def _check_finite(model: Model, losses: NDArray[np.float64], numbers: Sequence[int]) -> None:
    for loss, number in zip(losses.tolist(), numbers, strict=False):
        if not math.isfinite(loss):  # a class or a share made of it would look like any other
            raise NonFiniteError(
                f"the loss of example {number + 1:,} is {loss}",
                file=model.path,
                hint="look for weights that are NaN, infinite or huge with wsurg inspect --values",
            )


def _judge(model: Model, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """(loss, weight, class) of each example of a batch, one row each."""
    import torch
    from torch.nn.functional import cross_entropy

    if model.task == CLASSIFICATION:
        logits = model.module(**inputs).logits.float()
        losses = cross_entropy(logits, labels, reduction="none")
        return torch.stack([losses, torch.ones_like(losses), logits.argmax(-1)], 1)
    losses = token_losses(model.module(**inputs, use_cache=False).logits, labels)
    counts = (labels[:, 1:] != IGNORED).sum(1)
    return torch.stack([losses.double().sum(1), counts, torch.full_like(counts, -1)], 1)
