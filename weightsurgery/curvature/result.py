"""Estimates of curvature as checkpoints: checked, named as on disk, telling how they were made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsurgery.checkpoint import Checkpoint, Step, TensorView, from_arrays
from weightsurgery.datasets.batches import Encoded, count_cut, limit_of
from weightsurgery.errors import NonFiniteError, shown
from weightsurgery.models import Model

if TYPE_CHECKING:
    import torch

HOOKS, SPLIT, LOOP = "hooks", "split", "loop"


def make_result(
    tensors: Mapping[str, torch.Tensor],
    *,
    model: Model,
    paths: Mapping[str, str],
    step: Step,
    content: str,
    warnings: Sequence[str] = (),
) -> Checkpoint:
    """A checkpoint of float32 tensors under the names on disk, tied weights once.

    Args:
        tensors: Values of each of the model's `names`; they are not copied if they lie in main
            memory.
        model: Whose parameters these are.
        paths: How each was computed; `notes["paths"]` has it by name on disk.
        step: What made them.
        content: What the numbers are, in words, for the file's metadata.
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
    views, by_name = {}, {}
    for name, view, keys in _placed(tensors, model):
        views[name] = replace(view, status="added")
        ways = [paths[key] for key in keys]
        by_name[name] = next((way for way in (LOOP, SPLIT) if way in ways), ways[0])
    settings = {name: _text(value) for name, value in step.settings.items()}
    return replace(
        from_arrays({}),
        tensors=views,
        label=step.operator,
        metadata={"estimator": step.operator, "content": content, **settings},
        step=replace(step, repeatable=False),
        notes={"paths": by_name},
        warnings=tuple(warnings),
    )


def _placed(
    tensors: Mapping[str, torch.Tensor], model: Model
) -> Iterator[tuple[str, TensorView, tuple[str, ...]]]:
    """Name on disk, values, and the parameters they are of."""
    if model.storage is not None:
        for one in model.storage.as_stored(model.checkpoint, tensors):
            yield one.name, one.view, one.keys
        return
    made = from_arrays({name: values.cpu().numpy() for name, values in tensors.items()})
    for name, view in made.items():
        yield name, view, (name,)


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
