"""Which way each parameter's squared gradients are computed: the fastest that agrees with autograd.

A way is tried on the longest and the shortest example and compared with what autograd gives for
each alone. Gradients are compared a group of parameters at a time, so that this needs little
memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightsurgery.curvature.factors import Sums, kind_of_module
from weightsurgery.curvature.losses import Batch, Objective
from weightsurgery.curvature.per_example import Paths, Recorder, add_by_autograd, zeros
from weightsurgery.curvature.result import HOOKS, LOOP, SPLIT
from weightsurgery.curvature.splits import Unit
from weightsurgery.datasets.batches import Encoded, longest_first

_TOLERANCE = 1e-4  # of a tensor's norm, between hooks and autograd
_ROUNDING = 1e-5  # a gradient this small beside the numbers it is a sum of is nothing but rounding
_NOTHING = 3e-8  # of the largest gradient: rounding, where a module is run alone
_GROUP = 1 << 24  # elements of the gradients that are compared at a time, or more: an eighth of all


def find_paths(objective: Objective, examples: Sequence[Encoded], *, batch_size: int) -> Paths:
    """Find a way for every parameter.

    Hooks are tried first, then modules that run one example at a time: the one that holds the
    parameter, then the one around that, and so on. Where a parameter is left to the loop all the
    same, which runs the whole model one example at a time, no module has to.

    Args:
        objective: The loss; its model must be `frozen`.
        examples: The examples.
        batch_size: Examples in a batch; with 1 only one example is compared.
    """
    names = objective.model.names
    order = longest_first(examples)
    order = [order[0], *order[-1:]][: min(batch_size, len(examples))]
    trial = _Trial(objective, examples, order)
    around = _modules_around(objective.model.module)
    covered = [
        name
        for name in names
        if any(kind_of_module(chain[0]) for chain in around.get(id(names[name]), ()) if chain)
    ]
    hooked = trial.agreeing(covered, {})
    paths = Paths({name: HOOKS if name in hooked else LOOP for name in names})
    units = _find_units(trial, [name for name in names if name not in hooked], around)
    inner = _inside(units, hooked, names)
    units |= inner
    if all(name in hooked or name in units for name in names) and inner.keys() <= trial.agreeing(
        list(inner), units
    ):
        paths.units.update(units)
        paths.ways.update(dict.fromkeys(units, SPLIT))
    return paths


@dataclass
class _Trial:
    """The examples that ways are compared on.

    Attributes:
        objective: The loss.
        examples: All examples.
        order: The places of the longest and the shortest.
        largest: The largest norm of a parameter's squared gradients so far.
    """

    objective: Objective
    examples: Sequence[Encoded]
    order: Sequence[int]
    largest: float = 0.0

    def agreeing(self, chosen: Sequence[str], units: Mapping[str, Unit]) -> set[str]:
        """The names for which hooks, or the units given for them, agree with autograd."""
        names = self.objective.model.names
        found: set[str] = set()
        for group in _groups(chosen, names):
            found.update(self._compare(group, {n: units[n] for n in group if n in units}))
        return found

    def _compare(self, group: Sequence[str], units: Mapping[str, Unit]) -> Iterator[str]:
        truth = zeros(self.objective.model.names, group)
        for batch in self.objective.batches(self.examples, 1, self.order):
            add_by_autograd(self.objective, batch, truth)
        (batch,) = self.objective.batches(self.examples, len(self.order), self.order)
        found, unfit = self._record(batch, group, units=units)
        errors = {name: (found[name].squares - truth[name].squares).norm() for name in group}
        norms = {name: truth[name].squares.norm() for name in group}
        self.largest = max(self.largest, *map(float, norms.values()))
        bounds = {
            name: _TOLERANCE * norm + (_NOTHING**2 * self.largest if name in units else 0.0)
            for name, norm in norms.items()
        }
        doubtful = [name for name in group if not errors[name] <= bounds[name]]  # NaN is doubtful
        if doubtful:  # where terms cancel, the rest is rounding: a key's bias has no gradient
            sizes, _ = self._record(batch, doubtful, absolute=True)
            for name in doubtful:
                bounds[name] += _ROUNDING**2 * sizes[name].squares.norm()
        for name in group:
            if errors[name] <= bounds[name] and name not in unfit:
                yield name

    def _record(
        self,
        batch: Batch,
        group: Sequence[str],
        *,
        absolute: bool = False,
        units: Mapping[str, Unit] | None = None,
    ) -> tuple[dict[str, Sums], set[str]]:
        """What is found for one batch, and the names for which nothing can be."""
        names = self.objective.model.names
        sums = zeros(names, group)
        keyed = {id(names[name]): one for name, one in sums.items()}
        by_id = {id(names[name]): unit for name, unit in (units or {}).items()}
        module = self.objective.model.module
        with Recorder(module, keyed, absolute=absolute, units=by_id) as recorder:
            try:
                recorder.add(self.objective, batch)
            except Exception:
                if not by_id:
                    raise
                return sums, set(group)  # the modules around a unit cannot use what it returned
        return sums, {name for name in group if id(names[name]) in recorder.unfit}


def _groups(chosen: Sequence[str], names: Mapping[str, Any]) -> Iterator[list[str]]:
    most = max(_GROUP, sum(names[name].numel() for name in chosen) // 8)
    group: list[str] = []
    size = 0
    for name in chosen:
        if group and size + names[name].numel() > most:
            yield group
            group, size = [], 0
        group.append(name)
        size += names[name].numel()
    if group:
        yield group


def _modules_around(root: Any) -> dict[int, list[list[Any]]]:
    """For each parameter's id and each of its names, the modules around it, innermost first.

    The model itself and lists of modules, which cannot be called, are left out.
    """
    from torch.nn import Module

    found: dict[int, list[list[Any]]] = {}
    modules = dict(root.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        parts = path.split(".")
        chain = [modules[".".join(parts[:n])] for n in range(len(parts), 0, -1)] if path else []
        called = [one for one in chain if type(one).forward is not Module.forward]
        for parameter in module.parameters(recurse=False):
            found.setdefault(id(parameter), []).append(called)
    return found


def _find_units(
    trial: _Trial, pending: Sequence[str], around: Mapping[int, list[list[Any]]]
) -> dict[str, Unit]:
    """The innermost module for each name with which autograd gives what it gives one by one."""
    names = trial.objective.model.names
    units: dict[str, Unit] = {}
    level = 0
    while pending:
        made: dict[int, Unit] = {}
        tried = {}
        for name in pending:
            chains = around.get(id(names[name]), [[]])
            if len(chains[0]) <= level:
                return {}  # the loop is needed for it, and then serves the others too
            module = chains[0][level]
            tried[name] = made.setdefault(id(module), Unit(module))
        agreeing = trial.agreeing(list(tried), tried)
        units |= {name: tried[name] for name in tried if name in agreeing}
        pending = [name for name in pending if name not in agreeing]
        level += 1
    return units


def _inside(
    units: Mapping[str, Unit], hooked: Collection[str], names: Mapping[str, Any]
) -> dict[str, Unit]:
    """Units for the parameters with hooks that lie in a unit, where hooks see no batches."""
    unit_of: dict[int, Unit] = {}
    for unit in dict.fromkeys(units.values()):
        for parameter in unit.module.parameters():
            unit_of.setdefault(id(parameter), unit)
    return {name: unit_of[id(names[name])] for name in hooked if id(names[name]) in unit_of}
