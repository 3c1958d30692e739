"""Makes a LoRA adapter of a pair's base, rank 16 on all seven projections, and keeps it.

Usage: python -m tests.benchmarks.adapters PAIR_FOLDER [--size NAME] [--layers N]
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from .pairs import header
from .shapes import Shape, Tensors, run_maker, shards

SEED, RANK, ALPHA = 20_240_603, 16, 32
SCALE = 0.01  # of the factors' elements: a weight's change is then a twenty-fifth of its size
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def factors(shape: Shape) -> Tensors:
    """Return the names and shapes of the adapter's tensors, sorted."""
    found: Tensors = {}
    for part in shards(shape).values():
        for name, (rows, *columns) in part.items():
            module = name.removesuffix(".weight")
            if module.endswith(PROJECTIONS):
                found[f"base_model.model.{module}.lora_A.weight"] = (RANK, *columns)
                found[f"base_model.model.{module}.lora_B.weight"] = (rows, RANK)
    return dict(sorted(found.items()))


def make_adapter(pair: Path, shape: Shape) -> Path:
    """Return the adapter's folder in a pair's, made now unless it is there already."""
    folder = pair / "adapter"
    if folder.exists():
        return folder
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(pair / "base"),
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": sorted(PROJECTIONS),
    }
    (partial / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    random = np.random.default_rng(SEED)
    tensors = factors(shape)
    with (partial / "adapter_model.safetensors").open("wb") as file:
        file.write(header(tensors, "F32"))
        for size in tensors.values():
            values = SCALE * random.standard_normal(size, dtype=np.float32)
            file.write(values.view(np.uint8).data)
    return partial.rename(folder)


if __name__ == "__main__":
    run_maker(make_adapter)
