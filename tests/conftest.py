"""Fixtures that every test may use."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

# Before torch is imported, here or in a subprocess: its threads wait on each other for longer than
# a tiny model computes, where other processes want the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed."""
    return np.random.default_rng(20221209)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tiny models, threads only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def examples_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts of examples/ import each other as they do when one of them is run."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = set(sys.modules)
    yield
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    for name in (set(sys.modules) - before) & scripts:
        del sys.modules[name]
