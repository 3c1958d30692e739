"""Adapters of experts that the model fuses in memory and stores one by one on the disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests import cases
from tests.peft_models import MOE, TOKENS, WARNINGS, Trained, gpt_oss, qwen2_moe
from weightsurgery import apply_adapter, from_arrays, open_checkpoint, save, verify_adapter
from weightsurgery.errors import MismatchError, PolicyError

pytestmark = WARNINGS


def mixtral(**options: Any) -> Any:
    sizes = {**MOE, "intermediate_size": 24, "num_local_experts": 3, **options}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))


def qwen3() -> Any:
    sizes = {**MOE, "moe_intermediate_size": 20, "num_experts": 3, "head_dim": 8}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes))


MODELS: dict[str, Callable[[], Any]] = {"mixtral": mixtral, "qwen2": qwen2_moe, "qwen3": qwen3}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
VARIANTS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {"target_modules": [], "target_parameters": EXPERTS},
    "gate and up alone": {"target_modules": [], "target_parameters": EXPERTS[:1]},
    "down alone": {"target_modules": [], "target_parameters": EXPERTS[1:]},
    "router": {"target_modules": [], "target_parameters": ["mlp.gate.weight"]},
    "named without a module": {"target_modules": ["q_proj"], "target_parameters": ["down_proj"]},
    "all": {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "use_rslora": True},
    "a pattern of alpha": {
        "target_modules": [],
        "target_parameters": EXPERTS[:1],
        "alpha_pattern": {"gate_up_proj": 64},
    },
    "patterns": {
        "target_modules": ["q_proj"],
        "target_parameters": EXPERTS,
        "rank_pattern": {"experts.down_proj": 2, "experts": 3},
        "alpha_pattern": {"gate_up_proj": 64, "mlp.experts": 3},
    },
}


def logits(model: Any, tokens: Any) -> Any:
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


EVERY = pytest.mark.parametrize("variant", VARIANTS)
FAMILIES = pytest.mark.parametrize("family", MODELS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


@EVERY
@FAMILIES
@DTYPES
def test_the_written_model_is_pefts_merge(
    family: str, variant: str, dtype: Any, tmp_path: Path
) -> None:
    made = Trained(tmp_path, MODELS[family], VARIANTS[variant], dtype)
    tokens = torch.arange(12).reshape(2, 6)
    expected = logits(made.model, tokens) if dtype == torch.float32 else None
    save(made.merge(), tmp_path / "ours")
    kind = type(made.model.get_base_model())
    theirs = made.model.merge_and_unload()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = open_checkpoint(tmp_path / "ours")
    stored, before = (cases.read(open_checkpoint(tmp_path / n)) for n in ("theirs", "base"))
    found, twice = cases.read(ours), cases.read(made.merge(rounding="peft"))
    assert found.keys() == stored.keys()
    for name, array in stored.items():
        wanted = array.astype("f4")
        # In bfloat16 PEFT rounds the change of a parameter, and then the sum.
        off = [np.abs(one[name].astype("f4") - wanted) for one in (found, twice)]
        step = np.spacing(np.abs(array)).astype("f4")
        room = 1e-6 * np.abs(wanted).max() if dtype == torch.float32 else step
        assert any((one <= room).all() for one in off), name
    assert any(not np.array_equal(found[name], before[name]) for name in found)
    base, adapter = open_checkpoint(made.base), open_checkpoint(made.adapter)
    for merged in (ours, open_checkpoint(tmp_path / "theirs")):
        report = verify_adapter(base, [adapter], merged)
        assert report["proved"], report["tensors"]
    if expected is not None:
        found = logits(kind.from_pretrained(tmp_path / "ours"), tokens)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_an_adapter_of_experts_is_taken_back(tmp_path: Path) -> None:
    made = Trained(tmp_path, mixtral, VARIANTS["experts"], torch.float32)
    adapter = open_checkpoint(made.adapter)
    merged = apply_adapter(made.merge(), adapter, weight=[-1.0], force_base=True)
    before = cases.read(open_checkpoint(made.base))
    for name, array in cases.read(merged).items():
        np.testing.assert_allclose(array, before[name], atol=1e-6)


@pytest.mark.parametrize("make", [mixtral, gpt_oss], ids=["outputs first", "inputs first"])
def test_a_square_matrix_is_read_as_its_sibling(make: Any, tmp_path: Path) -> None:
    def square() -> Any:
        return make(intermediate_size=16)

    made = Trained(tmp_path, square, VARIANTS["experts"], torch.float32)
    expected = logits(made.model, TOKENS)
    save(made.merge(), tmp_path / "merged")
    kind = type(made.model.get_base_model())
    found = logits(kind.from_pretrained(tmp_path / "merged"), TOKENS)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_both_ways_round_is_a_doubt(tmp_path: Path) -> None:
    """Older PEFT took the fused matrices for inputs by outputs; a square one does not tell."""
    alone = {"target_modules": [], "target_parameters": ["experts.down_proj"]}
    made = Trained(tmp_path, lambda: mixtral(intermediate_size=16), alone, torch.float32)
    expected = logits(made.model, TOKENS)
    save(made.merge(), tmp_path / "merged")
    found = type(made.model.get_base_model()).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(found, TOKENS), expected, atol=1e-5, rtol=0)
    file = made.adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "peft_version": "0.18.1"}))
    assert cases.stored(cases.read(made.merge())) != cases.stored(
        cases.read(open_checkpoint(tmp_path / "merged"))
    )
    file.write_text(json.dumps({**config, "peft_version": None}))
    with pytest.raises(PolicyError, match="fit more than one way of"):
        made.merge()


FRONT = "base_model.model.mlp.experts.lora_"


def with_experts(base: cases.Arrays) -> None:
    factors = {f"{FRONT}A.weight": np.ones((6, 6), "f4"), f"{FRONT}B.weight": np.ones((4, 6), "f4")}
    config = cases.adapter_config(target_parameters=["mlp.experts.down_proj"])
    apply_adapter(from_arrays(base), from_arrays(factors, config=config))


def downs(*shapes: tuple[int, ...]) -> cases.Arrays:
    return {f"mlp.experts.{i}.down_proj.weight": np.ones(s, "f4") for i, s in enumerate(shapes)}


def test_stored_experts_must_be_all_there_and_alike() -> None:
    with_experts(downs((4, 6), (4, 6), (4, 6)))
    with pytest.raises(PolicyError, match=r"fit none of 'mlp.experts.down_proj' \[2, 4, 6\]"):
        with_experts(downs((4, 6), (4, 6)))
    with pytest.raises(PolicyError, match=r"fit none of 'mlp.experts.down_proj' \[4, 4, 6\]"):
        with_experts(downs((4, 6), (4, 6), (4, 6), (4, 6)))
    with pytest.raises(MismatchError, match=r"'mlp.experts.down_proj'.* different shapes"):
        with_experts(downs((4, 6), (4, 6), (4, 5)))
    with pytest.raises(MismatchError, match=r"no 'mlp.experts.down_proj'.*'mlp.experts.w2'"):
        with_experts({"mlp.experts.w2": np.ones((3, 4, 6), "f4")})


EXPERTS = "model.layers.0.mlp.experts."
PROJECTIONS = {"gate_proj": (8, 6), "up_proj": (8, 6), "down_proj": (6, 8)}


@pytest.mark.parametrize("kinds", [[*PROJECTIONS], ["up_proj"], ["down_proj"]], ids="-".join)
@pytest.mark.parametrize("experts", [[0, 1, 2, 3], [1, 3]], ids=["all", "some"])
def test_factors_of_single_experts_on_fused_ones(experts: list[int], kinds: list[str]) -> None:
    rng = np.random.default_rng(0)
    shapes = {"gate_up_proj": (4, 16, 6), "down_proj": (4, 6, 8)}
    base = {EXPERTS + n: rng.normal(size=s).astype("f4") for n, s in shapes.items()}
    expected = {name: array.copy() for name, array in base.items()}
    adapter = {}
    for expert in experts:
        for kind in kinds:
            rows, columns = PROJECTIONS[kind]
            a, b = rng.normal(size=(2, columns)), rng.normal(size=(rows, 2))
            front = f"base_model.model.{EXPERTS}{expert}.{kind}.lora_"
            adapter |= {f"{front}{n}.weight": f.astype("f4") for n, f in (("A", a), ("B", b))}
            fused = expected[EXPERTS + ("down_proj" if kind == "down_proj" else "gate_up_proj")]
            first = 8 if kind == "up_proj" else 0
            fused[expert, first : first + rows] += (2 * b @ a).astype("f4")
    config = {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"]}
    settings = cases.adapter_config(r=2, lora_alpha=4)
    merged = apply_adapter(from_arrays(base, config=config), from_arrays(adapter, config=settings))
    for name, array in cases.read(merged).items():
        np.testing.assert_allclose(array, expected[name], atol=1e-5)
