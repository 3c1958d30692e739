"""Which tensor of BASE each tensor of an adapter belongs to, and what it does there.

Every tensor of the adapter is accounted for; one that is not is an error that names it.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from weightsurgery.adapters.config import AdapterConfig, read_config
from weightsurgery.adapters.experts import candidates, fit
from weightsurgery.adapters.updates import (
    LowRank,
    Magnitude,
    Replace,
    ReplaceRows,
    Shift,
    Update,
)
from weightsurgery.anatomy import find_embedding
from weightsurgery.checkpoint import Checkpoint, TensorView
from weightsurgery.errors import FormatError, MismatchError, PolicyError, shown
from weightsurgery.kernels import Block

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
        raise FormatError("the adapter has no tensors", file=adapter.label)
    modules, plain = _sorted_out(adapter)
    wanted = [n for m in modules for n in candidates(m, config.target_parameters)]
    wanted += [f"{m}.weight" for m in modules if not candidates(m, config.target_parameters)]
    names = _Names(base, adapter, [*wanted, *plain])
    found: dict[str, list[Update]] = {}
    for name, view in plain.items():  # what is replaced is what the rest is added to
        target = _replaced(names, config, name, view)
        found.setdefault(target.name, []).append(Replace(view))
    for module, parts in modules.items():
        builder = _Module(base, adapter, config, names, module, parts, weight)
        for target_name, update in builder.updates():
            found.setdefault(target_name, []).append(update)
    if weight != 1:
        _refuse_weight(adapter, found, weight)
    return [Target(name, tuple(found[name])) for name in base if name in found]


def _sorted_out(
    adapter: Checkpoint,
) -> tuple[dict[str, dict[str, TensorView]], dict[str, TensorView]]:
    """Tensors by module and role, and those that stand for a tensor of BASE."""
    modules: dict[str, dict[str, TensorView]] = {}
    plain: dict[str, TensorView] = {}
    for name, view in adapter.items():
        if not name.startswith(_FRONT):
            raise FormatError(
                f"expected a name that begins with {_FRONT}", file=adapter.label, tensor=name
            )
        if not view.dtype.arithmetic:
            raise PolicyError(
                f"{view.dtype.name} weights in an adapter; expected floating ones",
                file=adapter.label,
                tensor=name,
            )
        bare = name[len(_FRONT) :]
        role = next((r for ending, r in _ROLES.items() if bare.endswith(ending)), "")
        if role:
            ending = next(e for e in _ROLES if bare.endswith(e))
            modules.setdefault(bare.removesuffix(ending), {})[role] = view
        else:
            plain[bare.replace(".base_layer.", ".")] = view
    return modules, plain


class _Names:
    """The adapter's names for BASE's tensors, which may differ by one prefix."""

    def __init__(self, base: Checkpoint, adapter: Checkpoint, wanted: Iterable[str]) -> None:
        self.base, self.adapter = base, adapter
        self.prefix, self.longer = _common_prefix(list(wanted), base)

    def find(self, name: str) -> str | None:
        """BASE's name, or None."""
        if name in self.base:
            return name
        if self.longer == "adapter" and name.startswith(self.prefix):
            name = name[len(self.prefix) :]
        elif self.longer == "base":
            name = self.prefix + name
        return name if name in self.base else None

    def need(self, name: str, view: TensorView) -> TensorView:
        """BASE's tensor of that name.

        Raises:
            MismatchError: BASE has none.
        """
        found = self.find(name)
        if found is None:
            raise MismatchError(
                f"BASE has no '{shown(name)}' that it could adapt",
                file=self.adapter.label,
                tensor=view.name,
                hint="is this the model that the adapter was trained on?",
            )
        return self.base[found]


def _common_prefix(wanted: list[str], base: Checkpoint) -> tuple[str, str]:
    """The prefix that finds most of the names that BASE does not have as they are."""
    votes: Counter[tuple[str, str]] = Counter()
    missing = [name for name in wanted if name not in base]
    for name in missing:
        for rest in _endings(name):
            if rest in base:
                votes[name[: -len(rest)], "adapter"] += 1
    sought = set(missing)
    for name in base:
        for rest in _endings(name):
            if rest in sought:
                votes[name[: -len(rest)], "base"] += 1
    if not votes:
        return "", ""
    return min(votes, key=lambda vote: (-votes[vote], len(vote[0]), vote))


