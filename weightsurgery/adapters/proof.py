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

from weightsurgery.adapters.elements import compare
from weightsurgery.adapters.heads import Reading, read_adapters, stored_apart, stored_as_in_base
from weightsurgery.adapters.naming import Naming
from weightsurgery.adapters.tie import is_tied
from weightsurgery.adapters.updates import Replace, Update
from weightsurgery.alignment import Alignment, Pair, align
from weightsurgery.checkpoint import Checkpoint, TensorView, require_checkpoints
from weightsurgery.errors import GateError, counted, first_few, shown
from weightsurgery.kernels import Block
from weightsurgery.quantised import require_unquantised
from weightsurgery.stream import Engine, fold
from weightsurgery.ties import says_tied, tied_to

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
        due: Elements that rounding cannot have left as they were, of blocks that are all BASE's.
    """

    expected: float = 0.0
    actual: float = 0.0
    product: float = 0.0
    residual: float = 0.0
    bound: float = 0.0
    worst: float = 0.0
    different: int = 0
    due: int = 0

    def add(self, part: Block) -> _Sums:
        """The sums with those of another block."""
        one, two, both, left, bound, worst, different, due = map(float, part)
        return _Sums(
            self.expected + one,
            self.actual + two,
            self.product + both,
            self.residual + left,
            self.bound + bound,
            worst if math.isnan(worst) else max(self.worst, worst),  # NaN proves nothing
            self.different + int(different),
            self.due + int(due),
        )


def verify_adapter(
    base: Checkpoint,
    adapters: Sequence[Checkpoint],
    merged: Checkpoint,
    *,
    weight: Sequence[float] = (),
    strip_prefix: str = "",
    name_map: Mapping[str, str] | None = None,
    allow_nonfinite: bool = False,
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
        strip_prefix: Ignored at the front of the adapters' names or of BASE's.
        name_map: An adapter's name of a module or tensor to BASE's name; wins over the prefix.
        allow_nonfinite: NaN or infinity in MERGED is right where BASE and the adapters give it;
            else an adapter with some is refused, and a tensor with some is not proved.
        engine: Workers and progress.

    Returns:
        The report, with the schema `wsurg.adapter-proof/1`: `proved`, and a verdict on each
        tensor that is adapted or differs.

    Raises:
        FormatError: An adapter is incomplete, or contradicts its configuration.
        MismatchError: The three do not fit each other.
        NonFiniteError: An adapter holds NaN or infinity, and that is not allowed.
        PolicyError: An adapter is of a kind that is not folded in here.
        SettingError: There is no adapter, not one `weight` for each, or a name that is mapped does
            not exist.
    """
    require_checkpoints(base, *adapters, merged)
    require_unquantised(base, merged)
    naming = Naming(strip_prefix, name_map or {})
    read = read_adapters(base, adapters, weight, naming=naming, allow_nonfinite=allow_nonfinite)
    reading = _as_stored(read, merged)
    updates = reading.updates()
    paired = align(reading.base, merged, mismatched="keep integers", called="MERGED")
    pairs = [replace(p, key=p.name, eligible=_compared(p)) for p in paired.pairs if _compared(p)]
    found = {pair.name: _Sums() for pair in pairs}

    def step(pair: Pair, start: int, before: Block, after: Block) -> Block:
        mine = updates.get(_base_name(pair), [])
        if mine and isinstance(mine[-1], Replace) and not mine[-1].by.dtype.arithmetic:
            before, mine = mine[-1].by.read(start, start + before.size), []
        return compare(before, after, start, mine, allow_nonfinite=allow_nonfinite)

    def combine(sums: dict[str, _Sums], pair: Pair, _start: int, part: Block) -> dict[str, _Sums]:
        sums[pair.name] = sums[pair.name].add(part)
        return sums

    fold(step, combine, found, pairs, engine=engine or Engine(), what="proving")
    tensors = [_verdict(pair.name, found[pair.name], _base_name(pair) in updates) for pair in pairs]
    copies = [pair for pair in paired.pairs if pair.base is None and _is_copy(pair, merged)]
    tensors = [*_absent(reading, paired, merged), *_unlike(paired, copies, updates), *tensors]
    tensors = list({one["tensor"]: one for one in tensors[::-1]}.values())  # the first one counts
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
        "not_compared": [
            {"tensor": pair.name, "reason": f"the same as '{pair.key}', which it is tied to"}
            for pair in copies
        ],
    }


def _as_stored(reading: Reading, merged: Checkpoint) -> Reading:
    """What the adapters ask for; of the untied model where they or MERGED need it."""
    apart = reading.tie is not None and (reading.needs_untying or not is_tied(merged))
    return (stored_apart if apart else stored_as_in_base)(reading)


def _base_name(pair: Pair) -> str:
    """BASE's tensor that a pair is read from, "" for none or several."""
    return pair.names[0] if len(pair.names) == 1 else ""


