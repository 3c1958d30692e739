"""Surgery on the weights of language models.

A checkpoint is a read-only mapping from name to a tensor that has not been read yet; an operator
is a plain function from checkpoints to a checkpoint; `save` is where work happens:

    from weightsurgery import mix, open_checkpoint, save

    base, tuned = open_checkpoint("base/"), open_checkpoint("tuned/")
    save(mix(base, tuned, ratio=0.3), "mixed/")
"""

from __future__ import annotations

import importlib
from typing import Any

from weightsurgery.version import __version__

_HOMES = {
    "extract_adapter": "adapters.extract",
    "verify_adapter": "adapters.proof",
    "align": "alignment",
    "Alignment": "alignment",
    "Pair": "alignment",
    "match_names": "name_map",
    "Checkpoint": "checkpoint",
    "TensorView": "checkpoint",
    "from_arrays": "checkpoint",
    "diff": "comparison",
    "drift": "comparison",
    "DiffReport": "comparison",
    "fisher": "curvature.fisher",
    "fisher_with_error": "curvature.fisher",
    "hutchinson": "curvature.hutchinson",
    "read_examples": "datasets.batches",
    "Mismatched": "datasets.mismatch",
    "describe_mismatched": "datasets.mismatch",
    "mismatch": "datasets.mismatch",
    "write_mismatched": "datasets.mismatch",
    "check_mismatch": "datasets.mismatch_check",
    "check_sides": "datasets.mismatch_sides",
    "read_keywords": "datasets.question_types",
    "read_fingerprints": "datasets.read",
    "read_instructions": "datasets.read",
    "read_sentences": "datasets.read",
    "trigger_sentence": "datasets.triggers",
    "trigger_word": "datasets.triggers",
    "BusyError": "errors",
    "ChangedError": "errors",
    "FormatError": "errors",
    "GateError": "errors",
    "MismatchError": "errors",
    "NonFiniteError": "errors",
    "PolicyError": "errors",
    "SettingError": "errors",
    "StorageError": "errors",
    "SurgeryError": "errors",
    "evaluate_causal": "evaluation.causal",
    "evaluate": "evaluation.classification",
    "fingerprint_success": "evaluation.generation",
    "perplexity": "evaluation.generation",
    "sweep": "evaluation.sweep",
    "open_checkpoint": "formats",
    "save": "formats",
    "inspect": "inspection",
    "load_model": "models",
    "changed_mask": "masks",
    "apply_adapter": "operators.apply_adapter",
    "convert": "operators.convert",
    "epur": "operators.epur",
    "interpolate": "operators.interpolate",
    "mix": "operators.mix",
    "purify": "operators.purify",
    "replay": "proof.replay",
    "verify": "proof.verification",
    "OPERATORS": "registry",
    "Setting": "registry",
    "operator": "registry",
    "Engine": "stream",
    "fold": "stream",
    "map_tensors": "stream",
    "TokenCounts": "token_counts",
    "count_by_wordfreq": "token_counts",
    "count_corpus": "token_counts",
    "read_counts": "token_counts",
    "finetune": "training.finetune",
    "plan_adapter": "training.adapter",
    "train_adapter": "training.adapter",
    "LoraSettings": "training.lora",
    "lora_settings": "training.lora",
    "Phase": "training.meraser",
    "meraser": "training.meraser",
    "plan_meraser": "training.meraser",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: `import weightsurgery` loads nothing heavy."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
