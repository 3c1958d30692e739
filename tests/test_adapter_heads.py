"""Adapters that were trained in a model with another head than BASE's, such as a classifier's.

`test_adapter_law` compares what they compute with PEFT over all architectures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from tests import cases
from tests.peft_models import SIZES, TOKENS, WARNINGS, llama
from weightsurgery import apply_adapter, diff, mix, open_checkpoint, save
from weightsurgery.errors import MismatchError

pytestmark = WARNINGS
PAIR = transformers.AutoModelForSequenceClassification


def make(folder: Path, auto: Any = PAIR, base: Any = None, **settings: Any) -> Any:
    """Save a base, and an adapter of it in a class with another head; the adapted model."""
    torch.manual_seed(1)
    (base or llama(pad_token_id=0)).save_pretrained(folder / "base")
    labels = settings.pop("num_labels", 3)
    model = auto.from_pretrained(folder / "base", num_labels=labels)
    settings = {"target_modules": ["q_proj"], "task_type": "SEQ_CLS", **settings}
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, **settings)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(folder / "adapter")
    return model


def merged(folder: Path) -> Any:
    """Apply the adapter and save the result."""
    found = apply_adapter(
        open_checkpoint(folder / "base"), open_checkpoint(folder / "adapter"), force_base=True
    )
    save(found, folder / "merged")
    return found


def is_as_in_peft(folder: Path, model: Any, auto: Any = PAIR) -> bool:
    ours, info = auto.from_pretrained(folder / "merged", output_loading_info=True)
    assert type(ours) is type(model.get_base_model())
    assert not any(info.values()), info
    with torch.no_grad():
        found, expected = (one.eval()(TOKENS).logits for one in (ours, model))
    return bool(torch.allclose(found, expected, atol=1e-5))


@pytest.mark.parametrize("labels", [1, 2, 5])
def test_the_output_is_of_the_adapters_class(labels: int, tmp_path: Path) -> None:
    model = make(tmp_path, num_labels=labels)
    found = merged(tmp_path)
    assert is_as_in_peft(tmp_path, model)
    (warning,) = [one for one in found.warnings if "LlamaForSequenceClassification" in one]
    assert "without BASE's 'lm_head.weight'" in warning
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    before = json.loads((tmp_path / "base" / "config.json").read_text())
    changed = {key for key in {**config, **before} if config.get(key) != before.get(key)}
    named = {"id2label", "label2id"} if labels != 2 else set()
    assert changed == {"architectures", *named}
    assert labels == 2 or len(config["id2label"]) == labels


def test_labels_of_bases_own_are_kept(tmp_path: Path) -> None:
    names = {0: "bad", 1: "so-so", 2: "good"}
    make(tmp_path, base=llama(pad_token_id=0, id2label=names))
    found = merged(tmp_path)
    assert [*found.config["id2label"].values()] == [*names.values()]


@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification"])
def test_without_a_task_the_head_tells_the_class(kind: str, tmp_path: Path) -> None:
    auto = getattr(transformers, f"AutoModelFor{kind}")
    model = make(tmp_path, auto, task_type=None, modules_to_save=["score"])
    merged(tmp_path)
    assert is_as_in_peft(tmp_path, model, auto)


def test_a_head_of_several_layers(tmp_path: Path) -> None:
    sizes = {**SIZES, "intermediate_size": 24, "pad_token_id": 0}
    config = transformers.RobertaConfig(**{**sizes, "max_position_embeddings": 32})
    base = transformers.RobertaForMaskedLM(config)
    model = make(tmp_path, base=base, target_modules=["query"])
    merged(tmp_path)
    assert is_as_in_peft(tmp_path, model)


def test_a_head_that_was_not_saved_is_a_warning(tmp_path: Path) -> None:
    make(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({n: a for n, a in load_file(file).items() if "score" not in n}, file)
    found = merged(tmp_path)
    assert found.config["architectures"] == ["LlamaForCausalLM"]
    assert [one for one in found.warnings if "does not store its head" in one]


def test_a_class_with_more_layers_than_are_stored_names_them(tmp_path: Path) -> None:
    """Saved anew, BASE would have a random pooler, and not the one that was trained with."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1}
    config = transformers.BertConfig(**sizes, num_attention_heads=2, intermediate_size=24)
    make(tmp_path, base=transformers.BertForMaskedLM(config), target_modules=["query"])
    with pytest.raises(MismatchError, match=r"BASE has no 'classifier\.") as told:
        merged(tmp_path)
    assert "that class also has 'bert.pooler.dense.bias'" in told.value.hint
    assert "save BASE as that class" not in told.value.hint


@pytest.mark.parametrize("command", [diff, mix])
def test_an_adapter_in_place_of_a_model_is_told(tmp_path: Path, command: Any) -> None:
    make(tmp_path)
    base, adapter = (open_checkpoint(tmp_path / name) for name in ("base", "adapter"))
    with pytest.raises(MismatchError, match=r"an adapter, not a model; .*apply-adapter"):
        command(base, adapter)


def test_a_class_of_other_names_is_one_clear_line(tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 32,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 1,
        "num_heads": 2,
    }
    base = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    auto = transformers.AutoModelForTokenClassification
    make(tmp_path, auto, base, target_modules=["q"], task_type="TOKEN_CLS")
    expected = (
        r"tensor 'base_model\.model\.classifier\.[a-z]*': BASE has no 'classifier\.[a-z]*' .*"
        "head of a ForTokenClassification model, and BASE is T5ForConditionalGeneration; save BASE "
        "as that class first"
    )
    with pytest.raises(MismatchError, match=expected):
        merged(tmp_path)


def test_the_commands_prove_and_repeat_it(tmp_path: Path) -> None:
    make(tmp_path)
    given, out = (tmp_path / "base", tmp_path / "adapter"), tmp_path / "out"
    assert cases.wsurg("apply-adapter", *given, "-o", out, "--force-base") == 0
    assert cases.wsurg("verify-adapter", *given, out) == 0
    assert cases.wsurg("verify", out) == 0
    assert cases.wsurg("replay", out, "-o", tmp_path / "again") == 0
    assert cases.digests(out) == cases.digests(tmp_path / "again")
