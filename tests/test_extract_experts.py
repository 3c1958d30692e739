"""Extracted adapters of experts whose matrices are in one tensor: factors for each expert."""

from __future__ import annotations

import copy
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from tests import cases
from tests.peft_models import TOKENS, WARNINGS, gpt_oss, qwen2_moe
from tests.test_expert_adapters import logits, mixtral, qwen3
from weightsurgery import apply_adapter, extract_adapter, from_arrays, open_checkpoint, save
from weightsurgery.adapters import decompose, memory
from weightsurgery.adapters.places import STACK, TURNED_STACK, find_places
from weightsurgery.alignment import align
from weightsurgery.architecture.loaded import as_loaded
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.stream import Engine

pytestmark = WARNINGS
MODELS: dict[str, Callable[..., Any]] = {
    "mixtral": mixtral,
    "qwen2": qwen2_moe,
    "qwen3": qwen3,
    "gpt-oss": gpt_oss,
}


def pair(folder: Path, make: Callable[..., Any], rank: int, **options: Any) -> tuple[Any, Any]:
    """A model and one whose experts' matrices moved by products of a rank, saved."""
    torch.manual_seed(1)
    base = make(**options)
    tuned = copy.deepcopy(base)
    for name, parameter in tuned.named_parameters():
        if "experts." in name and "shared" not in name:
            shape = parameter.shape if parameter.ndim == 3 else (1, *parameter.shape)
            factors = [torch.randn(shape[0], n, rank) for n in shape[1:]]
            parameter.data += 0.1 * (factors[0] @ factors[1].mT).reshape(parameter.shape)
    base.save_pretrained(folder / "base")
    tuned.save_pretrained(folder / "tuned")
    return base, tuned


def extracted(folder: Path, **settings: Any) -> Checkpoint:
    made = extract_adapter(*(open_checkpoint(folder / n) for n in ("base", "tuned")), **settings)
    save(made, folder / "adapter")
    return made


@pytest.mark.parametrize("family", MODELS)
def test_a_rank_is_each_experts_and_peft_computes_tuned(family: str, tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, MODELS[family], rank=2)
    made = extracted(tmp_path, rank=2)
    assert not made.config["modules_to_save"]
    assert {n.rpartition(".")[2] for n in made.config["target_parameters"]} == {
        name.rpartition(".")[2] for name, _ in base.named_parameters() if ".experts." in name
    }
    expected = logits(tuned, TOKENS)
    in_peft = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(in_peft, TOKENS), expected, atol=1e-5, rtol=1e-4)
    given = open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "adapter")
    save(apply_adapter(*given), tmp_path / "merged")
    merged = type(tuned).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, TOKENS), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_a_square_matrix_alone(family: str, tmp_path: Path) -> None:
    """No shape tells how it is stored; the model's class and PEFT's version do."""
    base, tuned = pair(tmp_path, MODELS[family], rank=2, intermediate_size=16)
    for name, parameter in tuned.named_parameters():
        if not name.endswith("down_proj"):
            parameter.data.copy_(base.get_parameter(name))
    tuned.save_pretrained(tmp_path / "tuned")
    extracted(tmp_path, rank=2)
    given = open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "adapter")
    save(apply_adapter(*given), tmp_path / "merged")
    in_peft = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    for model in (in_peft, type(tuned).from_pretrained(tmp_path / "merged")):
        found, expected = logits(model, TOKENS), logits(tuned, TOKENS)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_what_is_asked_for_whole_takes_its_module_along(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, mixtral, rank=2)
    made = extracted(tmp_path, rank=2, whole=["model.layers.0.*.down_proj"])
    layer = "model.layers.0.mlp.experts"
    assert made.config["modules_to_save"] == [layer]
    assert all("layers.1." in name for name in made.config["target_parameters"])
    in_peft = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(in_peft, TOKENS), logits(tuned, TOKENS), atol=1e-5, rtol=1e-4)


def test_an_energy_is_kept_of_each_expert(tmp_path: Path) -> None:
    pair(tmp_path, mixtral, rank=5)
    made = extracted(tmp_path, energy=0.9)
    for matrix in made.notes["adapter"]["matrices"]:
        assert 0.9 <= matrix["energy_kept"] < 1
        assert matrix["layout"] == STACK
        assert 1 < matrix["rank"] < 5
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert all(".experts." in name for name in config["rank_pattern"])


def stacks_of(base: Any, tuned: Any, **config: Any) -> tuple[Checkpoint, Checkpoint]:
    name = "model.layers.0.mlp.experts.down_proj"
    made = (from_arrays({name: array}, config=config) for array in (base, tuned))
    first, second = made
    return first, second


MIXTRAL = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}


def test_each_matrix_is_decomposed_alone() -> None:
    drift = np.random.default_rng(0).normal(size=(4, 30, 20)).astype("f4")
    drift[2] = 0  # this expert did not move
    given = stacks_of(np.zeros_like(drift), drift, **MIXTRAL)
    arrays = cases.read(extract_adapter(*given, rank=3))
    a, b = (next(v for n, v in arrays.items() if f"lora_{k}" in n) for k in "AB")
    assert (a.shape, b.shape) == ((12, 20), (30, 12))
    for expert, matrix in enumerate(drift):
        left, values, right = np.linalg.svd(matrix.astype("f8"), full_matrices=False)
        expected = (left[:, :3] * values[:3]) @ right[:3]
        found = b.reshape(30, 3, 4)[:, :, expert] @ a.reshape(4, 3, 20)[expert]
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_class_tells_how_a_stack_is_stored() -> None:
    arrays = np.zeros((2, 3, 4), "f4")
    for kind, layout in (("Mixtral", STACK), ("GptOss", TURNED_STACK)):
        name = {"Mixtral": "mixtral", "GptOss": "gpt_oss"}[kind]
        config = {"model_type": name, "architectures": [f"{kind}ForCausalLM"]}
        base, tuned = stacks_of(arrays, arrays, **config)
        (place,) = find_places(align(base, as_loaded(tuned)))
        assert place.layout == layout


def test_memory_stays_below_its_estimate() -> None:
    drift = np.random.default_rng(0).normal(size=(6, 400, 300)).astype("f4")
    given = stacks_of(np.zeros_like(drift), drift, **MIXTRAL)
    extract_adapter(*given, rank=8, engine=Engine(workers=1))
    tracemalloc.start()
    try:
        adapter = extract_adapter(*given, rank=8, engine=Engine(workers=1))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    (work,) = memory.works_of(adapter)
    assert work.held == sum(view.nbytes for view in adapter.values())
    assert peak < work.held + work.passing < 6 * peak
    places = find_places(align(given[0], as_loaded(given[1])))
    wanted = decompose.Wanted(rank=8, energy=None)
    assert memory.works_expected(places, wanted, given) == [work]
