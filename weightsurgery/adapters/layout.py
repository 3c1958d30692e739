"""Which tensor of BASE each tensor of an adapter belongs to, and what it does there.

Every tensor of the adapter is accounted for; one that is not is an error that names it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from weightsurgery.adapters.config import AdapterConfig, read_config
from weightsurgery.adapters.experts import candidates
from weightsurgery.adapters.half import refuse_half
from weightsurgery.adapters.module import Module, seen_transposed
from weightsurgery.adapters.names import Names
from weightsurgery.adapters.updates import ADDED, Replace, Update
from weightsurgery.checkpoint import Checkpoint, TensorView
from weightsurgery.errors import FormatError, MismatchError, PolicyError, shown
from weightsurgery.ties import is_output_head

_FRONT = "base_model.model."
_ROLES = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "shift",
    ".lora_embedding_A": "embedding a",
    ".lora_embedding_B": "embedding b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".token_adapter.trainable_tokens_delta": "rows",
}


@dataclass(frozen=True)
class Target:
    """A tensor of BASE and what an adapter does to it, in order.

    Attributes:
        name: BASE's name for it.
        updates: At least one.
    """

    name: str
    updates: tuple[Update, ...]


def read_adapter(base: Checkpoint, adapter: Checkpoint, *, weight: float = 1.0) -> list[Target]:
    """What an adapter does to BASE, tensor by tensor.

    Args:
        base: The model that it was trained on.
        adapter: From `open_checkpoint`.
        weight: Multiplies the change; −1 takes it back.

    Returns:
        A target for each tensor of BASE that changes, in BASE's order.

    Raises:
        FormatError: The adapter is incomplete, or its tensors contradict its configuration.
        MismatchError: BASE lacks a tensor that it adapts, or has it in another shape.
        PolicyError: The adapter is of a kind that is not folded in here.
    """
    config = read_config(adapter)
    if not adapter:
        raise FormatError("the adapter has no tensors", file=adapter.label, code="E-ADAPTER-EMPTY")
    modules, plain = _sorted_out(adapter)
    wanted = [n for m in modules for n in candidates(m, config.target_parameters)]
    wanted += [f"{m}.weight" for m in modules if not candidates(m, config.target_parameters)]
    names = Names(base, adapter, [*wanted, *plain])
    refuse_half(config, base, adapter, modules, plain)
    found: dict[str, list[Update]] = {}
    for name, view in plain.items():  # what is replaced is what the rest is added to
        target = _replaced(names, config, name, view)
        _add(found, base, adapter, target.name, Replace(view))
    contradicted = _contradicted(config, names, modules)
    for module, parts in modules.items():
        builder = Module(base, adapter, config, names, module, parts, weight, contradicted)
        for target_name, update in builder.updates():
            _add(found, base, adapter, target_name, update)
    if weight != 1:
        _refuse_weight(adapter, found, weight)
    return [Target(name, tuple(found[name])) for name in base if name in found]


def _add(
    found: dict[str, list[Update]],
    base: Checkpoint,
    adapter: Checkpoint,
    name: str,
    update: Update,
) -> None:
    """Note what is done to a tensor of BASE.

    Raises:
        FormatError: The same is done to it already, under another name.
        MismatchError: It is not floating, and not replaced by its like, such as a counter.
    """
    alike = isinstance(update, Replace) and update.by.dtype == base[name].dtype
    if not base[name].dtype.arithmetic and not alike:
        raise MismatchError(
            f"it adapts BASE's '{shown(name)}', which is {base[name].dtype.name}; expected a "
            "floating tensor",
            file=adapter.label,
            tensor=update.sources[0],
            code="E-ADAPTER-TARGET",
        )
    updates = found.setdefault(name, [])
    for one in updates:
        if type(one) is type(update) and one.sources != update.sources:
            raise FormatError(
                f"'{shown(one.sources[0])}' adapts the same tensor of BASE, '{shown(name)}'; "
                "expected one of the two",
                file=adapter.label,
                tensor=update.sources[0],
                code="E-ADAPTER-TENSOR",
            )
    updates.append(update)


def _sorted_out(
    adapter: Checkpoint,
) -> tuple[dict[str, dict[str, TensorView]], dict[str, TensorView]]:
    """Tensors by module and role, and those that stand for a tensor of BASE.

    Raises:
        FormatError: A name is none of an adapter's, or two mean the same.
        PolicyError: A factor is not floating.
    """
    modules: dict[str, dict[str, TensorView]] = {}
    plain: dict[str, TensorView] = {}
    for name, view in adapter.items():
        if not name.startswith(_FRONT):
            raise FormatError(
                f"expected a name that begins with {_FRONT}",
                file=adapter.label,
                tensor=name,
                code="E-ADAPTER-TENSOR",
            )
        bare = name[len(_FRONT) :]
        role = next((r for ending, r in _ROLES.items() if bare.endswith(ending)), "")
        if role:
            _refuse_integers(view, adapter)
            ending = next(e for e in _ROLES if bare.endswith(e))
            _put(modules.setdefault(bare.removesuffix(ending), {}), role, view, adapter)
        else:
            _put(plain, bare.replace(".base_layer.", "."), view, adapter)
    return modules, plain


def _refuse_integers(view: TensorView, adapter: Checkpoint) -> None:
    """Refuse what nothing can be computed with.

    Raises:
        PolicyError: It is not floating.
    """
    if not view.dtype.arithmetic:
        raise PolicyError(
            f"{view.dtype.name} weights in an adapter; expected floating ones",
            file=adapter.label,
            tensor=view.name,
            code="E-ADAPTER-DTYPE",
        )


def module_of(name: str) -> str:
    """The module that a tensor of an adapter belongs to, as the adapter names it.

    Args:
        name: The tensor's, a factor's or a vector's.
    """
    bare = name.removeprefix(_FRONT)
    ending = next((ending for ending in _ROLES if bare.endswith(ending)), "")
    return bare.removesuffix(ending)


def _put(found: dict[str, TensorView], role: str, view: TensorView, adapter: Checkpoint) -> None:
    if role in found:
        raise FormatError(
            f"'{shown(found[role].name)}' has the same role; expected one of the two",
            file=adapter.label,
            tensor=view.name,
            code="E-ADAPTER-TENSOR",
        )
    found[role] = view


def _contradicted(
    config: AdapterConfig, names: Names, modules: Mapping[str, Mapping[str, TensorView]]
) -> bool:
    """True if some matrix is stored the other way round than fan_in_fan_out says."""
    for module, parts in modules.items():
        found = names.find(f"{module}.weight")
        if found is not None and "a" in parts and "b" in parts:
            told = seen_transposed(names.base[found], parts["a"], parts["b"])
            if told is not None and told != config.fan_in_fan_out:
                return True
    return False


def _replaced(names: Names, config: AdapterConfig, name: str, view: TensorView) -> TensorView:
    """The tensor of BASE that a whole tensor of the adapter replaces.

    Raises:
        FormatError: Nothing in the configuration says that it is replaced.
        MismatchError: BASE lacks it, or has another shape.
        PolicyError: It is not floating, and of another dtype than BASE's.
    """
    module = name.rpartition(".")[0]
    # A saved module's name need only end so, and what is saved may lie below it.
    paths = itertools.accumulate(module.split("."), lambda path, part: f"{path}.{part}")
    saved = any(path.endswith(one) for path in paths for one in config.modules_to_save if one)
    tied = config.ensure_weight_tying and bool(config.modules_to_save) and is_output_head(name)
    bias = config.bias != "none" and name.endswith(".bias")
    adapted = ".base_layer." in view.name
    if not (saved or tied or bias or adapted):
        raise FormatError(
            "its configuration does not say what this tensor is for: neither a factor, nor a "
            "bias, nor of a module in modules_to_save",
            file=names.adapter.label,
            tensor=view.name,
            code="E-ADAPTER-TENSOR",
        )
    target = names.need(name, view)
    if target.dtype != view.dtype:
        _refuse_integers(view, names.adapter)
    if target.shape != view.shape:
        raise MismatchError(
            f"its shape is {list(view.shape)}, that of BASE's {list(target.shape)}",
            file=names.adapter.label,
            tensor=view.name,
            code="E-ADAPTER-SHAPE",
        )
    return target


def _refuse_weight(adapter: Checkpoint, found: Mapping[str, list[Update]], weight: float) -> None:
    for name, updates in found.items():
        if not all(isinstance(update, ADDED) for update in updates):
            raise PolicyError(
                f"weight {weight:g}: '{shown(name)}' is replaced or rescaled by the adapter, and "
                "only what is added can be weighed or taken back",
                file=adapter.label,
                hint="apply it with weight 1",
                code="E-ADAPTER-WEIGHT",
            )
