"""Tiny models with PEFT adapters on them: the oracle of everything about adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers

from weightsurgery import apply_adapter, open_checkpoint
from weightsurgery.checkpoint import Checkpoint

WARNINGS = [  # what PEFT warns of when it adapts and saves is not ours
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    # Of parameters it says so too, and matches them all the same.
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not:RuntimeWarning"),
]


SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MOE = {**SIZES, "num_key_value_heads": 1, "num_experts_per_tok": 2}
TOKENS = torch.arange(12).reshape(2, 6)


def llama(**options: Any) -> Any:
    sizes = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **options}))


def bert(**options: Any) -> Any:
    config = transformers.BertConfig(**{**SIZES, "intermediate_size": 24, **options})
    return transformers.BertForSequenceClassification(config)


def bert_with_head(**options: Any) -> Any:
    config = transformers.BertConfig(**{**SIZES, "intermediate_size": 24, **options})
    return transformers.BertForMaskedLM(config)


def gpt2(**options: Any) -> Any:
    settings = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    settings |= {"bos_token_id": 0, "eos_token_id": 0, **options}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings))


def qwen2_moe(**options: Any) -> Any:
    """Experts that are fused in memory and stored one by one, and biases."""
    sizes = {**MOE, "moe_intermediate_size": 20, "num_experts": 3, "intermediate_size": 24}
    sizes |= {"shared_expert_intermediate_size": 12, **options}
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**sizes))


def gpt_oss(**options: Any) -> Any:
    """Experts that are stored fused, inputs by outputs, and biases."""
    sizes = {**MOE, "intermediate_size": 20, "num_local_experts": 3, "head_dim": 8}
    sizes |= {"pad_token_id": 0, **options}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes))


class Convolutions(torch.nn.Module):  # type: ignore[misc, name-defined]  # torch is Any here
    """Convolutions along one and two dimensions between an embedding and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(32, 4)
        self.one = torch.nn.Conv1d(4, 6, 3)
        self.norm = torch.nn.BatchNorm1d(6)
        self.two = torch.nn.Conv2d(1, 5, (3, 2))
        self.pixel = torch.nn.Conv2d(5, 4, 1)
        self.head = torch.nn.Linear(4, 3)

    def forward(self, input_ids: Any) -> Any:
        rows = self.norm(self.one(self.words(input_ids).transpose(1, 2)))
        plane = self.pixel(torch.tanh(self.two(rows[:, None])))
        return SimpleNamespace(logits=self.head(plane.mean((2, 3))))


class Trained:
    """A tiny model and an adapter of it, with random numbers for trained ones."""

    def __init__(
        self, folder: Path, make: Callable[[], Any], settings: dict[str, Any], dtype: Any
    ) -> None:
        torch.manual_seed(1)
        model = make().to(dtype)
        self.base, self.adapter = folder / "base", folder / "adapter"
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(self.base)
        else:
            from safetensors.torch import save_file

            self.base.mkdir()
            save_file(model.state_dict(), self.base / "model.safetensors")
        self.model = peft.get_peft_model(model, peft.LoraConfig(r=4, **settings))
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn(parameter.shape).to(dtype)
        self.model.save_pretrained(self.adapter)

    def merge(self, **options: Any) -> Checkpoint:
        base, adapter = open_checkpoint(self.base), open_checkpoint(self.adapter)
        return apply_adapter(base, adapter, force_base=True, **options)
