"""The rival of `wsurg diff`: both models in memory, torch, one tensor after the other.

What a good engineer writes in an hour when asked for the drift of one model against another.
Everything is the plain whole-tensor formula, on all the cores torch wants to use:

* quantiles: `torch.quantile` refuses more than 16 Mi elements and the embedding has 65 M, so
  they come from `numpy.quantile`, exact, and several times quicker than `torch.sort`;
* the quantiles of the whole model would need all the drift in memory at once, so they are taken
  from every 64th element.

Usage: python naive_diff.py BASE TUNED > report.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

QUANTILES = (0.5, 0.9, 0.99, 0.999)
SAMPLE_STEP = 64

Numbers = dict[str, Any]


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Return the state dict of every shard in `folder`."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(shard))
    return tensors


def sums(base: torch.Tensor, drift: torch.Tensor, tuned: torch.Tensor) -> Numbers:
    """Return the quantities of one tensor that add up over tensors."""
    product = base * tuned
    # torch's sum adds in pairs, which keeps float32 exact enough; its float32 vector_norm does not
    # (it gave this model a cosine of 1.0015), and sums in float64 take six times as long.
    return {
        "count": drift.numel(),
        "changed": int((base != tuned).sum()),
        "sign_flips": int((product < 0).sum()),
        "not_a_number": int(torch.isnan(tuned).sum()),
        "infinite": int(torch.isinf(tuned).sum()),
        "sum": float(drift.sum()),
        "sum_squares": float(drift.square().sum()),
        "base_squares": float(base.square().sum()),
        "tuned_squares": float(tuned.square().sum()),
        "product": float(product.sum()),
    }


def derived(total: Numbers, largest: float, quantiles: list[float]) -> Numbers:
    """Return the statistics of the drift that follow from `total`, for a tensor or the model."""
    mean = total["sum"] / total["count"]
    norms = (total["base_squares"] * total["tuned_squares"]) ** 0.5
    return {
        "changed_share": total["changed"] / total["count"],
        "l2": total["sum_squares"] ** 0.5,
        "relative_l2": (total["sum_squares"] / max(total["base_squares"], 1e-30)) ** 0.5,
        "max": largest,
        "mean": mean,
        "std": max(total["sum_squares"] / total["count"] - mean**2, 0.0) ** 0.5,
        "cosine": total["product"] / max(norms, 1e-30),
        "quantiles": dict(zip(map(str, QUANTILES), quantiles, strict=True)),
    }


def row_and_column_norms(drift: torch.Tensor) -> Numbers:
    """Return the largest row norm and column norm of a matrix, and where they are."""
    if drift.ndim != 2:
        return {}
    found = {}
    for label, axis in (("row", 1), ("column", 0)):
        norms = torch.linalg.vector_norm(drift, dim=axis)
        found[label] = {"largest": float(norms.max()), "index": int(norms.argmax())}
    return found


def compare(base: torch.Tensor, tuned: torch.Tensor) -> tuple[Numbers, torch.Tensor]:
    """Return the statistics of one tensor and the sample of |drift| that the model needs."""
    equal = torch.equal(base, tuned)
    base, tuned = base.float(), tuned.float()
    drift = tuned - base
    size = drift.abs().flatten()
    total = sums(base, drift, tuned)
    quantiles = np.quantile(size.numpy(), QUANTILES).tolist()
    statistics = {"equal": equal, **total, **derived(total, float(size.max()), quantiles)}
    # A copy: a strided view would keep all of `size` in memory.
    return statistics | row_and_column_norms(drift), size[::SAMPLE_STEP].clone()


def roll_up(tensors: dict[str, Numbers], samples: list[torch.Tensor]) -> Numbers:
    """Return the statistics of the whole model from those of its tensors."""
    additive = ("count", "changed", "sign_flips", "not_a_number", "infinite", "sum")
    squares = ("sum_squares", "base_squares", "tuned_squares", "product")
    total = {key: sum(each[key] for each in tensors.values()) for key in additive + squares}
    largest = max(each["max"] for each in tensors.values())
    quantiles = np.quantile(torch.cat(samples).numpy(), QUANTILES).tolist()
    return total | derived(total, largest, quantiles)


def main() -> None:
    """Print the report on the two folders named on the command line."""
    base, tuned = load(Path(sys.argv[1])), load(Path(sys.argv[2]))
    tensors: dict[str, Numbers] = {}
    samples: list[torch.Tensor] = []
    for name in base:
        tensors[name], sample = compare(base[name], tuned[name])
        samples.append(sample)
    json.dump({"model": roll_up(tensors, samples), "tensors": tensors}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
