"""Adapters of a parameter itself, such as the fused matrices of a layer's experts.

PEFT names them by the module that has the parameter, and nests them where it has several; which
pair of factors belongs to which parameter only their shapes tell. Where those leave a doubt, the
adapter is refused.

transformers fuses the experts of many models when it loads them: on disk there are as many matrices
as experts, or twice as many. Their names tell how they are stacked.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from weightsurgery.adapters.names import Names
from weightsurgery.adapters.updates import LowRank, LowRankRows, Update
from weightsurgery.checkpoint import TensorView
from weightsurgery.kernels import Block

Arrange = Callable[[Block, Block], tuple[Block, Block]]


def candidates(module: str, parameters: Sequence[str]) -> list[str]:
    """Full names of the parameters that a module's factors may belong to.

    Args:
        module: As the adapter names it.
        parameters: target_parameters of its configuration.
    """
    bare = module.replace(".base_layer", "")
    names = [f"{bare}.{one.rpartition('.')[2]}" for one in parameters]
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


# What a fused parameter is stacked of, expert by expert and one above the other: the names that
# most models have, and Mixtral's.
_STACKED = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}


@dataclass(frozen=True)
class Stack:
    """A parameter of the model in memory, and the tensors of BASE that it is made of.

    Attributes:
        name: The parameter's.
        shape: Its shape.
        parts: BASE's tensors, each with its expert and its first row there; none, where BASE
            stores the parameter as it is.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[TensorView, int, int], ...] = ()

    def updates(self, change: LowRank) -> list[tuple[str, Update]]:
        """The change of each tensor of BASE, by its name.

        Args:
            change: Of the parameter.
        """
        if not self.parts:
            return [(self.name, change)]
        return [
            (view.name, LowRankRows(change, expert, first, view.shape[0]))
            for view, expert, first in self.parts
        ]


def find_stack(names: Names, name: str) -> Stack | None:
    """The parameter in BASE: stored as it is, or one matrix for each expert; None if neither.

    Args:
        names: Finds BASE's tensors.
        name: The parameter's, as the adapter gives it.
    """
    found = names.find(name)
    if found is not None:
        return Stack(found, names.base[found].shape)
    parent, _, last = name.rpartition(".")
    for kinds in _STACKED.get(last, ()):
        parts: list[tuple[TensorView, int, int]] = []
        for expert in itertools.count():
            stored = [names.find(f"{parent}.{expert}.{kind}.weight") for kind in kinds]
            views = [names.base[one] for one in stored if one is not None]
            if len(views) < len(kinds) or len({view.shape for view in views}) > 1:
                break
            parts += [(view, expert, i * view.shape[0]) for i, view in enumerate(views)]
        shapes = {view.shape for view, _, _ in parts}
        if len(shapes) == 1 and len(shape := shapes.pop()) == 2:
            experts = len(parts) // len(kinds)
            return Stack(name, (experts, len(kinds) * shape[0], shape[1]), tuple(parts))
    return None


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
