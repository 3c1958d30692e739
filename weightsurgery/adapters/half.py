"""Half an adapter: its configuration speaks of tensors that BASE has and the adapter lacks.

PEFT's configurations may name what a model does not have: both `classifier` and `score` for any
classifier. So what is missing counts only where BASE has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from weightsurgery.adapters.config import AdapterConfig
from weightsurgery.adapters.experts import candidates
from weightsurgery.anatomy import find_embedding
from weightsurgery.checkpoint import Checkpoint, TensorView
from weightsurgery.errors import FormatError, shown
from weightsurgery.ties import is_output_head

Parts = Mapping[str, TensorView]


def refuse_half(
    config: AdapterConfig,
    base: Checkpoint,
    adapter: Checkpoint,
    modules: Mapping[str, Parts],
    plain: Parts,
) -> None:
    """Refuse an adapter that lacks what its configuration says of it.

    Which layers `target_modules` and `bias` stand for other settings decide too, so nothing is
    concluded from these.

    Args:
        config: Of the adapter.
        base: What it adapts.
        adapter: The adapter, for messages.
        modules: Its tensors by module and role.
        plain: Those that replace a tensor of BASE.

    Raises:
        FormatError: Something is missing.
    """
    for key, name in _missing(config, base, modules, plain):
        raise FormatError(
            f"{key} names '{shown(name)}', which BASE has, and the adapter holds nothing of it",
            file=adapter.label,
            hint="is the file complete?",
            code="E-ADAPTER-CONTRADICTION",
        )


def _missing(
    config: AdapterConfig, base: Checkpoint, modules: Mapping[str, Parts], plain: Parts
) -> Iterator[tuple[str, str]]:
    """The settings that name something that is missing, with the name."""
    for name in config.modules_to_save:
        if _has_module(base, name) and not _has_module(plain, name):
            yield "modules_to_save", name
    trained = [module for module, parts in modules.items() if "rows" in parts]
    for name in config.token_indices:
        wanted = name or (find_embedding(base) or "").removesuffix(".weight")
        held = trained if not name else [one for one in trained if _ends(one, name)]
        if is_output_head(f"{wanted}.weight") and trained:
            continue  # of a tied head, whose rows are the embedding's
        if config.token_indices[name] and _has_module(base, wanted) and not held:
            yield "trainable_token_indices", wanted
    for name in config.target_parameters:
        held = [one for one in modules if candidates(one, [name])]
        if any(_ends(one, name) for one in base) and not held:
            yield "target_parameters", name
    for module, parts in modules.items():
        if config.lora_bias and "a" in parts and "shift" not in parts:
            yield "lora_bias", module


def _has_module(names: Iterable[str], module: str) -> bool:
    """True if a tensor belongs to a module of that name, or to one below it."""
    return bool(module) and any(f".{module}." in f".{name}" for name in names)


def _ends(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")
