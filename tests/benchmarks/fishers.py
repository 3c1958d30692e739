"""Makes a float32 Fisher file for a pair, one block at a time, and keeps it for the next run.

Usage: python -m tests.benchmarks.fishers PAIR_FOLDER [--size NAME] [--layers N]
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

from .shapes import Shape, elements, run_maker, shards
from .weights import BLOCK

SEED, SCALE = 20_240_602, 1e-6


def make_fisher(folder: Path, shape: Shape) -> Path:
    """Return the file in a pair's folder, made now unless it is there already."""
    path = folder / "fisher.safetensors"
    if path.exists():
        return path
    tensors = {name: size for part in shards(shape).values() for name, size in part.items()}
    table: dict[str, object] = {}
    end = 0
    for name, size in tensors.items():
        start, end = end, end + 4 * elements(size)
        table[name] = {"dtype": "F32", "shape": size, "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(SEED)
    # Squares of normal numbers, drawn once and used again from ever new places on.
    pool = np.square(random.standard_normal(2 * BLOCK, dtype=np.float32)) * np.float32(SCALE)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for size in tensors.values():
            for start in range(0, elements(size), BLOCK):
                place = int(random.integers(0, BLOCK))
                count = min(BLOCK, elements(size) - start)
                file.write(pool[place : place + count].view(np.uint8).data)
    return partial.rename(path)


if __name__ == "__main__":
    run_maker(make_fisher)
