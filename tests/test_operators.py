"""The operators equal the naive whole-model functions, and obey their laws bit for bit."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import cases, reference
from weightsurgery.checkpoint import from_arrays
from weightsurgery.comparison import diff, drift
from weightsurgery.errors import NonFiniteError, SettingError
from weightsurgery.formats import save
from weightsurgery.inspection import inspect
from weightsurgery.operators.interpolate import interpolate
from weightsurgery.operators.mix import mix

BF16, F32 = cases.BF16, np.float32
FAMILIES = pytest.mark.parametrize("family", cases.FAMILIES)
BLOCKS = pytest.mark.parametrize("block", [1 << 20, 16, 4], ids=["whole", "rows", "parts of rows"])


def normal(shape: tuple[int, ...], seed: int = 1, dtype: Any = F32) -> Any:
    return np.asarray(np.random.default_rng(seed).normal(0, 1, shape), F32).astype(dtype)


def single(shape: tuple[int, ...], dtype: Any = F32) -> tuple[cases.Arrays, cases.Arrays]:
    return {"w": normal(shape, 1, dtype)}, {"w": normal(shape, 2, dtype)}


def with_one(base: Any, tuned: Any, *, rest: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model of one tensor, and another so that something always pairs."""
    extra = {"rest": np.ones(3, F32)} if rest else {}
    return {"w": base, **extra}, {"w": tuned, **extra}


EDGES: dict[str, tuple[cases.Arrays, cases.Arrays]] = {
    "one element": single((1,)),
    "scalar": with_one(np.array(1.0, F32), np.array(2.0, F32)),
    "empty": with_one(np.zeros((0, 4), F32), np.zeros((0, 4), F32)),
    "empty rows": with_one(np.zeros((4, 0), F32), np.zeros((4, 0), F32)),
    "all ties": with_one(np.zeros((5, 7), F32), np.ones((5, 7), F32)),
    "all zeros": with_one(np.zeros((5, 7), F32), np.zeros((5, 7), F32)),
    "odd rows": single((5, 7)),
    "three dimensions": single((3, 5, 3)),
    "long row": single((1, 131)),
    "BF16": single((5, 7), BF16),
    "F16": single((5, 7), np.float16),
    "F64": single((5, 7), np.float64),
    "BERT": cases.pair("bert"),
    "GPT-2": cases.pair("gpt2"),
    "Llama": cases.pair("llama"),
}
EDGE = pytest.mark.parametrize("arrays", EDGES.values(), ids=EDGES)


def run(operator: Any, base: cases.Arrays, tuned: cases.Arrays, **settings: Any) -> cases.Arrays:
    return cases.read(operator(from_arrays(base), from_arrays(tuned), **settings))


def same(found: cases.Arrays, expected: cases.Arrays) -> None:
    assert cases.stored(found) == cases.stored(expected)


# --- the streaming result equals the naive one ------------------------------------------------


