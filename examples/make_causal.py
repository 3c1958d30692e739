"""Make a tiny causal language model, to try the commands on that need one.

It is a GPT-2 or a Llama of two narrow layers with the tokenizer of another model. Its weights are
random: it was trained on nothing, so what is measured on it means nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
import transformers

from weightsurgery.models import Quiet

KINDS = ("gpt2", "llama")


def make_causal(base: Path, out: Path, *, kind: str = "gpt2", seed: int = 0) -> None:
    """Write a model directory: random weights, and a tokenizer.

    Args:
        base: Model directory of a BERT, whose tokenizer is taken.
        out: Where to write; must not exist.
        kind: "gpt2" or "llama": what the layers are called, and how they are built.
        seed: Seed of the weights.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(base, local_files_only=True)
    tokenizer.eos_token = tokenizer.sep_token  # BERT has no token that ends an answer
    shared: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _gpt2(shared) if kind == "gpt2" else _llama(shared)
    out.mkdir(parents=True)
    with Quiet():
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _gpt2(shared: dict[str, Any]) -> Any:
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shared, **sizes))


def _llama(shared: dict[str, Any]) -> Any:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shared, **sizes))


@click.command(context_settings={"show_default": True})
@click.option("--base", default="base", type=click.Path(path_type=Path, exists=True))
@click.option("--out", default="causal", type=click.Path(path_type=Path))
@click.option("--kind", default="gpt2", type=click.Choice(KINDS), help="Of architecture.")
@click.option("--seed", default=0, help="Of the weights.")
def main(base: Path, out: Path, kind: str, seed: int) -> None:
    """Make a causal language model with random weights and the tokenizer of a BERT."""
    if out.exists():
        raise click.UsageError(f"{out} exists already; remove it, or give another --out")
    make_causal(base, out, kind=kind, seed=seed)
    click.echo(f"{out}: random weights, and the tokenizer of {base}")


if __name__ == "__main__":
    main()
