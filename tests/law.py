"""The law: what an operator writes, transformers loads as the same edit of the models it loads."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.stored import WORDS, Models, Zoo, differing, load, outputs_of, unwrap
from weightsurgery import epur, interpolate, mix, open_checkpoint, purify, save
from weightsurgery.alignment import align
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.masks import changed_mask
from weightsurgery.token_counts import TokenCounts

TOP = 3
_ROUNDING = 1e-5
COUNTS = TokenCounts({word: float(10 + 40 * row) for row, word in enumerate(WORDS)}, "made up")
CHECKS = ("ratio 1", "ratio 0", "interpolate", "epur", "mask", "coverage")


@dataclass(frozen=True)
class Verdict:
    """How one check of one case came out.

    Attributes:
        check: One of `CHECKS`.
        status: "pass", "fail", "error" (an exception), or "skip".
        detail: What differs, or what the exception says.
        numbers: The measured values, for `--json`.
    """

    check: str
    status: str
    detail: str = ""
    numbers: dict[str, float] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """True where the law holds, or has nothing to say."""
        return self.status in ("pass", "skip")


def judge(zoo: Zoo, name: str, way: str, side: str) -> Iterator[Verdict]:
    """All checks of one case; what one raises is its verdict.

    Args:
        zoo: The models.
        name: The architecture.
        way: How one of the two is stored; the other is "saved".
        side: Which of the two: "base" or "tuned".

    Raises:
        Unstorable: There is no such way.
    """
    models = zoo.models(name)
    folders = [zoo.folder(name, way if side == one else "saved", one) for one in ("base", "tuned")]
    with tempfile.TemporaryDirectory(dir=zoo.root) as scratch:
        try:
            base, tuned = (open_checkpoint(folder) for folder in folders)
            saved = open_checkpoint(zoo.folder(name, "saved", "tuned"))
        except Exception as error:
            yield from (Verdict(check, "error", _said(error)) for check in CHECKS)
            return
        wrapped = way == "wrapped" and side == "tuned"
        case = _Case(models, base, tuned, saved, Path(scratch), wrapped)
        for check, run in _RUNS.items():
            if way == "sharded" and check not in CHECKS[:2]:
                continue  # it differs from "saved" in the reading alone
            try:
                yield run(case, check)
            except Exception as error:
                yield Verdict(check, "error", _said(error))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@dataclass(frozen=True)
class _Case:
    models: Models
    base: Checkpoint
    tuned: Checkpoint
    saved: Checkpoint
    scratch: Path
    wrapped: bool

    def loaded(self, result: Checkpoint, name: str, *, plain: bool = False) -> Any:
        """The model that transformers loads from an operator's output."""
        out = self.scratch / name
        save(result, out)
        if self.wrapped and not plain:
            unwrap(out)
        return load(out, type(self.models.tuned))


def _ratio_1(case: _Case, check: str) -> Verdict:
    found = case.loaded(mix(case.base, case.tuned, ratio=1.0), check)
    return _equals(case, check, found, case.models.reset)


def _ratio_0(case: _Case, check: str) -> Verdict:
    found = case.loaded(mix(case.base, case.tuned, ratio=0.0), check)
    return _equals(case, check, found, case.models.tuned)


def _interpolate(case: _Case, check: str) -> Verdict:
    import torch

    found = case.loaded(interpolate(case.base, case.tuned, weight=0.5), check)
    expected = copy.deepcopy(case.models.tuned)
    reset = case.models.reset.state_dict()
    with torch.no_grad():
        seen = set()
        for name, tuned in expected.state_dict().items():
            if tuned.is_floating_point() and tuned.data_ptr() not in seen:
                seen.add(tuned.data_ptr())
                tuned.copy_(reset[name] + 0.5 * (tuned - reset[name]))
    return _equals(case, check, found, expected)


def _epur(case: _Case, check: str) -> Verdict:
    import torch

    names = case.models.embedding
    if not names:
        return Verdict(check, "skip", "no word embedding, or several")
    found = case.loaded(epur(case.base, case.tuned, counts=COUNTS, top=TOP), check)
    expected = copy.deepcopy(case.models.tuned)
    before, after = (m.state_dict()[names[0]] for m in (case.models.reset, expected))
    norms = (after.double() - before.double()).norm(dim=1)
    counts = [max(COUNTS.counts.get(word, 0), 20.0) for word in WORDS]
    scores = norms / torch.tensor([math.log(count) for count in counts], dtype=torch.float64)
    rows = scores.topk(TOP).indices
    with torch.no_grad():
        after[rows] = before[rows]
    return _equals(case, check, found, expected)


