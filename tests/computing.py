"""Models of the zoo to compute with: a folder with weights and tokenizer, and what is right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests import tiny_models
from tests.architectures import (
    DECODERS,
    ENCODERS,
    MIXTURES,
    STATE_SPACE,
    Architecture,
    random_model,
    seed_of,
)
from weightsurgery.models import Quiet

if TYPE_CHECKING:
    import torch

_CAUSAL = {**DECODERS, **MIXTURES, **STATE_SPACE}
CAUSAL = {
    name: row for name, row in _CAUSAL.items() if row.model.endswith(("ForCausalLM", "HeadModel"))
}
CLASSIFIERS = {
    name: row
    for name, row in {**ENCODERS, **DECODERS}.items()
    if row.model.endswith("ForSequenceClassification")
}
# Classifiers of encoders that stand in the zoo with another head.
_RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4}
_ENCODERS = {
    "albert": {},
    "deberta": {**_RELATIVE, "max_relative_positions": 8},
    "deberta-v2": {**_RELATIVE, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
    "distilbert": {},
    "esm": {"position_embedding_type": "rotary"},
    "modernbert": {},
    "mpnet": {},
    "nomic-bert": {},
}
CLASSIFIERS |= {
    f"{name}-classifier": replace(
        ENCODERS[name],
        model=ENCODERS[name].model.replace("ForMaskedLM", "ForSequenceClassification"),
        settings={**ENCODERS[name].settings, **more},
    )
    for name, more in _ENCODERS.items()
}
ALL = {**CAUSAL, **CLASSIFIERS}


def folder_of(root: Path, name: str) -> Path:
    """A model as transformers saves it, with a tokenizer of as many words as it has rows."""
    path = root / name
    if path.exists():
        return path
    row = ALL[name]
    with Quiet():
        random_model(row, seed_of(name), base=False).save_pretrained(path)
    tiny_models.tokenizer(classifier=is_classifier(row)).save_pretrained(path)
    return path


def is_classifier(row: Architecture) -> bool:
    """True for a classifier of texts."""
    return row.model.endswith("ForSequenceClassification")


def reloaded(folder: Path, name: str) -> Any:
    """The model as transformers loads it."""
    import torch
    import transformers

    with Quiet():
        kind = getattr(transformers, ALL[name].model)
        return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def saved(module: Any, folder: Path) -> dict[str, torch.Tensor]:
    """What transformers writes of a model: the tensors, under its names on disk."""
    from safetensors.torch import load_file

    with Quiet():
        module.save_pretrained(folder)
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


def fisher_paths(root: Path, name: str) -> dict[str, float]:
    """The share of a model's parameters whose Fisher comes each way, and that have one at all."""
    from weightsurgery.curvature.fisher import fisher
    from weightsurgery.datasets.batches import read_examples
    from weightsurgery.models import load_model

    model = load_model(folder_of(root, name), device="cpu")
    sentences = tiny_models.write_sentences(root / "sentences.tsv", tiny_models.SENTENCES[:3])
    questions = tiny_models.write_questions(root / "questions.jsonl", tiny_models.QUESTIONS[:3])
    data = sentences if model.task == "classification" else questions
    found = fisher(model, read_examples(model, data, max_length=32))
    paths = found.notes["paths"]
    sizes = dict.fromkeys(("hooks", "split", "loop"), 0)
    for key, view in found.items():
        sizes[paths[key]] += view.size
    trainable = sum(p.numel() for p in model.module.parameters() if p.requires_grad)
    shares = {way: round(size / found.size, 3) for way, size in sizes.items()}
    return {**shares, "coverage": round(found.size / trainable, 3)}


def main() -> None:
    """Write `fisher_paths.json`, which the reference page of architectures shows."""
    import json
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        rows = {name: fisher_paths(Path(folder), name) for name in sorted(ALL)}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    (Path(__file__).parent / "fisher_paths.json").write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()
