"""Each example's own loss, under its true label or one drawn from the model's prediction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsurgery.datasets.batches import IGNORED, Encoded, batches
from weightsurgery.models import Model
from weightsurgery.sliced_loss import token_losses
from weightsurgery.tasks import CLASSIFICATION

if TYPE_CHECKING:
    import torch

_AT_ONCE = 1 << 20  # probabilities, or one row of them: 8 MiB, three times over


@dataclass(frozen=True)
class Batch:
    """A few examples, on the model's device.

    Attributes:
        inputs: What the model takes.
        labels: Shape (B,) for a classifier, (B, T) for a causal model.
        draws: Uniform random numbers of the shape of `labels`, on the processor; None for the
            true labels.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    draws: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Objective:
    """The loss of every single example.

    Attributes:
        model: The model.
        sampled: Draw labels from the model's prediction, in place of the examples' own.
        seed: Of those draws; they do not depend on batches or device.
    """

    model: Model
    sampled: bool = False
    seed: int = 0

    def batches(
        self, examples: Sequence[Encoded], size: int, order: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """Batches of `size` examples, in the order of `order` or as they are given."""
        order = range(len(examples)) if order is None else order
        chosen = [examples[i] for i in order]
        made = batches(self.model, chosen, size)
        for start, (inputs, labels) in zip(range(0, len(chosen), size), made, strict=True):
            draws = self._draws(order[start : start + size], labels) if self.sampled else None
            yield Batch(inputs, labels, draws)

    def _draws(self, places: Sequence[int], labels: torch.Tensor) -> torch.Tensor:
        """One stream of numbers for each example, so that batches and padding do not matter."""
        import torch

        found = torch.zeros(labels.shape, dtype=torch.float64)
        for row, place in zip(found, places, strict=True):
            generator = torch.Generator().manual_seed((self.seed * 0x9E3779B1 + place) % 2**63)
            row.copy_(torch.rand(row.shape, generator=generator, dtype=torch.float64))
        return found

    def losses(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy of each example, shape (B,).

        For a causal model it is the mean over the tokens of the answer (our choice: an example
        counts the same however long its answer is).
        """
        import torch

        causal = self.model.task != CLASSIFICATION
        extra = {"use_cache": False} if causal else {}
        logits = self.model.module(**batch.inputs, **extra).logits
        labels, draws = batch.labels, batch.draws
        if not causal:
            if draws is not None:
                labels = _sampled(logits.detach(), labels, draws)
            return torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        if draws is not None:  # the logits at a token are for the next one
            labels = labels.clone()
            labels[:, 1:] = _sampled(logits.detach()[:, :-1], labels[:, 1:], draws[:, 1:])
        counts = (labels[:, 1:] != IGNORED).sum(1)
        return token_losses(logits, labels).sum(1) / counts


def _sampled(logits: torch.Tensor, labels: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Labels of the same places, drawn; a few rows of a large vocabulary at a time."""
    labels = labels.clone()
    rows = max(1, _AT_ONCE // logits.shape[-1])
    places = (labels != IGNORED).nonzero(as_tuple=True)
    for part in zip(*(place.split(rows) for place in places), strict=True):
        labels[part] = _sample(logits[part], draws[tuple(place.cpu() for place in part)])
    return labels


def _sample(logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """The label at which the cumulative probability passes the draw, found on the processor."""
    import torch

    cumulative = logits.to("cpu", torch.float64).softmax(-1).cumsum(-1)
    found = torch.searchsorted(cumulative, draws[..., None], right=True)[..., 0]
    return found.clamp_(max=logits.shape[-1] - 1).to(logits.device)