def _compared(pair: Pair) -> int:
    """How many of a pair's elements are compared: integers and masks too, where they are alike."""
    if pair.base is None or pair.eligible:
        return pair.eligible
    alike = (pair.base.shape, pair.base.dtype) == (pair.tuned.shape, pair.tuned.dtype)
    return pair.tuned.size if alike else 0


def _is_copy(pair: Pair, merged: Checkpoint) -> bool:
    """True for a tensor with the very bytes of the one that it is tied to."""
    if not pair.is_tied_copy:
        return False
    one, other = pair.tuned, merged[pair.key]  # of one shape and dtype, by `tied_to`
    runs = one.blocks()
    return all(one.read(*run).tobytes() == other.read(*run).tobytes() for run in runs)


def _unlike(
    paired: Alignment, copies: Sequence[Pair], updates: Mapping[str, Sequence[Update]]
) -> list[dict[str, Any]]:
    """Verdicts on what MERGED stores and should not, or in another shape or kind of numbers."""
    found = []
    for pair in paired.pairs:
        mine, theirs = pair.tuned, pair.base
        adapted = _base_name(pair) in updates
        if theirs is None:
            verdict = "" if pair in copies else "extra"
        else:
            whole = _compared(pair) == mine.size and theirs.shape == mine.shape
            verdict = "" if whole else "wrong" if adapted else "edited"
        if verdict:
            found.append({"tensor": pair.name, "adapted": adapted, "verdict": verdict})
    return found


def _absent(reading: Reading, paired: Alignment, merged: Checkpoint) -> list[dict[str, Any]]:
    """Verdicts on what MERGED should store and does not, and on a head it should not tie."""
    updates, tie = reading.updates(), reading.tie
    head = tie.head if tie is not None and reading.needs_untying else None
    seen = {name for pair in paired.pairs for name in pair.names}
    copies = tied_to(reading.base) if says_tied(merged) else {}
    missing = [
        name
        for name, view in reading.base.items()
        if name not in seen and name not in copies and (name in updates or _is_parameter(view))
    ]
    found = dict.fromkeys(missing, "missing")
    if head is not None and is_tied(merged):
        found[head] = "tied"
    return [{"tensor": n, "adapted": n in updates, "verdict": v} for n, v in found.items()]


def _is_parameter(view: TensorView) -> bool:
    """False for what a model computes anew and need not store; our choice of names."""
    last = view.name.rpartition(".")[2]
    mask = view.name.endswith(".attn.bias") and len(view.shape) == 4  # GPT-2's
    return view.dtype.arithmetic and view.size > 0 and not mask and last not in _COMPUTED


def check_proof(report: Mapping[str, Any]) -> None:
    """Nothing, if the merge is proved.

    Raises:
        GateError: It is not; the first tensors are named.
    """
    if report["proved"]:
        return
    wrong = [one for one in report["tensors"] if one["verdict"] not in ("proved", "untouched")]
    first = first_few([f"'{shown(one['tensor'])}' ({one['verdict']})" for one in wrong])
    those = counted(len(wrong), "tensor is", "tensors are")
    raise GateError(f"{those} not what BASE and the adapters give: {first}", file=report["merged"])


_COMPUTED = ("inv_freq", "original_inv_freq", "masked_bias", "cos_cached", "sin_cached")


def _verdict(name: str, sums: _Sums, adapted: bool) -> dict[str, Any]:
    """What the sums say of a tensor."""
    if not adapted:
        same = sums.different == 0 or (sums.bound > 0 and sums.worst <= 1)
        return {"tensor": name, "adapted": False, "verdict": "untouched" if same else "edited"}
    scale = sums.product / sums.expected if sums.expected else None
    if sums.different == 0 and (sums.due or not sums.worst <= 1):
        verdict = "unchanged"  # each element might be rounding's doing, all together are not
    elif sums.worst <= 1:
        verdict = "proved"
    else:
        verdict = "wrong"
        # Least squares: what is left when the best multiple of the change is taken away.
        left = sums.actual - (scale * sums.product if scale is not None else 0.0)
        if scale is not None and abs(scale - 1) <= _NEAR and sums.residual <= sums.bound:
            verdict = "rounded otherwise"  # as a whole within the bound, some elements are not
        elif scale is not None and left <= _NEAR * sums.actual + 4 * sums.bound:
            verdict = "wrong sign" if scale < 0 else "wrong scale"
    numbers = {
        "change": sums.expected**0.5,
        "residual": sums.residual**0.5,
        "bound": sums.bound**0.5,
        "worst": sums.worst,
        "scale": scale,
    }
    told = {n: x if x is not None and math.isfinite(x) else None for n, x in numbers.items()}
    return {"tensor": name, "adapted": True, "verdict": verdict, **told}