def _endings(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[i:]) for i in range(1, len(parts)))


def _replaced(names: _Names, config: AdapterConfig, name: str, view: TensorView) -> TensorView:
    """The tensor of BASE that a whole tensor of the adapter replaces.

    Raises:
        FormatError: Nothing in the configuration says that it is replaced.
        MismatchError: BASE lacks it, or has another shape.
    """
    module = name.rpartition(".")[0]
    # A saved module's name need only end so, and what is saved may lie below it.
    paths = itertools.accumulate(module.split("."), lambda path, part: f"{path}.{part}")
    saved = any(path.endswith(one) for path in paths for one in config.modules_to_save if one)
    bias = config.bias != "none" and name.endswith(".bias")
    adapted = ".base_layer." in view.name
    if not (saved or bias or adapted):
        raise FormatError(
            "its configuration does not say what this tensor is for: neither a factor, nor a "
            "bias, nor of a module in modules_to_save",
            file=names.adapter.label,
            tensor=view.name,
        )
    target = names.need(name, view)
    if target.shape != view.shape:
        raise MismatchError(
            f"its shape is {list(view.shape)}, that of BASE's {list(target.shape)}",
            file=names.adapter.label,
            tensor=view.name,
        )
    return target


def _refuse_weight(adapter: Checkpoint, found: Mapping[str, list[Update]], weight: float) -> None:
    for name, updates in found.items():
        if not all(isinstance(update, (LowRank, Shift)) for update in updates):
            raise PolicyError(
                f"weight {weight:g}: '{shown(name)}' is replaced or rescaled by the adapter, and "
                "only what is added can be weighed or taken back",
                file=adapter.label,
                hint="apply it with weight 1",
            )


