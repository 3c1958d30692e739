"""Make a tiny causal language model, to try the commands on that need one.

It is a GPT-2 of two narrow layers with the tokenizer of another model. Its weights are random: it
was trained on nothing, so what is measured on it means nothing.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
import transformers

from weightsurgery.models import Quiet


def make_causal(base: Path, out: Path, *, seed: int = 0) -> None:
    """Write a model directory: GPT-2 with random weights, and a tokenizer.

    Args:
        base: Model directory of a BERT, whose tokenizer is taken.
        out: Where to write; must not exist.
        seed: Seed of the weights.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(base, local_files_only=True)
    tokenizer.eos_token = tokenizer.sep_token  # BERT has no token that ends an answer
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=64,
        n_layer=2,
        n_head=2,
        n_positions=128,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.GPT2LMHeadModel(config)
    out.mkdir(parents=True)
    with Quiet():
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)


@click.command(context_settings={"show_default": True})
@click.option("--base", default="base", type=click.Path(path_type=Path, exists=True))
@click.option("--out", default="causal", type=click.Path(path_type=Path))
def main(base: Path, out: Path) -> None:
    """Make a causal language model with random weights and the tokenizer of a BERT."""
    if out.exists():
        raise click.UsageError(f"{out} exists already; remove it, or give another --out")
    make_causal(base, out)
    click.echo(f"{out}: random weights, and the tokenizer of {base}")


if __name__ == "__main__":
    main()
