"""Curvature as plainly as it can be: one example at a time, no padding, no hooks, plain autograd.

Of the package only the examples are used, as they come from the reader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

torch.set_num_threads(1)  # for models this small, threads only wait for each other
IGNORED = -100
Examples = Sequence[Any]
Tensors = dict[str, torch.Tensor]


def inputs_of(example: Any) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": torch.tensor([example.ids])}
    if example.types:
        inputs["token_type_ids"] = torch.tensor([example.types])
    return inputs


def loss_of(module: Any, example: Any) -> torch.Tensor:
    """Minus the log-probability of the label, or the mean of that over the answer's tokens."""
    extra = {} if len(example.labels) == 1 else {"use_cache": False}
    logits = module(**inputs_of(example), **extra).logits[0]
    if len(example.labels) == 1:
        return -logits.log_softmax(-1)[example.labels[0]]
    terms = [
        -logits[place - 1].log_softmax(-1)[label]
        for place, label in enumerate(example.labels)
        if place > 0 and label != IGNORED
    ]
    return torch.stack(terms).mean()


def gradients(module: Any, names: Mapping[str, Any], example: Any) -> Tensors:
    module.zero_grad()
    loss_of(module, example).backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in names.items()
    }


def fisher(module: Any, names: Mapping[str, Any], examples: Examples) -> Tensors:
    found = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in names.items()}
    for example in examples:
        for name, gradient in gradients(module, names, example).items():
            found[name] += gradient.double() ** 2 / len(examples)
    module.zero_grad()
    return found


def standard_error(module: Any, names: Mapping[str, Any], examples: Examples) -> Tensors:
    rows = [gradients(module, names, example) for example in examples]
    module.zero_grad()
    return {
        name: (torch.stack([row[name].double() ** 2 for row in rows]).var(0, correction=0)
               / len(rows)).sqrt()
        for name in names
    }  # fmt: skip


def hessian_diagonal(module: Any, names: Mapping[str, Any], examples: Examples) -> Tensors:
    """Second derivatives of the mean loss, one dimension after the other."""
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        loss = torch.stack([loss_of(module, example) for example in examples]).mean()
    parameters = list(names.values())
    first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    found = {}
    for (name, parameter), gradient in zip(names.items(), first, strict=True):
        diagonal = torch.zeros(parameter.numel(), dtype=torch.float64)
        for i in range(parameter.numel() if gradient is not None else 0):
            if not gradient.requires_grad:
                break  # linear in this parameter
            (row,) = torch.autograd.grad(
                gradient.view(-1)[i], parameter, retain_graph=True, allow_unused=True
            )
            diagonal[i] = 0.0 if row is None else row.view(-1)[i]
        found[name] = diagonal.view(parameter.shape)
    return found
