"""Modules that run one example at a time while the model around them runs in batches.

What no hook covers, such as fused experts and the parameters of a state-space mixer itself, is
left to autograd. Each example gets an alias of the parameter: a tensor of its own on the same
memory, so that its gradient is that example's alone. It is added to the sums and freed as soon as
the backward pass has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from weightsurgery.curvature.factors import Sums

if TYPE_CHECKING:
    import torch

Place = tuple[int | str, ...]


@dataclass(eq=False)
class Unit:
    """A module that runs one example at a time.

    Attributes:
        module: The module.
        has_rows: For each tensor among its arguments, whether it has rows for every example.
            The first batch decides, so that a later batch whose size happens to be that of
            another dimension is not misread.
    """

    module: Any
    has_rows: dict[Place, bool] = field(default_factory=dict)


class MisfitError(Exception):
    """A module cannot be run one example at a time."""


class Splitter:
    """Runs units one example at a time while it is entered.

    Args:
        units: The unit of each parameter, by the parameter's id.
        sums: Where to add, by the parameter's id.
    """

    def __init__(self, units: Mapping[int, Unit], sums: Mapping[int, Sums]) -> None:
        self.unfit: set[int] = set()
        self._sums = sums
        self._units = units
        self._count, self._length = 0, 0
        self._example: int | None = None
        self._aliases: dict[tuple[int, int], torch.Tensor] = {}
        self._replaced: list[tuple[Any, Any]] = []

    @property
    def is_inside(self) -> bool:
        """True while a unit runs on one example."""
        return self._example is not None

    def __enter__(self) -> Splitter:
        for unit in dict.fromkeys(self._units.values()):
            wanted = [
                (module, name, parameter)
                for module in unit.module.modules()
                for name, parameter in module.named_parameters(recurse=False)
                if self._units.get(id(parameter)) is unit
            ]
            own = unit.module.__dict__.get("forward")
            self._replaced.append((unit.module, own))
            unit.module.forward = partial(self._run, unit, wanted, unit.module.forward)
        return self

    def __exit__(self, *_: object) -> None:
        for module, own in reversed(self._replaced):
            if own is None:
                del module.forward
            else:
                module.forward = own
        self._replaced.clear()
        self.begin(0, 0)

    def begin(self, count: int, length: int) -> None:
        """Say how many examples the next batch has, of how many tokens."""
        self._count, self._length = count, length
        self._aliases.clear()

    def _run(
        self,
        unit: Unit,
        wanted: Sequence[tuple[Any, str, Any]],
        forward: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        import torch

        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if self._example is not None:  # inside another unit
            with self._swapped(wanted):
                return forward(*args, **kwargs)
        outputs = []
        try:
            for n in range(self._count):
                self._example = n
                some, named = self._part(unit, args, (0,)), self._part(unit, kwargs, (1,))
                if self._count > 1 and not any(unit.has_rows.values()):
                    raise MisfitError
                with self._swapped(wanted):
                    outputs.append(forward(*some, **named))
            self._example = None
            return _joined(outputs)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever it was: the whole batch shows whether it was the split
            self.unfit.update(id(parameter) for _, _, parameter in wanted)
            self._example = None
            return forward(*args, **kwargs)
        finally:
            self._example = None

    @contextmanager
    def _swapped(self, wanted: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
        """Let the modules compute with this example's aliases."""
        for module, name, parameter in wanted:
            module._parameters[name] = self._alias(parameter)
        try:
            yield
        finally:
            for module, name, parameter in wanted:
                module._parameters[name] = parameter

    def _alias(self, parameter: Any) -> torch.Tensor:
        key = id(parameter), self._example or 0
        if key not in self._aliases:
            alias = parameter.detach().requires_grad_()
            alias.register_post_accumulate_grad_hook(partial(self._add, id(parameter)))
            self._aliases[key] = alias
        return self._aliases[key]

    def _add(self, key: int, alias: torch.Tensor) -> None:
        if alias.grad is not None:
            self._sums[key].add(alias.grad)
            alias.grad = None

    def _part(self, unit: Unit, value: Any, place: Place) -> Any:
        """What belongs to the example."""
        import torch

        if isinstance(value, torch.Tensor):
            return self._rows(unit, value, place) if value.dim() else value
        if type(value) in (tuple, list):
            return type(value)(self._part(unit, one, (*place, i)) for i, one in enumerate(value))
        if type(value) is dict:
            return {name: self._part(unit, one, (*place, name)) for name, one in value.items()}
        return value

    def _rows(self, unit: Unit, value: torch.Tensor, place: Place) -> torch.Tensor:
        """An example's rows of a tensor (B, ...) or (B·T, ...); other tensors as they are."""
        fits = len(value) in (self._count, self._count * self._length)
        if not unit.has_rows.setdefault(place, fits and self._count > 1):
            return value
        if not fits:
            raise MisfitError
        step, n = len(value) // self._count, self._example or 0
        return value[n * step : (n + 1) * step]


def _joined(outputs: Sequence[Any]) -> Any:
    """The examples' outputs as one batch's."""
    import torch

    first = outputs[0]
    if len(outputs) == 1 or first is None:
        return first
    if isinstance(first, torch.Tensor):
        return torch.cat(list(outputs))
    if isinstance(first, dict):  # transformers' outputs too
        return type(first)(**{name: _joined([one[name] for one in outputs]) for name in first})
    if type(first) in (tuple, list):
        return type(first)(_joined(some) for some in zip(*outputs, strict=True))
    raise MisfitError
