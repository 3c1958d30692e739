"""The bytes of a benchmark's models: random ones, or islands of random ones between holes."""

from __future__ import annotations

import os
from typing import BinaryIO

import ml_dtypes
import numpy as np

from .shapes import BYTES_PER_ELEMENT

BLOCK = 4 * 2**20  # elements
WEIGHT_SCALE, DRIFT_SCALE = 0.02, 0.001
UNCHANGED = 0.27  # share of exact zeros in the drift; rounding to bfloat16 makes it 0.30
ISLAND, ISLAND_STEP = 32 * 2**10, 2 * 2**20  # so many elements in every so many of a sparse tensor


class Pool:
    """Random weights and random drift, drawn once and used again from ever new places on.

    Drawing two billion normal numbers would take minutes. Weights and drift start at places of
    their own, so that the blocks of a model are not copies of one another.
    """

    def __init__(self, seed: int) -> None:
        """Draw twice as many numbers as a block takes."""
        self.random = np.random.default_rng(seed)
        self.weights = WEIGHT_SCALE * self.random.standard_normal(2 * BLOCK, dtype=np.float32)
        self.drift = DRIFT_SCALE * self.random.standard_normal(2 * BLOCK, dtype=np.float32)
        self.drift[self.random.random(2 * BLOCK, dtype=np.float32) < UNCHANGED] = 0.0

    def draw(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return `count` bfloat16 weights, at most BLOCK, of the base and of the tuned model."""
        first, second = self.random.integers(0, BLOCK, size=2)
        base = self.weights[first : first + count].astype(ml_dtypes.bfloat16)
        drift = self.drift[second : second + count]
        return base, (base.astype(np.float32) + drift).astype(ml_dtypes.bfloat16)


def fill_random(pool: Pool, base: BinaryIO, tuned: BinaryIO, count: int) -> None:
    """Write `count` random elements to both files."""
    for start in range(0, count, BLOCK):
        for file, block in zip((base, tuned), pool.draw(min(BLOCK, count - start)), strict=True):
            file.write(block.view(np.uint8).data)


def fill_sparse(pool: Pool, base: BinaryIO, tuned: BinaryIO, count: int) -> None:
    """Write `count` elements to both files: islands of random ones, and holes (zeros) between."""
    for start in range(0, count, ISLAND_STEP):
        size = min(ISLAND_STEP, count - start)
        island = min(ISLAND, size)
        fill_random(pool, base, tuned, island)
        for file in (base, tuned):
            file.seek((size - island) * BYTES_PER_ELEMENT, os.SEEK_CUR)


FILLS = {"random": fill_random, "sparse": fill_sparse}
