"""Which layers of a model a LoRA adapter changes, and how PEFT is told so.

Linear layers are adapted through their forward call, fused experts (one 3-D parameter for all of
a block's experts) through PEFT's `target_parameters`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightsurgery.errors import SettingError, shown
from weightsurgery.models import Model

ALL_LINEAR, QUERY_VALUE = "all-linear", "query-value"
KEYWORDS = (ALL_LINEAR, QUERY_VALUE)

_ROUTERS = ("router", "gate", "shared_expert_gate")
# Layers of one attention block that give queries and values, or these and the keys at once.
_PAIRS = (
    ("q_proj", "v_proj"),
    ("q_proj", "kv_b_proj"),
    ("q_b_proj", "kv_b_proj"),
    ("query", "value"),
    ("query_proj", "value_proj"),
    ("Wq", "Wv"),
)
_FUSED = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "in_proj_qkvz", "in_proj_qkv")
# Names that PEFT takes for those of single experts, wherever they stand, if experts are fused.
_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
# PEFT refuses their `out_proj`, whose weight the fused kernels read.
_KERNELS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")


@dataclass(frozen=True)
class Targets:
    """What an adapter changes, as PEFT's configuration says it.

    Attributes:
        modules: Names of linear layers, or their last part where that says it all.
        parameters: Names of fused experts, from the part after the block's number.
    """

    modules: tuple[str, ...]
    parameters: tuple[str, ...]


def find_targets(model: Model, targets: Sequence[str]) -> Targets:
    """Find the layers that names or a keyword stand for.

    Args:
        model: What is to be adapted.
        targets: Names of layers or of fused experts, or their ends; or one of `KEYWORDS`.
            "all-linear" stands for all linear layers and fused experts, without the output head
            and the routers; "query-value" for the layers that compute the queries and values of
            the attention, or for all-linear if the model has none that are known.

    Raises:
        SettingError: A name is not that of a layer that can be adapted.
    """
    layers = _Layers.of(model.module)
    if tuple(targets) == (QUERY_VALUE,):
        found = [name for name in _query_value(layers.linear) if name not in layers.unfit]
        if found:
            return Targets(_shortened(found, layers.names), ())
    if len(targets) == 1 and targets[0] in KEYWORDS:
        left_out = {layers.head, *layers.unfit}
        linear = [n for n in layers.linear if n not in left_out and not _is_router(n)]
        return Targets(_shortened(linear, layers.names), _unnumbered(layers.experts))
    modules: list[str] = []
    parameters: list[str] = []
    for target in targets:
        (parameters if _check(target, layers) else modules).append(target)
    return Targets(tuple(modules), tuple(parameters))


@dataclass(frozen=True)
class _Layers:
    """A model's layers.

    Attributes:
        names: Every module.
        linear: The linear layers.
        experts: The fused experts' parameters.
        unfit: Linear layers that no adapter can change, with the reason.
        head: The output head, "" if there is none.
    """

    names: Mapping[str, Any]
    linear: Sequence[str]
    experts: Sequence[str]
    unfit: Mapping[str, str]
    head: str

    @classmethod
    def of(cls, module: Any) -> _Layers:
        """The layers of a transformers model."""
        import torch
        from transformers.pytorch_utils import Conv1D

        names = dict(module.named_modules())
        kinds = (torch.nn.Linear, Conv1D)
        linear = [name for name, inner in names.items() if isinstance(inner, kinds)]
        experts = [
            f"{name}.{parameter}"
            for name, inner in names.items()
            if "Expert" in type(inner).__name__
            for parameter, values in inner.named_parameters(recurse=False)
            if values.dim() == 3
        ]
        unfit = _unfit(module, linear, experts)
        output = module.get_output_embeddings()
        head = next((name for name in linear if names[name] is output), "")
        return cls(names, linear, experts, unfit, head)


def _unfit(module: Any, linear: Sequence[str], experts: Sequence[str]) -> dict[str, str]:
    """Why no adapter can change a layer."""
    reasons = {"dt_proj": "the model computes with its weight, not through the layer"}
    if module.config.model_type in _KERNELS:
        reasons["out_proj"] = f"PEFT does not adapt it in {module.config.model_type} models"
    if experts:
        there = ", ".join(_unnumbered(experts))
        reasons |= dict.fromkeys(_EXPERTS, f"PEFT takes it for the fused experts; give {there}")
    uses = Counter(id(one) for _, one in module.named_parameters(remove_duplicate=False))
    head = module.get_output_embeddings()  # of a head tied to the embedding `apply_adapter` speaks
    found = {name: reasons[_last(name)] for name in linear if _last(name) in reasons}
    for name in linear:
        layer = module.get_submodule(name)
        if uses[id(layer.weight)] > 1 and layer is not head:
            found[name] = "several layers share it, and an adapter can change one of them alone"
    return found


def _check(target: str, layers: _Layers) -> bool:
    """Refuse what PEFT would pass over, or stumble upon when half of the model is adapted.

    Returns:
        True for fused experts, False for linear layers.
    """
    if list(_ending(target, layers.experts)):
        return True
    found = list(_ending(target, layers.names))
    others = [name for name in found if name not in layers.linear]
    if found and not others:
        refused = [name for name in found if name in layers.unfit]
        if not refused:
            return False
        reason = f"target '{shown(target)}' cannot be adapted: {layers.unfit[refused[0]]}"
        raise SettingError(reason, code="E-NO-MATCH")
    kind = type(layers.names[others[0]]).__name__ if others else ""
    is_what = f"is a {kind}, not a linear layer" if others else "is none of the model's layers"
    there = dict.fromkeys(_last(name) for name in layers.linear)
    fused = _unnumbered(layers.experts)
    raise SettingError(
        f"target '{shown(target)}' {is_what}; expected linear layers ({', '.join(there)})"
        + (f" or fused experts ({', '.join(fused)})" if fused else ""),
        code="E-NO-MATCH",
    )


def _query_value(linear: Sequence[str]) -> Iterator[str]:
    known = set(linear)
    for name in linear:
        block, last = name[: -len(_last(name))], _last(name)
        if last in _FUSED or any(
            last in pair and {f"{block}{one}" for one in pair} <= known for pair in _PAIRS
        ):
            yield name


def _shortened(chosen: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    """The last parts of names that only chosen modules have; other names in full."""
    chosen = dict.fromkeys(chosen)
    others = {_last(name) for name in names if name not in chosen}
    short = (name if _last(name) in others else _last(name) for name in chosen)
    return tuple(dict.fromkeys(short))


def _unnumbered(names: Iterable[str]) -> tuple[str, ...]:
    """Names from the part after the block's number: the same for all blocks."""
    found = []
    for name in names:
        parts = name.split(".")
        first = max((i + 1 for i, part in enumerate(parts) if part.isdigit()), default=0)
        found.append(".".join(parts[first:]))
    return tuple(dict.fromkeys(found))


def _ending(target: str, names: Iterable[str]) -> Iterator[str]:
    return (name for name in names if f".{name}".endswith(f".{target}"))


def _is_router(name: str) -> bool:
    return any(part in _ROUTERS for part in name.split(".")[-2:])


def _last(name: str) -> str:
    return name.rpartition(".")[2]
