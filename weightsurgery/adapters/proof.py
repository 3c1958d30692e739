"""Proof of a merge: is MERGED what BASE and its adapters give, and nothing else?

The check does not trust whoever merged. Each tensor is computed again and compared element by
element, within what rounding explains; what does not fit is described: nothing was added, too
much or too little, with the other sign, or something else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from weightsurgery.adapters.layout import read_adapter
from weightsurgery.adapters.updates import Update
from weightsurgery.alignment import Pair, align
from weightsurgery.checkpoint import Checkpoint, require_checkpoints
from weightsurgery.errors import GateError, SettingError, shown
from weightsurgery.kernels import Block, same_float, to_float
from weightsurgery.low_rank_kernel import residual_sums
from weightsurgery.quantised import require_unquantised
from weightsurgery.stream import Engine, fold

_NEAR = 0.1  # of the change's norm that may be left when a scale is said to explain a difference


@dataclass
class _Sums:
    """Over the elements of a tensor: what was expected, what is there, what is left.

    Attributes:
        expected: Σ change², the change that the adapters ask for.
        actual: Σ actual², the change that is there.
        product: Σ change · actual.
        residual: Σ (merged − expected)².
        bound: Σ tolerance².
        worst: The largest |merged − expected| in tolerances.
        different: Elements that are not BASE's.
    """

    expected: float = 0.0
    actual: float = 0.0
    product: float = 0.0
    residual: float = 0.0
    bound: float = 0.0
    worst: float = 0.0
    different: int = 0

    def add(self, part: Block) -> _Sums:
        """The sums with those of another block."""
        one, two, both, left, bound, worst, different = map(float, part)
        return _Sums(
            self.expected + one,
            self.actual + two,
            self.product + both,
            self.residual + left,
            self.bound + bound,
            worst if math.isnan(worst) else max(self.worst, worst),  # NaN proves nothing
            self.different + int(different),
        )


def verify_adapter(
    base: Checkpoint,
    adapters: Sequence[Checkpoint],
    merged: Checkpoint,
    *,
    weight: Sequence[float] = (),
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Check that MERGED is BASE with its adapters folded in, whoever did it.

    An element may differ from W + s·B·A by the rounding of the sum and of the change to the
    stored dtype, once for each adapter, and by what float32 sums in another order differ by. What
    no adapter touches must have BASE's bytes.

    Args:
        base: The model that the adapters were trained on.
        adapters: What was folded in, in order.
        merged: The result.
        weight: One number for each adapter, or none.
        engine: Workers and progress.

    Returns:
        The report, with the schema `wsurg.adapter-proof/1`: `proved`, and a verdict on each
        tensor that is adapted or differs.

    Raises:
        FormatError: An adapter is incomplete, or contradicts its configuration.
        MismatchError: The three do not fit each other.
        PolicyError: An adapter is of a kind that is not folded in here.
        SettingError: There is no adapter, or not one `weight` for each.
    """
    require_checkpoints(base, *adapters, merged)
    require_unquantised(base, merged)
    if not adapters or (weight and len(weight) != len(adapters)):
        raise SettingError(f"{len(weight)} weights for {len(adapters)} adapters")
    updates: dict[str, list[Update]] = {}
    for adapter, by in zip(adapters, weight or [1.0] * len(adapters), strict=True):
        for target in read_adapter(base, adapter, weight=by):
            updates.setdefault(target.name, []).extend(target.updates)
    paired = align(base, merged)
    pairs = [replace(p, key=p.name) for p in paired.pairs if p.base is not None and p.eligible]
    found = {pair.name: _Sums() for pair in pairs}

    def step(pair: Pair, start: int, before: Block, after: Block) -> Block:
        mine = updates.get(pair.base.name, []) if pair.base else []
        return _compare(before, after, start, mine)

    def combine(sums: dict[str, _Sums], pair: Pair, _start: int, part: Block) -> dict[str, _Sums]:
        sums[pair.name] = sums[pair.name].add(part)
        return sums

    fold(step, combine, found, pairs, engine=engine or Engine(), what="proving")
    tensors = [
        _verdict(pair.name, found[pair.name], bool(pair.base and pair.base.name in updates))
        for pair in pairs
    ]
    seen = {pair.base.name for pair in pairs if pair.base is not None}
    tensors += [
        {"tensor": name, "adapted": True, "verdict": "missing"} for name in updates.keys() - seen
    ]
    shown_ones = [one for one in tensors if one["adapted"] or one["verdict"] != "untouched"]
    return {
        "schema": "wsurg.adapter-proof/1",
        "base": base.label,
        "adapters": [adapter.label for adapter in adapters],
        "merged": merged.label,
        "weight": list(weight),
        "proved": all(one["verdict"] in ("proved", "untouched") for one in tensors),
        "untouched": sum(one["verdict"] == "untouched" for one in tensors),
        "tensors": sorted(shown_ones, key=lambda one: str(one["tensor"])),
        "not_compared": paired.to_json()["kept_from_tuned"],
    }


def check_proof(report: Mapping[str, Any]) -> None:
    """Nothing, if the merge is proved.

    Raises:
        GateError: It is not; the first tensors are named.
    """
    if report["proved"]:
        return
    wrong = [one for one in report["tensors"] if one["verdict"] not in ("proved", "untouched")]
    first = ", ".join(f"'{shown(one['tensor'])}' ({one['verdict']})" for one in wrong[:3])
    raise GateError(
        f"{len(wrong)} tensors are not what BASE and the adapters give: {first}",
        file=report["merged"],
    )


_HALF_STEP = {np.dtype(ml_dtypes.bfloat16): 2.0**-8, np.dtype(np.float16): 2.0**-11}
_SMALLEST = {np.dtype(ml_dtypes.bfloat16): 2.0**-134, np.dtype(np.float16): 2.0**-25}


def _compare(before: Block, after: Block, start: int, updates: Sequence[Update]) -> Block:
    """The seven numbers of `_Sums`, for a block."""
    half = _HALF_STEP.get(after.dtype, 2.0**-24)
    smallest = _SMALLEST.get(after.dtype, 2.0**-150)
    same = before.dtype == after.dtype and not updates
    old, new = same_float(before, after)
    expected = to_float(before).astype(old.dtype, copy=False)
    for update in updates:
        expected = update.apply(expected, start)
    if same:  # untouched: bytes count, not values
        bits = f"u{before.dtype.itemsize}"
        different = int(np.count_nonzero(before.view(bits) != after.view(bits)))
        return np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, different])
    return residual_sums(old, expected, new, half * max(1, len(updates)), smallest)


def _verdict(name: str, sums: _Sums, adapted: bool) -> dict[str, Any]:
    """What the sums say of a tensor."""
    if not adapted:
        same = sums.different == 0 or (sums.bound > 0 and sums.worst <= 1)
        return {"tensor": name, "adapted": False, "verdict": "untouched" if same else "edited"}
    scale = sums.product / sums.expected if sums.expected else None
    if sums.worst <= 1:
        verdict = "proved"
    elif sums.different == 0:
        verdict = "unchanged"
    else:
        verdict = "wrong"
        # Least squares: what is left when the best multiple of the change is taken away.
        left = sums.actual - (scale * sums.product if scale is not None else 0.0)
        if scale is not None and left <= _NEAR * sums.actual + 4 * sums.bound:
            verdict = "wrong sign" if scale < 0 else "wrong scale"
    return {
        "tensor": name,
        "adapted": True,
        "verdict": verdict,
        "change": sums.expected**0.5,
        "residual": sums.residual**0.5,
        "bound": sums.bound**0.5,
        "worst": sums.worst,
        "scale": scale,
    }