def _mask(case: _Case, check: str) -> Verdict:
    half = mix(case.base, case.tuned, ratio=0.5, seed=7)
    found = case.loaded(half, f"{check} half")
    again = purify(case.base, case.tuned, from_mask=changed_mask(half))
    masked = case.loaded(again, check)
    numbers = _shares(case, found)
    other = differing(masked, found)
    if other:
        return Verdict(check, "fail", f"the mask's edit differs in {_few(other)}", numbers)
    if case.saved.files != case.tuned.files:
        for kind, other in _masks_of_the_other_way(case, half, found):
            if other:
                return Verdict(check, "fail", f"{kind} differs in {_few(other)}", numbers)
    if numbers["neither"]:
        return Verdict(check, "fail", f"{numbers['neither']} elements are neither's", numbers)
    if abs(numbers["share"] - 0.5) > 0.05:
        return Verdict(check, "fail", f"{numbers['share']:.3f} of the elements are BASE's", numbers)
    return Verdict(check, "pass", "", numbers)


def _masks_of_the_other_way(
    case: _Case, half: Checkpoint, found: Any
) -> Iterator[tuple[str, list[str]]]:
    """A mask made of TUNED in one way of storing it, used on the other."""
    there = purify(case.base, case.saved, from_mask=changed_mask(half))
    yield "a mask for TUNED as saved", differing(case.loaded(there, "to", plain=True), found)
    half = mix(case.base, case.saved, ratio=0.5, seed=8)
    back = purify(case.base, case.tuned, from_mask=changed_mask(half))
    expected = case.loaded(half, "half", plain=True)
    yield "a mask of TUNED as saved", differing(case.loaded(back, "back"), expected)


def _shares(case: _Case, found: Any) -> dict[str, float]:
    """Of the elements in which the models differ: the share that is BASE's, how many neither's."""
    base, tuned = case.models.reset.state_dict(), case.models.tuned.state_dict()
    total = bases = neither = 0
    seen = set()
    for name, value in found.state_dict().items():
        if value.data_ptr() in seen or not value.numel():
            continue
        seen.add(value.data_ptr())
        differ = base[name] != tuned[name]
        total += int(differ.sum())
        bases += int(((value == base[name]) & differ).sum())
        neither += int(((value != base[name]) & (value != tuned[name])).sum())
    return {"share": bases / max(total, 1), "neither": neither}


def _coverage(case: _Case, check: str) -> Verdict:
    """Everything but task heads has a counterpart."""
    found = align(case.base, case.tuned).coverage
    status = "pass" if found.is_complete else "fail"
    return Verdict(check, status, found.summary, {"coverage": found.share})


_RUNS: dict[str, Callable[[_Case, str], Verdict]] = {
    "ratio 1": _ratio_1,
    "ratio 0": _ratio_0,
    "interpolate": _interpolate,
    "epur": _epur,
    "mask": _mask,
    "coverage": _coverage,
}


def _equals(case: _Case, check: str, found: Any, expected: Any) -> Verdict:
    """Whether a loaded model has the expected weights and computes what they compute."""
    import torch

    base, tuned = case.models.outputs
    known = {id(case.models.reset): base, id(case.models.tuned): tuned}
    right = known.get(id(expected))
    if right is None:
        right = outputs_of(expected, case.models.inputs)
    computed = outputs_of(found, case.models.inputs)
    wrong = differing(found, expected)
    if not wrong and (
        torch.equal(computed, right)
        # The same weights elsewhere in memory: kernels round by how the memory is aligned.
        or torch.allclose(computed, right, rtol=0, atol=_ROUNDING * float(right.abs().max()))
    ):
        return Verdict(check, "pass")
    numbers = {
        "to expected": _distance(computed, right),
        "to BASE": _distance(computed, base),
        "to TUNED": _distance(computed, tuned),
        **_whose(case, found),
    }
    detail = "; ".join(f"{key} {value:.4g}" for key, value in numbers.items())
    return Verdict(check, "fail", f"{detail}; wrong: {_few(wrong)}", numbers)


def _distance(one: Any, other: Any) -> float:
    return float((one - other).abs().max()) if one.shape == other.shape else math.inf


def _whose(case: _Case, found: Any) -> dict[str, float]:
    """How many parameters are BASE's, TUNED's, neither's."""
    import torch

    base, tuned = case.models.reset.state_dict(), case.models.tuned.state_dict()
    counts = {"BASE's": 0, "TUNED's": 0, "neither's": 0}
    for name, value in found.named_parameters():
        if torch.equal(value, base[name]):
            counts["BASE's"] += 1
        elif torch.equal(value, tuned[name]):
            counts["TUNED's"] += 1
        else:
            counts["neither's"] += 1
    return counts


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
