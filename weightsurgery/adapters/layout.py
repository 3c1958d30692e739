"""Which tensor of BASE each tensor of an adapter belongs to, and what it does there.

Every tensor of the adapter is accounted for; one that is not is an error that names it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from weightsurgery.adapters.config import AdapterConfig, read_config
from weightsurgery.adapters.contents import Parts, is_beside, refuse_integers, sort_out
from weightsurgery.adapters.experts import inputs_first
from weightsurgery.adapters.half import refuse_half
from weightsurgery.adapters.linked import Linked, distribute, is_all_added
from weightsurgery.adapters.module import Module, seen_transposed
from weightsurgery.adapters.naming import Naming
from weightsurgery.adapters.parameters import Parameter, Parameters
from weightsurgery.adapters.tie import find_shared
from weightsurgery.adapters.updates import LowRankRows, Replace, ReplaceRows, Update
from weightsurgery.architecture.composite import find_architecture
from weightsurgery.architecture.embedding import find_embedding
from weightsurgery.checkpoint import Checkpoint, TensorView
from weightsurgery.errors import FormatError, MismatchError, PolicyError, shown
from weightsurgery.ties import is_output_head


@dataclass(frozen=True)
class Target:
    """A tensor of BASE and what an adapter does to it, in order.

    Attributes:
        name: BASE's name for it.
        updates: At least one.
    """

    name: str
    updates: tuple[Update, ...]


def read_adapter(
    base: Checkpoint, adapter: Checkpoint, *, weight: float = 1.0, naming: Naming | None = None
) -> list[Target]:
    """What an adapter does to BASE, tensor by tensor.

    Args:
        base: The model that it was trained on.
        adapter: From `open_checkpoint`.
        weight: Multiplies the change; −1 takes it back.
        naming: How the adapter's names correspond to BASE's; None for as they are.

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
    contents = sort_out(adapter)
    names = Parameters(base, adapter, contents.shapes(config), naming or Naming())
    refuse_half(config, base, adapter, contents.modules, contents.plain)
    changes: list[tuple[Parameter, Update]] = [
        (_replaced(names, config, name, view), Replace(view))  # what the rest is added to
        for name, view in contents.plain.items()
    ]
    contradicted = _contradicted(config, names, contents.modules)
    turned = inputs_first(names, config, contents.modules)
    for module, parts in contents.modules.items():
        builder = Module(base, adapter, config, names, module, parts, weight, contradicted, turned)
        changes += builder.updates()
    _refuse_shared(base, adapter, names, changes)
    found: dict[str, list[Update]] = {}
    for name, update in distribute(base, changes):
        _add(found, base, adapter, name, update)
    if weight != 1:
        _refuse_weight(adapter, found, weight)
    return [Target(name, tuple(found[name])) for name in base if name in found]


def _refuse_shared(
    base: Checkpoint,
    adapter: Checkpoint,
    names: Parameters,
    changes: Sequence[tuple[Parameter, Update]],
) -> None:
    """Refuse changes of one module whose tensor other modules use too.

    PEFT adapts modules; merged into the tensor, a change would reach all of them.

    Raises:
        PolicyError: There is one.
    """
    shared: dict[str, tuple[str, ...]] = {}
    for parameter, update in changes:
        if isinstance(update, ReplaceRows):
            continue
        stored = [link.theirs for link in parameter.links] or [parameter.view.name]
        for name in stored:
            if name not in shared:
                shared[name] = find_shared(base, name)
        layer = next((name for name in stored if names.is_shared(name)), None)
        users = next(filter(None, (shared[name] for name in stored)), ())
        if layer is None and not users:
            continue
        told = "several layers" if layer else ", ".join(f"'{shown(user)}'" for user in users)
        raise PolicyError(
            f"'{shown(stored[0])}' is one tensor for several modules ({told}): merged, the change "
            "would reach all of them, unlike in PEFT",
            file=adapter.label,
            tensor=update.sources[0],
            hint="leave it out of the adapter, or keep using the adapter unmerged",
            code="E-TIED-SHARED",
        )


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
        alike = type(one) is type(update) and not isinstance(one, Linked | LowRankRows)
        if alike and one.sources != update.sources:
            raise FormatError(
                f"'{shown(one.sources[0])}' adapts the same tensor of BASE, '{shown(name)}'; "
                "expected one of the two",
                file=adapter.label,
                tensor=update.sources[0],
                code="E-ADAPTER-TENSOR",
            )
    updates.append(update)


def _contradicted(config: AdapterConfig, names: Parameters, modules: Mapping[str, Parts]) -> bool:
    """True if some matrix is stored the other way round than fan_in_fan_out says."""
    for module, parts in modules.items():
        found = names.find(f"{module}.weight")
        if found is not None and "a" in parts and "b" in parts:
            told = seen_transposed(found.view, parts["a"], parts["b"])
            if told is not None and told != config.fan_in_fan_out:
                return True
    return False


def _replaced(names: Parameters, config: AdapterConfig, name: str, view: TensorView) -> Parameter:
    """The parameter of BASE that a whole tensor of the adapter replaces.

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
    # PEFT also saves the word embedding and the output head where they may have grown.
    words = is_output_head(name) or _is_of_vocabulary(names, name)
    beside = is_beside(names.adapter, view.name)
    if not (saved or tied or bias or adapted or words or beside):
        raise FormatError(
            "its configuration does not say what this tensor is for: neither a factor, nor a "
            "bias, nor of a module in modules_to_save",
            file=names.adapter.label,
            tensor=view.name,
            code="E-ADAPTER-TENSOR",
        )
    parameter = names.need(name, view)
    target = parameter.view
    if target.dtype != view.dtype:
        refuse_integers(view, names.adapter)
    if target.shape != view.shape:
        raise MismatchError(
            f"its shape is {list(view.shape)}, that of BASE's {list(target.shape)}",
            file=names.adapter.label,
            tensor=view.name,
            code="E-ADAPTER-SHAPE",
        )
    return parameter


def _is_of_vocabulary(names: Parameters, name: str) -> bool:
    """True for a tensor of the word embedding's module, or of the output head's."""
    found = names.find(name)
    if found is not None and found.view.name == find_embedding(names.base):
        return True
    known = find_architecture(names.base.config)
    both = (known.embedding, known.head) if known is not None else ()
    return name.rpartition(".")[0] in {one.rpartition(".")[0] for one in both if one}


def _refuse_weight(adapter: Checkpoint, found: Mapping[str, list[Update]], weight: float) -> None:
    for name, updates in found.items():
        if not all(map(is_all_added, updates)):
            raise PolicyError(
                f"weight {weight:g}: '{shown(name)}' is replaced or rescaled by the adapter, and "
                "only what is added can be weighed or taken back",
                file=adapter.label,
                hint="apply it with weight 1",
                code="E-ADAPTER-WEIGHT",
            )
