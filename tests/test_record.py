"""What a record says of composed, tied and reopened inputs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest

from tests import cases
from weightsurgery import ChangedError, from_arrays, interpolate, mix, open_checkpoint, save

HEAD, EMBEDDING = "lm_head.weight", cases.EMBEDDING["llama"]


def pair(**config: Any) -> list[Any]:
    base = cases.model("llama")
    tuned = cases.finetuned(base)
    for arrays in (base, tuned):
        arrays[HEAD] = arrays[EMBEDDING].copy()
    return [from_arrays(arrays, config=config) for arrays in (base, tuned)]


def test_tied_copies_count_once(tmp_path: Path) -> None:
    base, tuned = pair(tie_word_embeddings=True)
    record = save(mix(base, tuned, ratio=1), f"{tmp_path}/out.safetensors")
    assert record["alignment"]["tied"] == [{"tensor": HEAD, "to": EMBEDDING}]
    changed = {name: entry["changed"] for name, entry in record["tensors"].items()}
    assert changed[HEAD] == changed[EMBEDDING] > 0
    assert record["changed_dimensions"] == sum(changed.values()) - changed[HEAD]
    assert 0 < record["effective_share"] <= 1


def test_after_two_operators_no_share_is_claimed(tmp_path: Path) -> None:
    base, tuned = pair()
    twice = interpolate(base, mix(base, tuned, ratio=0.3), weight=0.5)
    record = save(twice, f"{tmp_path}/out.safetensors")
    assert record["changed_dimensions"] > 0
    assert record["effective_share"] is None
    inner = record["recipe"]["inputs"]["tuned"]
    assert (inner["operator"], inner["settings"]["ratio"]) == ("mix", 0.3)
    assert inner["inputs"] == {"base": {"input": 0}, "tuned": {"input": 1}}


def test_renamed_inputs_are_in_the_recipe(tmp_path: Path) -> None:
    base, tuned = pair()
    names = {name: f"old.{name}" for name in base}
    back = {other: name for name, other in names.items()}
    record = save(mix(base.renamed(names).renamed(back), tuned), f"{tmp_path}/out.safetensors")
    step = record["recipe"]["inputs"]["base"]
    assert (step["operator"], step["settings"]["names"]) == ("rename", back)
    assert step["inputs"]["checkpoint"]["settings"]["names"] == names
    assert 0 < record["effective_share"] < 1


def test_another_process_gets_the_same_file_or_an_error(tmp_path: Path) -> None:
    path = cases.write_file(tmp_path / "x.safetensors", {"w": np.arange(6, dtype=np.float32)})
    sent = cloudpickle.dumps(open_checkpoint(path)["w"])
    assert cloudpickle.loads(sent).read(2, 4).tolist() == [2, 3]
    cases.write_file(tmp_path / "y.safetensors", {"w": np.zeros(6, np.float32)})
    os.replace(tmp_path / "y.safetensors", path)
    with pytest.raises(ChangedError, match="not the file that was opened at first"):
        cloudpickle.loads(sent)
