"""The Llama-shaped models of the benchmarks: names, shapes, configuration, no weights."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

BYTES_PER_ELEMENT = 2  # bfloat16

Tensors = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a Llama model with untied embeddings.

    The defaults are those of TinyLlama: 1.1 B parameters, 2.2 GB in bfloat16.
    """

    layers: int = 22
    hidden: int = 2048
    mlp: int = 5632
    heads: int = 32
    kv_heads: int = 4
    vocabulary: int = 32_000

    @property
    def parameters(self) -> int:
        """Number of scalar parameters."""
        return sum(elements(shape) for shard in shards(self).values() for shape in shard.values())


SIZES = {
    "tinyllama": Shape(),
    "tiny": Shape(layers=2, hidden=64, mlp=128, heads=4, kv_heads=2, vocabulary=256),
    "small": Shape(layers=14, hidden=1024, mlp=2816, heads=16, kv_heads=4, vocabulary=16_000),
    # Eight times the bytes of "small": more tensors and larger ones, for neither may cost memory.
    "large": Shape(layers=28, hidden=2048, mlp=5632, heads=32, kv_heads=8, vocabulary=64_000),
}


def elements(shape: tuple[int, ...]) -> int:
    """Return the number of elements of a tensor of `shape`."""
    return math.prod(shape)


def layer(shape: Shape, index: int) -> Tensors:
    """Return the tensors of one decoder layer, sorted by name."""
    keys = shape.hidden // shape.heads * shape.kv_heads
    prefix = f"model.layers.{index}."
    return {
        prefix + "input_layernorm.weight": (shape.hidden,),
        prefix + "mlp.down_proj.weight": (shape.hidden, shape.mlp),
        prefix + "mlp.gate_proj.weight": (shape.mlp, shape.hidden),
        prefix + "mlp.up_proj.weight": (shape.mlp, shape.hidden),
        prefix + "post_attention_layernorm.weight": (shape.hidden,),
        prefix + "self_attn.k_proj.weight": (keys, shape.hidden),
        prefix + "self_attn.o_proj.weight": (shape.hidden, shape.hidden),
        prefix + "self_attn.q_proj.weight": (shape.hidden, shape.hidden),
        prefix + "self_attn.v_proj.weight": (keys, shape.hidden),
    }


def shards(shape: Shape) -> dict[str, Tensors]:
    """Return the tensors of each of the two files, each sorted by name as safetensors does."""
    embedding = (shape.vocabulary, shape.hidden)
    first: Tensors = {"model.embed_tokens.weight": embedding}
    second: Tensors = {"model.norm.weight": (shape.hidden,), "lm_head.weight": embedding}
    for index in range(shape.layers):
        (first if index < shape.layers // 2 else second).update(layer(shape, index))
    return {
        "model-00001-of-00002.safetensors": dict(sorted(first.items())),
        "model-00002-of-00002.safetensors": dict(sorted(second.items())),
    }


def config(shape: Shape) -> dict[str, Any]:
    """Return the config.json of the model, a valid LlamaConfig."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-05,
    }


def run_maker(make: Callable[[Path, Shape], Path]) -> None:
    """Make in the folder that the command line names, of the size it asks for; print the path.

    Args:
        make: Its first docstring line is the help.
    """
    parser = argparse.ArgumentParser(description=make.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="tinyllama")
    parser.add_argument("--layers", type=int)
    settings = parser.parse_args()
    shape = SIZES[settings.size]
    if settings.layers:
        shape = replace(shape, layers=settings.layers)
    print(make(settings.folder, shape))
