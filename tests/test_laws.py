"""Laws that hold across the package: unchanged inputs, finite numbers, no drift no change."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests import cases
from weightsurgery import (
    ChangedError,
    Engine,
    NonFiniteError,
    diff,
    from_arrays,
    interpolate,
    mix,
    open_checkpoint,
    save,
)


def test_diff_refuses_an_input_that_changed_meanwhile(tmp_path: Path) -> None:
    base, tuned = (
        cases.write_file(tmp_path / f"{name}.safetensors", {"w": np.full(9, i, np.float32)})
        for i, name in enumerate(("base", "tuned"))
    )

    def spoil(_what: str, _done: int, _total: int) -> None:
        Path(tuned).write_bytes(Path(tuned).read_bytes() + b"\0")

    with pytest.raises(ChangedError, match=r"tuned\.safetensors"):
        diff(open_checkpoint(base), open_checkpoint(tuned), engine=Engine(progress=spoil))


def test_a_number_that_the_other_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    base = from_arrays({"w": np.full(4, 1e6, np.float32)})
    tuned = from_arrays({"w": np.ones(4, np.float16)})
    with pytest.raises(NonFiniteError, match=r"'w'.*cannot hold 1e\+06"):
        save(mix(base, tuned, ratio=1), tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_what_did_not_drift_is_not_changed_by_interpolation() -> None:
    arrays = cases.model("bert")
    same = cases.read(interpolate(from_arrays(arrays), from_arrays(arrays), weight=0.3))
    assert {n: a.tobytes() for n, a in same.items()} == {n: a.tobytes() for n, a in arrays.items()}


def test_a_large_float64_is_said_in_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cases.write_file(tmp_path / "x.safetensors", {"w": np.full((3, 4), 1e200)})
    assert cases.wsurg("inspect", path, "--values", "--json") == 0
    assert json.loads(capsys.readouterr().out)["tensors"][0]["l2"] is None
