"""Cross-entropy of a large vocabulary, a slice of the tokens at a time.

torch's own holds the logits' log-softmax and, going back, two more tensors of that size. Here
going forward takes a slice beyond the logits, and going back their gradient and a slice.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from weightsurgery.datasets.batches import IGNORED

if TYPE_CHECKING:
    import torch

_AT_ONCE = 1 << 20  # logits, or one row of them


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each token with the one after it, 0 where that does not count.

    Args:
        logits: Shape (B, T, vocabulary); those at a token are for the next one.
        labels: Shape (B, T), the tokens themselves, `IGNORED` where they do not count.

    Returns:
        Shape (B, T), the last column zero.
    """
    import torch

    # Labels are moved, not logits cut: a part of the logits would be a copy.
    following = torch.full_like(labels, IGNORED)
    following[:, :-1] = labels[:, 1:]
    losses: torch.Tensor = _function().apply(logits.flatten(0, 1), following.flatten())
    return losses.view(labels.shape)


@cache
def _function() -> Any:
    """The autograd function; torch is only loaded where it is needed."""
    import torch
    from torch.nn.functional import cross_entropy

    class SlicedCrossEntropy(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(logits, labels)
            parts = [
                cross_entropy(some.float(), wanted, ignore_index=IGNORED, reduction="none")
                for some, wanted in _slices(logits, labels)
            ]
            return torch.cat(parts)

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
            """Softmax minus one at the label; itself differentiable, for products with a Hessian.

            With y the label: ∂loss/∂logit_i = softmax_i - [i = y].
            """
            logits, labels = ctx.saved_tensors
            found, start = torch.empty_like(logits), 0
            for some, wanted, gradient in _slices(logits, labels, gradients[0]):
                chances = some.float().softmax(-1)
                hit = torch.zeros_like(chances).scatter_(1, wanted.clamp(min=0)[:, None], 1.0)
                part = (chances - hit) * gradient[:, None]
                stop = start + len(some)
                found[start:stop] = part.where((wanted != IGNORED)[:, None], 0.0)
                start = stop
            return found, None

    return SlicedCrossEntropy


def _slices(*tensors: torch.Tensor) -> zip[tuple[torch.Tensor, ...]]:
    rows = max(1, _AT_ONCE // tensors[0].shape[-1])
    return zip(*(one.split(rows) for one in tensors), strict=True)
