"""Updates that are exactly zero: of an adapter that was never trained, or not where it says."""

from __future__ import annotations

from collections.abc import Sequence

from weightsurgery.adapters.contents import module_of
from weightsurgery.adapters.layout import Target
from weightsurgery.adapters.linked import parts_of
from weightsurgery.adapters.updates import Shift, Update, is_added
from weightsurgery.checkpoint import Checkpoint, TensorView
from weightsurgery.errors import counted, shown


def scale_of(update: Update) -> float:
    """What an update is multiplied by; 1 where it is none that is added.

    Args:
        update: Of a tensor.
    """
    return max((float(getattr(part, "scale", 1.0)) for part in parts_of(update)), key=abs)


def warn_of_zeros(adapter: Checkpoint, targets: Sequence[Target]) -> list[str]:
    """A warning if what an adapter adds to some modules is exactly zero.

    A product is taken for zero where one of its factors is. Factors are read until a block is not
    zero. What a scale of 0 makes zero is not counted, nor what replaces or rescales: only BASE's
    weights could tell whether that changes anything.

    Args:
        adapter: From `open_checkpoint`.
        targets: What it does to BASE.
    """
    still: dict[str, bool] = {}
    looked_at: dict[tuple[str, ...], bool] = {}
    others = False
    updates = (update for target in targets for update in target.updates)
    for update in (part for whole in updates for part in parts_of(whole)):
        if not is_added(update) or scale_of(update) == 0:
            others = True
            continue
        if update.sources not in looked_at:
            looked_at[update.sources] = _is_zero(adapter, update)
        module = module_of(update.sources[0])
        still[module] = still.get(module, True) and looked_at[update.sources]
    zero = [module for module, is_zero in still.items() if is_zero]
    if not zero:
        return []
    those = f"{len(zero):,} of {counted(len(still), 'module')}"
    what = f"what it adds to {those} is exactly zero, first '{shown(zero[0])}'"
    if len(zero) == len(still) and not others:
        what = f"the whole adapter changes nothing: {what}"
    return [f"{shown(adapter.label)}: {what}; was it trained?"]


def _is_zero(adapter: Checkpoint, update: Update) -> bool:
    """True if one of the factors is all zeros, or the vector that is added."""
    views = [adapter[name] for name in update.sources]
    return (all if isinstance(update, Shift) else any)(_all_zero(view) for view in views)


def _all_zero(view: TensorView) -> bool:
    return not any(view.read(start, stop).any() for start, stop in view.blocks())
