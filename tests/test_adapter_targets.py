"""Layers that a LoRA adapter changes by default, in every architecture of the zoo."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import computing, tiny_models
from weightsurgery import apply_adapter, open_checkpoint, save
from weightsurgery.datasets.read import read_instructions
from weightsurgery.errors import SettingError
from weightsurgery.models import Quiet, load_model
from weightsurgery.training.adapter import train_adapter
from weightsurgery.training.lora import lora_settings
from weightsurgery.training.targets import KEYWORDS, find_targets

pytestmark = pytest.mark.usefixtures("one_thread")

_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_FAST = ("gpt2", "gpt-neox", "mixtral", "deepseek-v3", "mamba")
_NAMES = [
    pytest.param(name, marks=() if name in _FAST else pytest.mark.slow) for name in computing.CAUSAL
]
# The layers of each keyword, as all linear layers and the attention's queries and values read.
_LINEAR = {
    "llama": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "gpt2": "c_attn c_proj c_fc",
    "gpt-neox": "query_key_value dense dense_h_to_4h dense_4h_to_h",
    "phi3": "qkv_proj o_proj gate_up_proj down_proj",
    "mpt": "Wqkv out_proj up_proj down_proj",
    "mamba": "in_proj x_proj",
    "jamba": "in_proj x_proj out_proj q_proj k_proj v_proj o_proj",
    "mixtral": "q_proj k_proj v_proj o_proj",
    "gpt-oss": "q_proj k_proj v_proj o_proj",
    "deepseek-v3": "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj",
    "dbrx": "Wqkv out_proj",
}
_QUERY_VALUE = {
    **dict.fromkeys(("llama", "mixtral", "gpt-oss", "jamba"), "q_proj v_proj"),
    "gpt2": "c_attn",
    "gpt-neox": "query_key_value",
    "phi3": "qkv_proj",
    "mpt": "Wqkv",
    "mamba": "in_proj x_proj",
    "deepseek-v3": "q_b_proj kv_b_proj",
    "dbrx": "Wqkv",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("targets")


@pytest.mark.parametrize("name", _LINEAR)
def test_the_keywords_are_layers_that_the_model_has(name: str, root: Path) -> None:
    model = load_model(computing.folder_of(root, name), device="cpu")
    everything, attention = (find_targets(model, (keyword,)) for keyword in KEYWORDS)
    assert set(everything.modules) == set(_LINEAR[name].split())
    assert set(attention.modules) == set(_QUERY_VALUE[name].split())
    has_experts = name in ("mixtral", "gpt-oss", "deepseek-v3", "jamba")
    assert len(everything.parameters) == (2 if has_experts else 0)
    assert not attention.parameters


def _logits(module: Any) -> torch.Tensor:
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        found: torch.Tensor = module(input_ids=ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("keyword", KEYWORDS)
@pytest.mark.parametrize("name", _NAMES)
def test_a_step_changes_every_layer_and_merges_as_in_peft(
    name: str, keyword: str, root: Path
) -> None:
    """No factor B stays zero, PEFT loads the adapter, and merged it computes the same."""
    from peft import PeftModel

    folder = computing.folder_of(root, name)
    model = load_model(folder, device="cpu")
    questions = read_instructions(tiny_models.write_questions(root / "q.jsonl"))
    settings = lora_settings(
        epochs=1, batch_size=8, learning_rate=0.05, rank=2, alpha=4, targets=(keyword,)
    )
    adapter = train_adapter(model, questions, settings)
    for one, view in adapter.items():
        assert "lora_B" not in one or view.read(0, view.size).any(), one
    out, merged = root / f"{name}-{keyword}", root / f"{name}-{keyword}-merged"
    save(adapter, out)
    with Quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT about itself and tied heads
        in_peft = PeftModel.from_pretrained(computing.reloaded(folder, name), out).eval()
    save(apply_adapter(open_checkpoint(folder), open_checkpoint(out)), merged)
    theirs, ours = _logits(in_peft), _logits(load_model(merged, device="cpu").module)
    assert float((theirs - _logits(model.module)).abs().max()) > 1e-3
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)


def test_experts_are_named_like_layers(root: Path) -> None:
    model = load_model(computing.folder_of(root, "mixtral"), device="cpu")
    found = find_targets(model, ("q_proj", "experts.down_proj"))
    assert (found.modules, found.parameters) == (("q_proj",), ("experts.down_proj",))
    assert find_targets(model, ("all-linear",)).parameters == _EXPERTS


def test_dropout_is_that_of_linear_layers_alone(root: Path, tmp_path: Path) -> None:
    """PEFT refuses to load a configuration with both a dropout and fused experts."""
    model = load_model(computing.folder_of(root, "mixtral"), device="cpu")
    questions = read_instructions(tiny_models.write_questions(tmp_path / "q.jsonl"))
    found = [
        train_adapter(model, questions, lora_settings(epochs=1, rank=2, dropout=dropout))
        for dropout in (0.0, 0.5)
    ]
    first, second = (one.notes["training"]["history"][0]["train_loss"] for one in found)
    assert first == second  # B is zero in the first step
    save(found[1], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0.0
    names = [n for n in found[0] if "q_proj.lora_B" in n]
    assert any(
        (found[0][n].read(0, found[0][n].size) != found[1][n].read(0, found[1][n].size)).any()
        for n in names
    )


@pytest.mark.parametrize(
    ("name", "target", "reason"),
    [
        ("mamba", "dt_proj", "the model computes with its weight, not through the layer"),
        ("mamba", "out_proj", "PEFT does not adapt it in mamba models"),
        ("deepseek-v3", "gate_proj", "takes it for the fused experts; give mlp.experts.gate_up_p"),
        ("zamba", "shared_transf.self_attn.q_proj", "several layers share it"),
        ("mixtral", "q", r"none of the model's layers; .* or fused experts \(mlp.experts.gate_up"),
        ("mixtral", "gate", "is a MixtralTopKRouter, not a linear layer"),
    ],
)
def test_what_cannot_be_adapted_is_refused(name: str, target: str, reason: str, root: Path) -> None:
    model = load_model(computing.folder_of(root, name), device="cpu")
    with pytest.raises(SettingError, match=reason):
        find_targets(model, (target,))
