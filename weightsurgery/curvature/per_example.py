"""Sums over examples of squared per-example gradients, from one backward pass of each batch.

No parameter asks autograd for its gradient. Hooks on the modules see each layer's input and the
gradient of its output, and `factors` makes of these what autograd would have made one example at
a time. What no hook covers is left to autograd, in a module that runs one example at a time while
the rest of the model runs in batches (`splits`). What does not agree with autograd on the first
examples either way (`paths`) goes a slower way: the whole model, one example at a time. So every
parameter is covered, and exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from weightsurgery.curvature.factors import (
    Call,
    Factors,
    Sums,
    add_powers,
    factors_of,
    fits,
)
from weightsurgery.curvature.losses import Batch, Objective
from weightsurgery.curvature.result import HOOKS, LOOP
from weightsurgery.curvature.splits import Splitter, Unit
from weightsurgery.datasets.batches import Encoded, longest_first

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Paths:
    """How each parameter's squares are computed.

    Attributes:
        ways: Name to `HOOKS`, `SPLIT` or `LOOP`.
        units: The module that runs one example at a time for each name that is `SPLIT`.
    """

    ways: dict[str, str]
    units: dict[str, Unit] = field(default_factory=dict)

    def give_up(self, names: Iterable[str]) -> None:
        """Leave parameters to the loop."""
        for name in names:
            self.ways[name] = LOOP
            self.units.pop(name, None)


class Recorder:
    """Hooks on a model: while it is entered, a backward pass adds to the sums.

    Args:
        module: The model.
        sums: For each parameter wanted, by its id.
        absolute: Sum the sizes of all terms: how large rounding may get.
        units: The module to run one example at a time for a parameter, by the parameter's id.
    """

    def __init__(
        self,
        module: Any,
        sums: Mapping[int, Sums],
        *,
        absolute: bool = False,
        units: Mapping[int, Unit] | None = None,
    ) -> None:
        self._splitter = Splitter(units or {}, sums)
        self.unfit = self._splitter.unfit
        self._sums = {key: one for key, one in sums.items() if key not in (units or {})}
        self._length = 0
        self._absolute = absolute
        self._module = module
        self._handles: list[Any] = []
        self._count = 0
        self._uses: dict[int, int] = {}
        self._waiting: dict[int, list[Factors]] = {}
        self._memory: torch.Tensor | None = None

    def __enter__(self) -> Recorder:
        self._splitter.__enter__()
        for module in self._module.modules():
            own = [
                (name, parameter)
                for name, parameter in module.named_parameters(recurse=False)
                if id(parameter) in self._sums
            ]
            if own:
                hook = partial(self._forward, own)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._splitter.__exit__()

    def add(self, objective: Objective, batch: Batch) -> None:
        """Run one batch forward and backward."""
        self._count, self._length = len(batch), batch.inputs["input_ids"].shape[1]
        self._splitter.begin(self._count, self._length)
        self._uses = dict.fromkeys(self._sums, 0)
        loss = objective.losses(batch).sum()  # each example's own: the sum keeps them apart
        if loss.requires_grad:
            loss.backward()
        for key in list(self._waiting):  # a use that the loss does not depend on never came
            self._finish(key)

    def _forward(
        self, own: list[tuple[str, Any]], module: Any, args: Any, kwargs: Any, output: Any
    ) -> Any:
        import torch

        if not torch.is_grad_enabled():  # also where `_backward` calls a norm once more
            return None
        inputs = tuple(map(_detached, args))
        call = Call(module, inputs, {k: _detached(v) for k, v in kwargs.items()})
        wanted = []
        for name, parameter in own:
            is_alone = self._splitter.is_inside  # and what it is called with is one example's
            if not is_alone and fits(module, name, call, output, self._count, self._length):
                self._uses[id(parameter)] += 1
                wanted.append((name, id(parameter)))
            else:
                self.unfit.add(id(parameter))
        if not wanted:
            return None
        if not output.requires_grad:  # where the graph begins
            if len(output) != self._count:  # positions: one row that all examples share
                output = output.expand(self._count, *output.shape[1:])
            leaf = output.clone().requires_grad_()
            output = leaf.clone()  # the model may write into what it gets, but not into a leaf
        output.register_hook(partial(self._backward, wanted, [call]))
        return output

    def _backward(
        self, wanted: list[tuple[str, int]], calls: list[Call], gradient: torch.Tensor
    ) -> None:
        call = calls.pop()  # what it holds is not needed any more
        for name, key in wanted:
            factors = factors_of(call, name, gradient, self._count)
            if self._absolute:
                factors = factors.absolute()
            waiting = self._waiting.setdefault(key, [])
            waiting.append(factors)
            if len(waiting) == self._uses[key]:
                self._finish(key)

    def _finish(self, key: int) -> None:
        add_powers(self._waiting.pop(key), self._sums[key], self._scratch)

    def _scratch(self, size: int) -> torch.Tensor:
        if self._memory is None or self._memory.numel() < size:
            reference = next(iter(self._sums.values())).squares
            self._memory = None  # freed before the larger one is made
            self._memory = reference.new_empty(size)
        return self._memory[:size]


def _detached(value: Any) -> Any:
    import torch

    return value.detach() if isinstance(value, torch.Tensor) else value


@contextmanager
def frozen(module: Any) -> Iterator[None]:
    """A model in evaluation mode that keeps no gradients; everything is put back at the end."""
    import torch

    training = {inner: inner.training for inner in module.modules()}
    asked = {parameter: parameter.requires_grad for parameter in module.parameters()}
    module.eval()
    module.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for inner, mode in training.items():
            inner.training = mode
        for parameter, wanted in asked.items():
            parameter.requires_grad_(wanted)


@contextmanager
def asking(parameters: Sequence[Any]) -> Iterator[None]:
    """Let autograd compute the gradients of some parameters."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def add_squares(
    objective: Objective,
    examples: Sequence[Encoded],
    sums: Mapping[str, Sums],
    paths: Paths,
    *,
    batch_size: int,
    report: Callable[[str, int], None],
) -> set[str]:
    """Add every example's squared gradients to the sums, each parameter by its path.

    Args:
        objective: The loss; its model must be `frozen`.
        examples: The examples; order and batches change the result by rounding alone.
        sums: Name to where its powers are added.
        paths: From `find_paths`.
        batch_size: Examples in a batch.
        report: Called as report(path, examples done).

    Returns:
        Names that the hooks could not cover after all; what was added for them is worth nothing.
    """
    names = objective.model.names
    hooked = {id(names[name]): sums[name] for name in sums if paths.ways[name] != LOOP}
    if hooked:
        done = 0
        units = {id(names[name]): unit for name, unit in paths.units.items()}
        with Recorder(objective.model.module, hooked, units=units) as recorder:
            order = longest_first(examples)
            for batch in objective.batches(examples, batch_size, order):
                recorder.add(objective, batch)
                if recorder.unfit:
                    return {name for name in sums if id(names[name]) in recorder.unfit}
                done += len(batch)
                report(HOOKS, done)
    slow = [name for name in sums if paths.ways[name] == LOOP]
    for done, batch in enumerate(objective.batches(examples, 1) if slow else (), 1):
        add_by_autograd(objective, batch, {name: sums[name] for name in slow})
        report(LOOP, done)
    return set()


def add_by_autograd(objective: Objective, batch: Batch, sums: Mapping[str, Sums]) -> None:
    """Add the powers of one example's gradient, as autograd computes it."""
    import torch

    parameters = [objective.model.names[name] for name in sums]
    with asking(parameters):
        loss = objective.losses(batch).sum()
        if not loss.requires_grad:  # it depends on none of them
            return
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
    for one, gradient in zip(sums.values(), found, strict=True):
        if gradient is not None:  # `add` may overwrite it, and autograd may have it twice
            one.add(gradient if one.fourths is None else gradient.clone())


def zeros(
    names: Mapping[str, Any], chosen: Sequence[str], *, fourths: bool = False
) -> dict[str, Sums]:
    """Empty sums of parameters' shapes."""
    import torch

    def empty(parameter: Any) -> torch.Tensor:
        return torch.zeros_like(parameter, requires_grad=False)

    return {
        name: Sums(empty(names[name]), empty(names[name]) if fourths else None) for name in chosen
    }
