"""Tiny models with PEFT adapters on them: the oracle of everything about adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
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


def llama(**options: Any) -> Any:
    settings = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24}
    settings |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings, **options))


def biased() -> Any:
    return llama(attention_bias=True)


def bert() -> Any:
    settings = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24}
    settings |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**settings)
    return transformers.BertForSequenceClassification(config)


def gpt2() -> Any:
    settings = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings, **tokens))


def conv() -> Any:
    layers = {
        "one": torch.nn.Conv1d(4, 6, 3),
        "two": torch.nn.Conv2d(4, 6, (3, 2)),
        "pixel": torch.nn.Conv2d(4, 6, 1),
    }
    return torch.nn.ModuleDict(layers)


def experts() -> Any:
    class Experts(torch.nn.Module):  # type: ignore[misc, name-defined]  # torch is Any here
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = torch.nn.Parameter(torch.randn(3, 12, 8))
            self.down_proj = torch.nn.Parameter(torch.randn(3, 8, 6))

    return torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"experts": Experts()})})


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
