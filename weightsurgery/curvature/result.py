"""Estimates of curvature as checkpoints: checked, named as on disk, telling how they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsurgery.checkpoint import Checkpoint, Step, from_arrays
from weightsurgery.datasets.batches import Encoded, count_cut, limit_of
from weightsurgery.errors import NonFiniteError, shown

if TYPE_CHECKING:
    import torch


def make_result(
    tensors: Mapping[str, torch.Tensor],
    *,
    step: Step,
    content: str,
    notes: Mapping[str, Any],
    warnings: Sequence[str] = (),
) -> Checkpoint:
    """A checkpoint of one float32 tensor for each parameter.

    Args:
        tensors: Name on disk to values; they are not copied if they lie in main memory.
        step: What made them.
        content: What the numbers are, in words, for the file's metadata.
        notes: What else there is to say.
        warnings: What was odd about the examples.

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
        warnings=tuple(warnings),
    )


def lengths_of(examples: Sequence[Encoded]) -> dict[str, int | None]:
    """The maximum length of the examples, and how many were cut to it, for the record.

    Args:
        examples: What an estimate is of; the length is None where it is not known.
    """
    return {"max_length": limit_of(examples), "cut": count_cut(examples)}


def length_warnings(fisher: Checkpoint | None, max_length: int | None = None) -> list[str]:
    """Warnings if a Fisher is of texts that were cut, or cut elsewhere than others are.

    Args:
        fisher: From `fisher` or a file of it; None gives no warning.
        max_length: Tokens after which other texts, which the model is trained on, are cut.
    """
    known = {} if fisher is None else fisher.metadata
    cut, examples, most = (known.get(name, "") for name in ("cut", "examples", "max_length"))
    found = []
    if cut.isdigit() and examples.isdigit() and int(cut):
        to = f"to {shown(most)} tokens" if most.isdigit() else "to their maximum lengths"
        found.append(f"the Fisher is of texts of which {cut} of {examples} were cut {to}")
    if max_length is not None and most.isdigit() and int(most) != max_length:
        found.append(
            f"the Fisher was made with --max-length {shown(most)}, and the fine-tuning cuts texts "
            f"to {max_length:,} tokens"
        )
    return found


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
