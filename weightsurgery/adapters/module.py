"""What the tensors that an adapter has for one module do to BASE's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from weightsurgery.adapters.config import AdapterConfig
from weightsurgery.adapters.experts import bare, candidates, fit
from weightsurgery.adapters.missing import WRONG_MODEL
from weightsurgery.adapters.parameters import Parameter, Parameters
from weightsurgery.adapters.updates import LowRank, Magnitude, ReplaceRows, Shift, Update
from weightsurgery.checkpoint import Checkpoint, TensorView
from weightsurgery.errors import FormatError, MismatchError, PolicyError, shown
from weightsurgery.kernels import Block
from weightsurgery.ties import is_output_head


@dataclass(frozen=True)
class Module:
    """The tensors that an adapter has for one module.

    Attributes:
        base: The model.
        adapter: The adapter.
        config: Its configuration.
        names: Finds BASE's parameters.
        module: The module's name in the adapter.
        parts: Role to tensor.
        weight: Multiplies the change.
        contradicted: The shapes of some matrices deny what the configuration says of all.
        turned: From `inputs_first`.
    """

    base: Checkpoint
    adapter: Checkpoint
    config: AdapterConfig
    names: Parameters
    module: str
    parts: Mapping[str, TensorView]
    weight: float
    contradicted: bool
    turned: Mapping[str, bool]

    def updates(self) -> Iterable[tuple[Parameter, Update]]:
        """A parameter of BASE, and what is done to it.

        Raises:
            FormatError: A tensor is missing, or contradicts the configuration.
        """
        parts = dict(self.parts)
        rows = parts.pop("rows", None)
        if rows is not None:
            yield self._rows(rows)
        if not parts:
            return
        kind = "embedding " if "embedding a" in parts or "embedding b" in parts else ""
        first, second = (parts.pop(f"{kind}{role}", None) for role in "ab")
        shift, magnitude = (parts.pop(role, None) for role in ("shift", "magnitude"))
        if first is None or second is None or parts:
            there = next(iter(self.parts.values()))
            missing = "lora_A" if first is None else "lora_B" if second is None else "a pair"
            raise FormatError(
                f"{missing} is missing beside it",
                file=self.adapter.label,
                tensor=there.name,
                code="E-ADAPTER-FACTOR",
            )
        if (magnitude is not None) != self.config.use_dora:
            lacks = "and no magnitude beside it" if magnitude is None else "but is a magnitude"
            raise FormatError(
                f"use_dora is {self.config.use_dora} {lacks}",
                file=self.adapter.label,
                tensor=(magnitude or first).name,
                code="E-ADAPTER-CONTRADICTION",
            )
        parameters = self._parameters()
        if parameters and magnitude is None and shift is None:
            yield self._parameter(parameters, first, second)
            return
        yield self._product(first, second, magnitude, embedding=bool(kind))
        if shift is not None:
            yield self._shift(shift)

    def _fail(self, view: TensorView, reason: str, hint: str = "") -> MismatchError:
        return MismatchError(
            reason, file=self.adapter.label, tensor=view.name, hint=hint, code="E-ADAPTER-SHAPE"
        )

    def _scale(self, adapted: str) -> float:
        return self.weight * self.config.scale_of(adapted)

    def _rows(self, view: TensorView) -> tuple[Parameter, Update]:
        parameter = self.names.need(f"{self.module}.weight", view)
        target = parameter.view
        indices = self.config.token_indices
        last = self.module.rpartition(".")[2]
        # PEFT names the tokens once, also where it wraps the head that is tied to the embedding.
        only = next(iter(indices.values())) if len(indices) == 1 else ()
        rows = next((indices[key] for key in (self.module, last) if key in indices), only)
        if not rows or len(target.shape) != 2 or view.shape != (len(rows), target.shape[1]):
            raise self._fail(
                view,
                f"its shape is {list(view.shape)}; expected a row for each of the {len(rows)} "
                f"trainable_token_indices of BASE's {list(target.shape)}",
            )
        if max(rows) >= target.shape[0]:
            raise MismatchError(
                f"it trained token {max(rows):,}, but BASE has {target.shape[0]:,} tokens",
                file=self.adapter.label,
                tensor=view.name,
                hint="save the resized base model and give it as BASE",
                code="E-ADAPTER-VOCABULARY",
            )
        return parameter, ReplaceRows(view, rows, target.shape[1])

    def _shift(self, view: TensorView) -> tuple[Parameter, Update]:
        if not self.config.lora_bias:
            raise FormatError(
                "lora_bias is false, but here is one",
                file=self.adapter.label,
                tensor=view.name,
                code="E-ADAPTER-CONTRADICTION",
            )
        parameter = self.names.need(f"{self.module}.bias", view)
        target = parameter.view
        if target.shape != view.shape:
            raise self._fail(
                view, f"its shape is {list(view.shape)}, that of BASE's {list(target.shape)}"
            )
        return parameter, Shift(view, self._scale(self.module))

    def _product(
        self, a: TensorView, b: TensorView, magnitude: TensorView | None, *, embedding: bool
    ) -> tuple[Parameter, Update]:
        parameter = self.names.need(f"{self.module}.weight", a)
        target = parameter.view
        if _is_grouped(target, a, b):
            reason = "a grouped convolution cannot hold what reaches across its groups"
            raise self._fail(a, reason)
        self._check_rank(a, b)
        transposed = embedding or self._is_transposed(target, a, b)
        if len(target.shape) < 2 or len(a.shape) != (2 if embedding else len(target.shape)):
            raise self._fail(
                a, f"its shape is {list(a.shape)}, that of what it adapts {list(target.shape)}"
            )
        rows, columns = target.shape[0], math.prod(target.shape[1:])
        wide, tall = (b, a) if transposed else (a, b)
        have = (_lines(tall, transposed), _lines(wide, not transposed))
        if have != (rows, columns):
            reason = f"its product is {list(have)}, BASE's '{target.name}' {list(target.shape)}"
            raise self._fail(a, reason, "" if self.names.some_fit else WRONG_MODEL)
        change = LowRank(
            left=tall,
            right=wide,
            scale=self._scale(self.module),
            matrices=1,
            shape=(rows, columns),
            arrange=_transposed if transposed else _as_stored,
        )
        if magnitude is None:
            return parameter, change
        by_column = transposed
        if math.prod(magnitude.shape) != (columns if by_column else rows):
            raise self._fail(magnitude, f"{math.prod(magnitude.shape):,} norms; expected {have}")
        return parameter, Magnitude(change, magnitude, target, by_column)

    def _is_transposed(self, target: TensorView, a: TensorView, b: TensorView) -> bool:
        """True if BASE stores a matrix of inputs by outputs, as GPT-2's Conv1D does.

        The shapes tell; those of a square one's neighbours, where it is square. PEFT's word for it
        counts last: one word for all, and where both kinds are adapted, that of the last one.
        """
        if len(target.shape) != 2 or is_output_head(target.name):
            return False
        told = seen_transposed(target, a, b)
        if told is None:
            told = _neighbours_transposed(self.base, target.name)
        if told is None and self.contradicted:
            raise PolicyError(
                "some of the adapter's matrices are stored transposed and some are not; of this "
                "square one nobody can tell",
                file=self.adapter.label,
                tensor=a.name,
                hint="merge it with the library that made it",
                code="E-ADAPTER-UNCLEAR",
            )
        return self.config.fan_in_fan_out if told is None else told

    def _parameters(self) -> list[str]:
        """The parameters of the module that are adapted; none of a module with a weight of its own.

        What the configuration names without a module could be any module's.
        """
        names = candidates(self.module, self.config.target_parameters)
        if self.names.find(f"{self.module}.weight") is None:
            return names
        return [name for name in names if self.names.find(name)]

    def _parameter(
        self, names: list[str], a: TensorView, b: TensorView
    ) -> tuple[Parameter, Update]:
        found = [(name, one) for name in names if (one := self.names.find(name))]
        if not found:
            self.names.need(names[0], a)
        rank_of, scale_of = self.config.rank_of, self._scale
        # Patterns are matched with the parameter's own name, not with its module's.
        fits = [
            (one, change)
            for name, one in found
            for change in fit(one.view.shape, a, b, rank_of(name), scale_of(name))
        ]
        turned = self.turned.get(bare(self.module))
        if len(fits) > 1 and turned is not None:
            fits = [(one, way) for one, way in fits if (way.left is a) == turned]
        if len(fits) == 1:
            return fits[0]
        shapes = ", ".join(f"'{shown(name)}' {list(one.view.shape)}" for name, one in found)
        raise PolicyError(
            f"{list(a.shape)} and {list(b.shape)} fit {'none' if not fits else 'more than one way'}"
            f" of {shapes}",
            file=self.adapter.label,
            tensor=a.name,
            hint="merge it with the library that made it",
            code="E-ADAPTER-UNCLEAR",
        )

    def _check_rank(self, a: TensorView, b: TensorView) -> None:
        rank = self.config.rank_of(self.module)
        if a.shape[:1] != (rank,) or math.prod(b.shape[1:]) != rank or len(b.shape) < 2:
            raise FormatError(
                f"rank {rank} by its configuration; lora_A is {list(a.shape)}, lora_B "
                f"{list(b.shape)}",
                file=self.adapter.label,
                tensor=a.name,
                code="E-ADAPTER-RANK",
            )


def _is_grouped(target: TensorView, a: TensorView, b: TensorView) -> bool:
    """Whether a convolution has groups: then B's columns are those of one, or A's of all."""
    if len(target.shape) < 3 or not len(a.shape) == len(b.shape) == len(target.shape):
        return False
    one_group = 0 < b.shape[1] < a.shape[0] and a.shape[0] % b.shape[1] == 0
    return one_group or a.shape[1] > target.shape[1]


def _lines(view: TensorView, second: bool) -> int:
    """What a factor has besides its rank: B's first dimension, or all but A's first."""
    return math.prod(view.shape[1:]) if second else view.shape[0]


def _as_stored(b: Block, a: Block) -> tuple[Block, Block]:
    return b.reshape(b.shape[0], -1), a.reshape(1, a.shape[0], -1)


def _transposed(a: Block, b: Block) -> tuple[Block, Block]:
    return a.T, np.ascontiguousarray(b.T)[np.newaxis]


def seen_transposed(target: TensorView, a: TensorView, b: TensorView) -> bool | None:
    """Whether a matrix is stored transposed, as far as the shapes of its factors tell.

    Args:
        target: What is adapted.
        a: Shape (rank, inputs).
        b: Shape (outputs, rank).

    Returns:
        None where they fit both ways, or neither.
    """
    if not len(target.shape) == len(a.shape) == len(b.shape) == 2:
        return None
    lines, shape = (b.shape[0], a.shape[1]), target.shape
    return None if shape[0] == shape[1] or lines not in (shape, shape[::-1]) else lines != shape


_CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")


def _neighbours_transposed(base: Checkpoint, name: str) -> bool | None:
    """The same of a layer of the names that GPT-2 gives, by the wider ones beside it."""
    path, _, last = name.removesuffix(".weight").rpartition(".")
    beside = [f"{path}.{one}.weight" for one in ("c_attn", "c_fc")] if last in _CONV1D else []
    for one in beside:
        if one in base and len(base[one].shape) == 2 and base[one].shape[0] != base[one].shape[1]:
            return base[one].shape[1] > base[one].shape[0]
    return None