@dataclass(frozen=True)
class _Module:
    """The tensors that an adapter has for one module.

    Attributes:
        base: The model.
        adapter: The adapter.
        config: Its configuration.
        names: Finds BASE's tensors.
        module: The module's name in the adapter.
        parts: Role to tensor.
        weight: Multiplies the change.
    """

    base: Checkpoint
    adapter: Checkpoint
    config: AdapterConfig
    names: _Names
    module: str
    parts: Mapping[str, TensorView]
    weight: float

    def updates(self) -> Iterable[tuple[str, Update]]:
        """BASE's name of a tensor, and what is done to it.

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
                f"{missing} is missing beside it", file=self.adapter.label, tensor=there.name
            )
        if (magnitude is not None) != self.config.use_dora:
            lacks = "and no magnitude beside it" if magnitude is None else "but is a magnitude"
            raise FormatError(
                f"use_dora is {self.config.use_dora} {lacks}",
                file=self.adapter.label,
                tensor=(magnitude or first).name,
            )
        parameters = candidates(self.module, self.config.target_parameters)
        if parameters and magnitude is None and shift is None:
            yield self._parameter(parameters, first, second)
            return
        yield self._product(first, second, magnitude, embedding=bool(kind))
        if shift is not None:
            yield self._shift(shift)

    def _fail(self, view: TensorView, reason: str) -> MismatchError:
        return MismatchError(reason, file=self.adapter.label, tensor=view.name)

    def _scale(self) -> float:
        return self.weight * self.config.scale_of(self.module)

    def _rows(self, view: TensorView) -> tuple[str, Update]:
        target = self.names.need(f"{self.module}.weight", view)
        indices = self.config.token_indices
        last = self.module.rpartition(".")[2]
        rows = next(
            (indices[key] for key in (self.module, last) if key in indices),
            indices.get("", ()) if target.name == find_embedding(self.base) else (),
        )
        if not rows or len(target.shape) != 2 or view.shape != (len(rows), target.shape[1]):
            raise self._fail(
                view,
                f"its shape is {list(view.shape)}; expected a row for each of the {len(rows)} "
                f"trainable_token_indices of BASE's {list(target.shape)}",
            )
        if max(rows) >= target.shape[0]:
            raise self._fail(view, f"token {max(rows):,} of {target.shape[0]:,}")
        return target.name, ReplaceRows(view, rows, target.shape[1])

    def _shift(self, view: TensorView) -> tuple[str, Update]:
        if not self.config.lora_bias:
            raise FormatError(
                "lora_bias is false, but here is one", file=self.adapter.label, tensor=view.name
            )
        target = self.names.need(f"{self.module}.bias", view)
        if target.shape != view.shape:
            raise self._fail(
                view, f"its shape is {list(view.shape)}, that of BASE's {list(target.shape)}"
            )
        return target.name, Shift(view, self._scale())

    def _product(
        self, a: TensorView, b: TensorView, magnitude: TensorView | None, *, embedding: bool
    ) -> tuple[str, Update]:
        target = self.names.need(f"{self.module}.weight", a)
        transposed = embedding or (self.config.fan_in_fan_out and len(target.shape) == 2)
        self._check_rank(a, b)
        if len(target.shape) < 2 or len(a.shape) != (2 if embedding else len(target.shape)):
            raise self._fail(
                a, f"its shape is {list(a.shape)}, that of what it adapts {list(target.shape)}"
            )
        rows, columns = target.shape[0], math.prod(target.shape[1:])
        wide, tall = (b, a) if transposed else (a, b)
        have = (_lines(tall, transposed), _lines(wide, not transposed))
        if have != (rows, columns):
            groups = len(target.shape) > 2 and a.shape[1] > target.shape[1]
            raise self._fail(
                a,
                "a grouped convolution cannot hold what reaches across its groups"
                if groups
                else f"its product is {list(have)}, what it adapts {list(target.shape)}",
            )
        change = LowRank(
            left=tall,
            right=wide,
            scale=self._scale(),
            matrices=1,
            shape=(rows, columns),
            arrange=_transposed if transposed else _as_stored,
        )
        if magnitude is None:
            return target.name, change
        by_column = transposed
        if math.prod(magnitude.shape) != (columns if by_column else rows):
            raise self._fail(magnitude, f"{math.prod(magnitude.shape):,} norms; expected {have}")
        return target.name, Magnitude(change, magnitude, target, by_column)

    def _parameter(self, names: list[str], a: TensorView, b: TensorView) -> tuple[str, Update]:
        rank = self.config.rank_of(self.module)
        views = [self.names.need(name, a) for name in names]
        fits = [(v.name, one) for v in views for one in fit(v, a, b, rank, self._scale())]
        if len(fits) == 1:
            return fits[0]
        shapes = ", ".join(f"'{shown(view.name)}' {list(view.shape)}" for view in views)
        raise PolicyError(
            f"{list(a.shape)} and {list(b.shape)} fit {'none' if not fits else 'more than one way'}"
            f" of {shapes}",
            file=self.adapter.label,
            tensor=a.name,
            hint="merge it with the library that made it",
        )

    def _check_rank(self, a: TensorView, b: TensorView) -> None:
        rank = self.config.rank_of(self.module)
        if a.shape[:1] != (rank,) or math.prod(b.shape[1:]) != rank or len(b.shape) < 2:
            raise FormatError(
                f"rank {rank} by its configuration; lora_A is {list(a.shape)}, lora_B "
                f"{list(b.shape)}",
                file=self.adapter.label,
                tensor=a.name,
            )


def _lines(view: TensorView, second: bool) -> int:
    """What a factor has besides its rank: B's first dimension, or all but A's first."""
    return math.prod(view.shape[1:]) if second else view.shape[0]


def _as_stored(b: Block, a: Block) -> tuple[Block, Block]:
    return b.reshape(b.shape[0], -1), a.reshape(1, a.shape[0], -1)


def _transposed(a: Block, b: Block) -> tuple[Block, Block]:
    return a.T, np.ascontiguousarray(b.T)[np.newaxis]
