"""What a checkpoint holds: tensors, sizes by module, metadata, side files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightsurgery.alignment import Pair
from weightsurgery.anatomy import kind_of, layer_of, natural_key
from weightsurgery.checkpoint import Checkpoint, TensorView, require_checkpoints
from weightsurgery.drift_kernel import TOTALS, drift_statistics
from weightsurgery.kernels import Block
from weightsurgery.statistics import finite_or_none
from weightsurgery.stream import Engine, fold

SCHEMA = "wsurg.inspect/1"


def inspect(
    checkpoint: Checkpoint, *, values: bool = False, engine: Engine | None = None
) -> dict[str, Any]:
    """Describe a checkpoint from its headers alone.

    Args:
        checkpoint: The model.
        values: Read the weights too, and give L2 norm, NaN and infinity counts of each tensor.
        engine: Workers and progress, for `values`.

    Returns:
        The description in a versioned schema: `tensors` in reading order, `modules` and `kinds`
        with parameters and bytes, `dtypes`, totals, metadata, files.
    """
    require_checkpoints(checkpoint)
    measured = _measure(checkpoint, engine or Engine()) if values else {}
    tensors = [
        {
            "tensor": name,
            "dtype": view.dtype.name,
            "shape": list(view.shape),
            "parameters": view.size,
            "bytes": view.nbytes,
            **measured.get(name, {}),
        }
        for name, view in sorted(checkpoint.items(), key=lambda item: natural_key(item[0]))
    ]
    kind = checkpoint.config.get("model_type")  # of whatever type, NaN among others
    return {
        "schema": SCHEMA,
        "name": checkpoint.label,
        "parameters": checkpoint.size,
        "bytes": checkpoint.nbytes,
        "tensors": tensors,
        "modules": _grouped(
            checkpoint, {n: layer_of(n) or n.partition(".")[0] for n in checkpoint}
        ),
        "kinds": _grouped(checkpoint, {n: kind_of(n) for n in checkpoint}),
        "dtypes": _grouped(checkpoint, {n: v.dtype.name for n, v in checkpoint.items()}),
        "metadata": dict(sorted(checkpoint.metadata.items())),
        "parts": [*checkpoint.parts],
        "model_type": kind if isinstance(kind, str) else None,
        "files": [{"file": f.name, "bytes": f.size} for f in checkpoint.files],
        "side_files": [{"file": f.name, "bytes": f.size} for f in checkpoint.side_files],
        "left_out": [{"file": name, "reason": reason} for name, reason in checkpoint.left_out],
        "warnings": list(checkpoint.warnings),
    }


def _grouped(checkpoint: Checkpoint, group_of: Mapping[str, str]) -> list[dict[str, Any]]:
    groups: dict[str, list[TensorView]] = {}
    for name in sorted(checkpoint, key=natural_key):
        groups.setdefault(group_of[name], []).append(checkpoint[name])
    return [
        {
            "name": group,
            "tensors": len(views),
            "parameters": sum(view.size for view in views),
            "bytes": sum(view.nbytes for view in views),
        }
        for group, views in groups.items()
    ]


def _measure(checkpoint: Checkpoint, engine: Engine) -> dict[str, dict[str, Any]]:
    """Norm and non-finite counts of the floating tensors, in one pass."""
    pairs = [Pair(v, v, v.size, key=n) for n, v in checkpoint.items() if v.dtype.arithmetic]
    found: dict[str, dict[str, Any]] = {
        pair.name: {"l2": 0.0, "nan": 0, "infinite": 0}
        for pair in pairs  # l2: squared at first
    }

    def step(_pair: Pair, _start: int, block: Block, _same: Block) -> Mapping[str, float]:
        totals = drift_statistics(block, block, width=block.size, top=0, by_column=False)[0]
        return dict(zip(TOTALS, map(float, totals), strict=True))

    def combine(state: Any, pair: Pair, _start: int, totals: Mapping[str, float]) -> Any:
        entry = state[pair.name]
        entry["l2"] += totals["base2"]
        entry["nan"] += int(totals["base_nan"])
        entry["infinite"] += int(totals["base_inf"])
        return state

    fold(step, combine, found, pairs, engine=engine, what="reading")
    checkpoint.check_unchanged()
    return {n: {**entry, "l2": finite_or_none(entry["l2"] ** 0.5)} for n, entry in found.items()}
