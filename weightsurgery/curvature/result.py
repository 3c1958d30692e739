"""Estimates of curvature as checkpoints: checked, named as on disk, telling how they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsurgery.checkpoint import Checkpoint, Step, from_arrays
from weightsurgery.errors import NonFiniteError

if TYPE_CHECKING:
    import torch


def make_result(
    tensors: Mapping[str, torch.Tensor],
    *,
    step: Step,
    content: str,
    notes: Mapping[str, Any],
) -> Checkpoint:
    """A checkpoint of one float32 tensor for each parameter.

    Args:
        tensors: Name on disk to values; they are not copied if they lie in main memory.
        step: What made them.
        content: What the numbers are, in words, for the file's metadata.
        notes: What else there is to say.

    Raises:
        NonFiniteError: A value is NaN or infinite.
    """
    import torch

    for name, values in tensors.items():
        if not torch.isfinite(values).all():
            raise NonFiniteError(
                f"NaN or infinity in the {step.operator} estimate",
                tensor=name,
                hint="look for NaN in the model with `wsurg inspect --values`",
            )
    made = from_arrays({name: values.cpu().numpy() for name, values in tensors.items()})
    views = {name: replace(view, status="added") for name, view in made.items()}
    settings = {name: _text(value) for name, value in step.settings.items()}
    return replace(
        made,
        tensors=views,
        label=step.operator,
        metadata={"estimator": step.operator, "content": content, **settings},
        step=replace(step, repeatable=False),
        notes=notes,
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def summarise(estimate: Checkpoint) -> dict[str, Any]:
    """What a person wants to know of an estimate at first sight, as `wsurg fisher --json` has it.

    Args:
        estimate: From `fisher` or `hutchinson`.
    """
    if estimate.step is None:
        raise ValueError("not an estimate")
    total, zeros, negative = 0.0, 0, 0
    largest: dict[str, Any] = {"tensor": "", "index": 0, "value": 0.0}
    for name, view in estimate.items():
        for start, stop in view.blocks():
            block = view.read(start, stop)
            total += float(block.sum(dtype=np.float64))
            zeros += block.size - int(np.count_nonzero(block))
            negative += int(np.count_nonzero(block < 0))
            place = int(np.abs(block).argmax())
            if abs(float(block[place])) > abs(largest["value"]):
                largest = {
                    "tensor": name,
                    "index": start + place,
                    "value": float(block[place]),
                }
    paths = estimate.notes["paths"]
    return {
        "estimator": estimate.step.operator,
        "settings": dict(estimate.step.settings),
        "tensors": len(estimate),
        "paths": {
            path: [name for name in estimate if paths[name] == path]
            for path in sorted(set(paths.values()))
        },
        "dimensions": estimate.size,
        "mean": total / max(1, estimate.size),
        "zeros": zeros,
        "negative": negative,
        "largest": largest,
    }
