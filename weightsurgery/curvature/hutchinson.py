"""The diagonal of the Hessian, estimated from products with random vectors.

Reference:
    Hutchinson, "A stochastic estimator of the trace of the influence matrix for Laplacian
    smoothing splines", Communications in Statistics 18(3), 1989; for the diagonal: Bekas,
    Kokiopoulou and Saad, "An estimator for the diagonal of a matrix", Applied Numerical
    Mathematics 57, 2007.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from weightsurgery.checkpoint import Checkpoint, Step
from weightsurgery.curvature.losses import Batch, Objective
from weightsurgery.curvature.per_example import asking, frozen
from weightsurgery.curvature.result import lengths_of, make_result
from weightsurgery.datasets.batches import (
    Encoded,
    check_examples,
    cut_warning,
    digest_of,
    longest_first,
)
from weightsurgery.datasets.prompts import template_record
from weightsurgery.datasets.sizes import alone_warning, batch_size_for
from weightsurgery.errors import SettingError, shown
from weightsurgery.models import Model
from weightsurgery.rng import random_mask
from weightsurgery.stream import Progress
from weightsurgery.tasks import CLASSIFICATION

if TYPE_CHECKING:
    import torch


def hutchinson(
    model: Model,
    examples: Sequence[Encoded],
    *,
    samples: int = 10,
    negative: str = "absolute",
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> Checkpoint:
    """Diagonal of the Hessian of the mean loss, by Hutchinson's estimator.

    The mean over `samples` random vectors v, each entry 1 or -1, of v ⊙ Hv, where Hv is computed
    exactly. It is unbiased; the variance of entry i is Σ_j≠i H_ij² / samples. Where the Hessian
    is not positive, and by chance elsewhere, estimates are negative, which no curvature that drift
    is weighed by may be: their absolute values are taken (our choice).

    Args:
        model: From `load_model`.
        examples: From `read_examples`.
        samples: How many random vectors.
        negative: "absolute" takes the absolute value of each mean, "keep" gives the unbiased one.
        batch_size: Examples computed at a time; it changes the result by rounding alone.
        seed: Of the random vectors; they depend on nothing else.
        progress: Called as progress(what, examples done, examples in all).

    Returns:
        A float32 tensor for every trainable parameter, under its name on disk.

    Raises:
        SettingError: There are no examples, or a setting is out of range.
        MismatchError: The head has no cross-entropy.
        NonFiniteError: The result has a NaN or infinity.
    """
    check_examples(model, examples)
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        if value < 1:
            raise SettingError(f"{name} is {value}; expected at least 1")
    if negative not in ("absolute", "keep"):
        raise SettingError(f"negative is '{shown(negative)}'; expected absolute or keep")
    sums = _sums(model, examples, samples, batch_size, seed, progress)
    for total in sums.values():
        total.div_(samples * len(examples))
        if negative == "absolute":
            total.abs_()
    kind = "absolute value of the" if negative == "absolute" else "may be negative:"
    settings = {
        "samples": samples,
        "negative": negative,
        "batch_size": batch_size,
        "seed": seed,
        "examples": len(examples),
        "examples_sha256": digest_of(examples),
        **lengths_of(examples),
        **template_record(model),
    }
    return make_result(
        sums,
        model=model,
        paths=dict.fromkeys(sums, "hutchinson"),
        step=Step("hutchinson", settings, {"model": model.checkpoint}),
        content=f"{kind} estimated diagonal of the Hessian of the mean loss",
        warnings=[
            *cut_warning(examples, causal=model.task != CLASSIFICATION),
            *alone_warning(model, examples, batch_size),
        ],
    )


def _sums(
    model: Model,
    examples: Sequence[Encoded],
    samples: int,
    batch_size: int,
    seed: int,
    progress: Progress | None,
) -> dict[str, Any]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    objective, names = Objective(model), model.names
    order, done = longest_first(examples), 0
    batch_size = batch_size_for(model, examples, batch_size)
    sums = {name: torch.zeros_like(p, requires_grad=False) for name, p in names.items()}
    # The fused attention kernels have no second derivative.
    with frozen(model.module), asking(list(names.values())), sdpa_kernel(SDPBackend.MATH):
        for sample in range(samples):
            signs = {name: _signs(p, seed, f"{name}\0{sample}") for name, p in names.items()}
            for batch in objective.batches(examples, batch_size, order):
                _add_product(objective, batch, signs, sums)
                done += len(batch)
                if progress is not None:
                    progress("hutchinson", done, samples * len(examples))
    return sums


def _signs(parameter: Any, seed: int, name: str) -> torch.Tensor:
    import torch

    mask = torch.from_numpy(random_mask(seed, name, 0, parameter.numel(), 0.5))
    signs: torch.Tensor = mask.to(parameter.device, parameter.dtype).mul_(2).sub_(1)
    return signs.view(parameter.shape)


def _add_product(
    objective: Objective,
    batch: Batch,
    signs: Mapping[str, torch.Tensor],
    sums: Mapping[str, torch.Tensor],
) -> None:
    """Add v ⊙ Hv of the batch's summed loss; Hv is the gradient of (gradient · v)."""
    import torch

    names = objective.model.names
    parameters = list(names.values())
    loss = objective.losses(batch).sum()
    first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    used = [
        (gradient, signs[name])
        for name, gradient in zip(names, first, strict=True)
        if gradient is not None and gradient.requires_grad
    ]
    if not used:  # the loss is linear in everything
        return
    gradients, vectors = zip(*used, strict=True)
    products = torch.autograd.grad(gradients, parameters, vectors, allow_unused=True)
    for name, product in zip(names, products, strict=True):
        if product is not None:
            sums[name].addcmul_(signs[name], product)