@EDGE
@BLOCKS
@pytest.mark.parametrize("ratio", [0, 0.3, 0.5, 1])
def test_mix(arrays: Any, block: int, ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    cases.shrink_blocks(monkeypatch, block)
    same(run(mix, *arrays, ratio=ratio, seed=3), reference.mix(*arrays, ratio=ratio, seed=3))


@EDGE
@BLOCKS
@pytest.mark.parametrize("ratio", [0, 0.1, 0.5, 0.99, 1])
def test_mix_by_drift(
    arrays: Any, block: int, ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases.shrink_blocks(monkeypatch, block)
    found = run(mix, *arrays, ratio=ratio, select="drift")
    same(found, reference.mix_by_drift(*arrays, ratio=ratio))


@EDGE
@BLOCKS
@pytest.mark.parametrize("weight", [0, 0.25, 0.3, 1])
def test_interpolate(
    arrays: Any, block: int, weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases.shrink_blocks(monkeypatch, block)
    found = run(interpolate, *arrays, weight=weight)
    same(found, reference.interpolate(*arrays, weight=weight))


def test_interpolation_is_as_exact_as_its_dtype() -> None:
    base, tuned = single((50, 50))
    found = run(interpolate, base, tuned, weight=0.3)["w"]
    exact = 0.7 * base["w"].astype("f8") + 0.3 * tuned["w"].astype("f8")
    assert np.abs(found - exact).max() < 4 * 2.0**-24 * 4


# --- laws -------------------------------------------------------------------------------------


def odd_pair(dtype: Any) -> tuple[cases.Arrays, cases.Arrays]:
    """Zeros of both signs, infinities, NaNs with payloads: what only a copy of bits preserves."""
    size = np.dtype(dtype).itemsize
    infinity = np.array(np.inf, dtype).view(f"u{size}")
    payloads = (infinity + np.arange(1, 5, dtype=f"u{size}")).view(dtype)
    plain = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf], F32).astype(dtype)
    odd = np.concatenate([plain, payloads])
    return with_one(odd, np.roll(odd, 3))


LAWS = {
    "mix 0 is TUNED": (mix, {"ratio": 0}, 1),
    "mix 1 is BASE": (mix, {"ratio": 1}, 0),
    "mix 1 by drift is BASE": (mix, {"ratio": 1, "select": "drift"}, 0),
    "interpolate 0 is BASE": (interpolate, {"weight": 0, "allow_nonfinite": True}, 0),
    "interpolate 1 is TUNED": (interpolate, {"weight": 1, "allow_nonfinite": True}, 1),
}


@pytest.mark.parametrize(("operator", "settings", "side"), LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("dtype", cases.DTYPES.values(), ids=cases.DTYPES)
def test_the_ends_are_the_inputs_bit_for_bit(
    operator: Any, settings: Any, side: int, dtype: Any
) -> None:
    arrays = odd_pair(dtype)
    assert cases.stored(arrays[0]) != cases.stored(arrays[1])
    same(run(operator, *arrays, **settings), arrays[side])


def test_a_mixed_weight_is_one_of_the_two_bit_for_bit() -> None:
    base, tuned = odd_pair(np.float32)
    found = run(mix, base, tuned, ratio=0.5, seed=1)["w"].view(np.uint32)
    b, t = base["w"].view(np.uint32), tuned["w"].view(np.uint32)
    reset = reference.mask(1, "w", b.size, 0.5)
    assert 0 < reset.sum() < b.size
    assert (found == np.where(reset, b, t)).all()


@FAMILIES
def test_masks_are_nested_in_the_ratio(family: str) -> None:
    base, tuned = cases.model(family), cases.model(family, seed=9)
    name = cases.EMBEDDING[family]
    resets = [
        run(mix, base, tuned, ratio=r, seed=5)[name] == base[name] for r in (0.1, 0.2, 0.5, 0.8, 1)
    ]
    for small, large in itertools.pairwise(resets):
        assert not (small & ~large).any()
        assert small.sum() < large.sum()


@FAMILIES
@pytest.mark.parametrize("ratio", [0.05, 0.29, 0.5, 0.7, 0.999])
def test_by_drift_never_resets_more_than_the_share(family: str, ratio: float) -> None:
    base, tuned = cases.pair(family)
    found = run(mix, base, tuned, ratio=ratio, select="drift")
    names = cases.shapes_of(family)
    eligible = sum(tuned[n].size for n in names)
    changed = sum((found[n] != tuned[n]).sum() for n in names)
    assert changed <= ratio * eligible


@pytest.mark.parametrize(("reserve", "ratio"), [("0.7", "0.3"), ("0.9", "0.1"), ("0", "1")])
def test_reserve_is_the_exact_complement_of_ratio(reserve: str, ratio: str, tmp_path: Path) -> None:
    base, tuned = (
        cases.write_file(tmp_path / f"{name}.safetensors", arrays)
        for name, arrays in zip(("base", "tuned"), cases.pair(), strict=True)
    )
    outputs = []
    for flag, value in (("--reserve", reserve), ("--ratio", ratio)):
        out = tmp_path / f"{flag}.safetensors"
        assert cases.wsurg("mix", base, tuned, flag, value, "-o", out) == 0
        record = out.with_name(f"{out.name}.wsurg-record.json").read_text()
        told = json.loads(record.replace(out.name, "out"))
        del told["record_sha256"]  # of the record with its output's name
        outputs.append((out.read_bytes(), told))
    assert outputs[0] == outputs[1]


# --- mixed dtypes and non-finite values -------------------------------------------------------


@pytest.mark.parametrize("tuned", cases.DTYPES.values(), ids=[f"to {n}" for n in cases.DTYPES])
@pytest.mark.parametrize("base", cases.DTYPES.values(), ids=[f"from {n}" for n in cases.DTYPES])
def test_other_dtypes_are_rounded_once(base: Any, tuned: Any) -> None:
    arrays = {"w": normal((9, 5), 1, base)}, {"w": normal((9, 5), 2, tuned)}
    same(run(mix, *arrays, ratio=0.5), reference.mix(*arrays, ratio=0.5))
    same(run(mix, *arrays, ratio=1), reference.mix(*arrays, ratio=1))
    same(run(interpolate, *arrays, weight=0), reference.interpolate(*arrays, weight=0))
    same(run(interpolate, *arrays, weight=1), arrays[1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("side", [0, 1], ids=["in BASE", "in TUNED"])
class TestNonFinite:
    def arrays(self, bad: float, side: int) -> tuple[cases.Arrays, cases.Arrays]:
        arrays = single((4, 5))
        arrays[side]["w"][2, 3] = bad
        return arrays

    def test_selection_copies_them(self, bad: float, side: int) -> None:
        arrays = self.arrays(bad, side)
        same(run(mix, *arrays, ratio=0.5), reference.mix(*arrays, ratio=0.5))

    def test_ranking_refuses_them(self, bad: float, side: int) -> None:
        with pytest.raises(NonFiniteError, match="tensor 'w': the score is NaN"):
            run(mix, *self.arrays(bad, side), select="drift")

    def test_arithmetic_refuses_them(self, bad: float, side: int) -> None:
        with pytest.raises(NonFiniteError, match="tensor 'w': NaN or infinity among elements"):
            run(interpolate, *self.arrays(bad, side))

    def test_arithmetic_lets_them_pass_where_that_is_allowed(self, bad: float, side: int) -> None:
        arrays = self.arrays(bad, side)
        found = run(interpolate, *arrays, allow_nonfinite=True)["w"]
        assert np.isfinite(found).sum() == found.size - 1
        assert not np.isfinite(found[2, 3])


def test_opposite_infinities_give_nan_without_a_warning() -> None:
    arrays = with_one(np.array([np.inf], F32), np.array([-np.inf], F32))
    assert np.isnan(run(interpolate, *arrays, allow_nonfinite=True)["w"]).all()


# --- settings of other types ------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "text for a number": ({"ratio": "half"}, "ratio is 'half'; expected a number"),
    "bool for a number": ({"ratio": True}, "ratio is True; expected a number"),
    "fraction for an integer": ({"seed": 1.5}, "seed is 1.5; expected an integer"),
    "number for a bool": ({"keep_mismatched": 1}, "keep_mismatched is 1; expected True or False"),
    "number for a list": ({"include": 3}, "include is 3; expected a list"),
    "number for a glob": ({"include": (3,)}, "include is 3; expected a string"),
    "no pair": ({"ratio_for": (("a", 1, 2),)}, r"ratio_for is \('a', 1, 2\); expected a list"),
    "no such choice": ({"select": "best"}, "select is 'best'; expected random or drift"),
}


@pytest.mark.parametrize(("settings", "reason"), WRONG.values(), ids=WRONG.keys())
def test_settings_of_another_type_are_refused(settings: dict[str, Any], reason: str) -> None:
    model = from_arrays({"w": np.ones(4, np.float32)})
    with pytest.raises(SettingError, match=reason):
        mix(model, model, **settings)


def test_one_glob_and_a_map_of_rules_will_do() -> None:
    base, tuned = (from_arrays({n: np.full(4, v, np.float32) for n in "ab"}) for v in (0, 1))
    out = mix(base, tuned, ratio=1, include="a", ratio_for={"a": np.float32(0.0)})
    assert out["a"].read(0, 4).tolist() == [1, 1, 1, 1]
    assert out.step is not None
    assert out.step.settings["include"] == ("a",)
    assert out.step.settings["ratio_for"] == (("a", 0.0),)


def test_a_path_is_no_checkpoint(tmp_path: Path) -> None:
    model: Any = from_arrays({"w": np.ones(4, np.float32)})
    calls: list[Callable[[], Any]] = [
        lambda: mix("base", model),  # type: ignore[arg-type]
        lambda: diff(model, "tuned"),  # type: ignore[arg-type]
        lambda: drift("base", model),  # type: ignore[arg-type]
        lambda: inspect("base"),  # type: ignore[arg-type]
        lambda: save("base", tmp_path / "out"),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"expected a Checkpoint, got str; open_checkpoint"):
            call()
