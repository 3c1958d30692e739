"""Fixtures that every test may use."""

from __future__ import annotations

import os

import numpy as np
import pytest

# Before torch is imported, here or in a subprocess: its threads wait on each other for longer than
# a tiny model computes, where other processes want the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed."""
    return np.random.default_rng(20221209)
