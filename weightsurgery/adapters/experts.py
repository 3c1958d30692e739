"""Adapters of a parameter itself, such as the fused matrices of a layer's experts.

PEFT names them by the module that has the parameter, and nests them where it has several; which
pair of factors belongs to which parameter only their shapes tell. Where those leave a doubt, the
adapter is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from weightsurgery.adapters.updates import LowRank
from weightsurgery.architecture.canonical import template
from weightsurgery.architecture.composite import find_architecture
from weightsurgery.checkpoint import TensorView
from weightsurgery.kernels import Block

if TYPE_CHECKING:
    from weightsurgery.adapters.config import AdapterConfig
    from weightsurgery.adapters.parameters import Parameters

_ASKS_THE_CLASS = (0, 19)
Arrange = Callable[[Block, Block], tuple[Block, Block]]


def candidates(module: str, parameters: Sequence[str]) -> list[str]:
    """Full names of the parameters that a module's factors may belong to.

    Args:
        module: As the adapter names it.
        parameters: target_parameters of its configuration.
    """
    names = [f"{bare(module)}.{one.rpartition('.')[2]}" for one in parameters]
    return [n for n, one in zip(names, parameters, strict=True) if f".{n}".endswith(f".{one}")]


def fit(
    shape: tuple[int, ...], a: TensorView, b: TensorView, rank: int, scale: float
) -> list[LowRank]:
    """The ways in which a pair of factors fits a parameter; one, where there is no doubt.

    Args:
        shape: The parameter's, (rows, columns) or (experts, …, …).
        a: Shape (experts × rank, inputs), expert after expert.
        b: Shape (outputs, rank × experts), rank after rank.
        rank: Of each expert.
        scale: Of the product.
    """
    if len(shape) not in (2, 3) or len(a.shape) != 2 or len(b.shape) != 2:
        return []
    experts = 1 if len(shape) == 2 else shape[0]
    rows, columns = shape[-2:]
    if a.shape[0] != experts * rank or b.shape[1] != experts * rank:
        return []
    found = []
    if (rows, columns) == (b.shape[0], a.shape[1]):
        arrange = _outputs_first(experts)
        found.append(LowRank(b, a, scale, experts, (rows, columns), arrange))
    if (rows, columns) == (a.shape[1], b.shape[0]) and len(shape) == 3:
        arrange = _inputs_first(experts)
        found.append(LowRank(a, b, scale, experts, (rows, columns), arrange))
    return found


def inputs_first(
    names: Parameters, config: AdapterConfig, modules: Mapping[str, Mapping[str, TensorView]]
) -> dict[str, bool]:
    """Whether a module keeps its experts' matrices as inputs by outputs.

    A square matrix fits both ways; PEFT takes it as the others of its module. Where no shape tells,
    PEFT's version does: older ones took all matrices so, others ask the model's class.

    Args:
        names: Finds BASE's parameters.
        config: The adapter's configuration.
        modules: Its tensors by module and role.

    Returns:
        By module, without what PEFT wraps around it; one that is not clear is left out.
    """
    found: dict[str, set[bool]] = {}
    doubtful: dict[str, bool] = {}
    known = find_architecture(names.base.config)
    stacks = known.stacks if known is not None else {}
    for module, parts in modules.items():
        for name in candidates(module, config.target_parameters):
            parameter = names.find(name)
            if parameter is None or "a" not in parts or "b" not in parts:
                continue
            shape, rank = parameter.view.shape, config.rank_of(name)
            ways = fit(shape, parts["a"], parts["b"], rank, 1.0)
            if len(ways) == 1 and len(shape) == 3:
                found.setdefault(bare(module), set()).add(ways[0].left is parts["a"])
            if config.peft and config.peft < _ASKS_THE_CLASS:
                doubtful[bare(module)] = True
            elif config.peft and template(name) in stacks:
                doubtful[bare(module)] = bool(stacks[template(name)])
    told = {module: ways.pop() for module, ways in found.items() if len(ways) == 1}
    return {m: turned for m, turned in doubtful.items() if m not in found} | told


def bare(module: str) -> str:
    """A module without what PEFT wraps around it.

    Args:
        module: As the adapter names it.
    """
    return module.replace(".base_layer", "")


def _outputs_first(experts: int) -> Arrange:
    def arrange(b: Block, a: Block) -> tuple[Block, Block]:
        left = b.reshape(b.shape[0], -1, experts).transpose(2, 0, 1)
        return left.reshape(experts * b.shape[0], -1), a.reshape(experts, -1, a.shape[1])

    return arrange


def _inputs_first(experts: int) -> Arrange:
    def arrange(a: Block, b: Block) -> tuple[Block, Block]:
        left = a.reshape(experts, -1, a.shape[1]).transpose(0, 2, 1)
        right = np.ascontiguousarray(b.reshape(b.shape[0], -1, experts).transpose(2, 1, 0))
        return left.reshape(experts * a.shape[1], -1), right

    return arrange
