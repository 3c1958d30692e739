"""Which tensors an operator edits, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests import cases, reference
from weightsurgery.checkpoint import Checkpoint, from_arrays
from weightsurgery.errors import PolicyError, SettingError
from weightsurgery.formats import open_checkpoint
from weightsurgery.operators.interpolate import interpolate
from weightsurgery.operators.mix import mix


def run(operator: Any, base: cases.Arrays, tuned: cases.Arrays, **settings: Any) -> cases.Arrays:
    return cases.read(operator(from_arrays(base), from_arrays(tuned), **settings))


def changed(found: cases.Arrays, tuned: cases.Arrays) -> set[str]:
    before, after = cases.stored(tuned), cases.stored(found)
    return {name for name in before if before[name] != after[name]}


OPERATORS = pytest.mark.parametrize(
    ("operator", "settings"), [(mix, {"ratio": 1}), (interpolate, {})], ids=["mix", "interpolate"]
)


@OPERATORS
def test_include_and_exclude(operator: Any, settings: Any) -> None:
    base, tuned = cases.pair("bert")
    every = set(cases.shapes_of("bert"))
    biases = {n for n in every if n.endswith(".bias")}
    first = {n for n in every if ".layer.0." in n}

    def edited(**globs: Any) -> set[str]:
        return changed(run(operator, base, tuned, **settings, **globs), tuned)

    assert edited() == every
    assert edited(include=("*.bias",)) == biases
    assert edited(exclude=("*.bias",)) == every - biases
    assert edited(include=("*.bias", "*.layer.0.*")) == biases | first
    assert edited(include=("*.layer.0.*",), exclude=("*.bias",)) == first - biases


@OPERATORS
@pytest.mark.parametrize("side", ["include", "exclude"])
def test_globs_that_match_nothing_are_errors(operator: Any, settings: Any, side: str) -> None:
    wrong = "embeddings.LayerNorm.wieght"
    with pytest.raises(
        SettingError, match=r"'emb.*wieght' matches no tensor; did you mean 'emb.*t'"
    ):
        run(operator, *cases.pair(), **settings, **{side: ("*.bias", wrong)})
    with pytest.raises(SettingError, match="see `wsurg inspect` for names"):
        run(operator, *cases.pair(), **settings, **{side: ("§§",)})
    with pytest.raises(SettingError, match="include and exclude leave nothing to edit"):
        run(operator, *cases.pair(), include=("*.bias",), exclude=("*",))


def test_ratio_for_single_tensors() -> None:
    base, tuned = cases.pair("bert")
    rules = (("*.bias", 1.0), ("*.layer.1.*", 0.0), ("embeddings.Layer*", 0.25))
    found = run(mix, base, tuned, ratio=0.5, seed=2, ratio_for=rules)
    for name in cases.shapes_of("bert"):
        ratio = 1.0 if name.endswith(".bias") else 0.5
        ratio = 0.0 if ".layer.1." in name else ratio
        ratio = 0.25 if name.startswith("embeddings.Layer") else ratio
        expected = reference.mix(base, tuned, ratio=ratio, seed=2)[name]
        assert found[name].tobytes() == expected.tobytes(), name


def test_by_drift_each_rule_is_a_pool_of_its_own() -> None:
    base, tuned = cases.pair("bert")
    found = run(mix, base, tuned, ratio=0.6, select="drift", ratio_for=(("*.bias", 0.2),))
    for ratio, biases in ((0.6, False), (0.2, True)):
        pool = {n: t for n, t in tuned.items() if n.endswith(".bias") == biases}
        expected = cases.stored(reference.mix_by_drift(base, pool, ratio=ratio))
        assert {n: s for n, s in cases.stored(found).items() if n in pool} == expected


def test_by_drift_only_what_is_included_is_ranked() -> None:
    base, tuned = cases.pair("gpt2")
    found = run(mix, base, tuned, ratio=0.4, select="drift", include=("h.0.*",))
    pool = {n: t for n, t in tuned.items() if n.startswith("h.0.")}
    expected = tuned | reference.mix_by_drift(base, pool, ratio=0.4)
    assert cases.stored(found) == cases.stored(expected)


# --- refusals ---------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "ratio above 1": (mix, {"ratio": 1.5}, "ratio is 1.5; expected a share from 0 to 1"),
    "ratio below 0": (mix, {"ratio": -0.1}, "ratio is -0.1; expected a share"),
    "ratio NaN": (mix, {"ratio": float("nan")}, "ratio is nan; expected a share"),
    "ratio_for": (mix, {"ratio_for": (("*.bias", 2),)}, r"ratio for \*.bias is 2; expected"),
    "ratio_for glob": (mix, {"ratio_for": (("nothing", 0.5),)}, "'nothing' matches no tensor"),
    "select": (mix, {"select": "magnitude"}, "select is 'magnitude'; expected random or drift"),
    "weight": (interpolate, {"weight": 1.1}, "weight is 1.1; expected a share from 0 to 1"),
}


@pytest.mark.parametrize(("operator", "settings", "message"), REFUSED.values(), ids=REFUSED)
def test_settings_out_of_range(operator: Any, settings: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        run(operator, *cases.pair(), **settings)
    assert caught.value.exit_code == 2


def config_quantised(path: Path, arrays: cases.Arrays) -> Checkpoint:
    config = {"model_type": "bert", "quantization_config": {"quant_method": "gptq"}}
    return open_checkpoint(cases.write_directory(path, arrays, config=config))


@OPERATORS
@pytest.mark.parametrize("side", [0, 1], ids=["BASE", "TUNED"])
@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("layer.qweight", np.zeros(4, np.int32)),
        ("layer.weight.quant_state.bitsandbytes__nf4", np.zeros(4, np.uint8)),
        ("layer.weight_scale", np.zeros(4, np.float32)),
        ("layer.weight", np.zeros(4, np.float32).astype(cases.BF16).view(np.uint8)),
    ],
    ids=["GPTQ", "bitsandbytes", "scales", "F8"],
)
def test_quantised_tensors_are_refused(
    operator: Any, settings: Any, side: int, name: str, array: Any
) -> None:
    arrays = cases.pair()
    is_f8 = name == "layer.weight"
    arrays[side][name] = array.view(ml_dtypes.float8_e4m3fn) if is_f8 else array
    with pytest.raises(PolicyError, match=r"stores .*codes|stores scales of") as caught:
        run(operator, *arrays, **settings)
    assert (caught.value.tensor, caught.value.exit_code) == (name, 5)


@OPERATORS
def test_quantised_models_are_refused(operator: Any, settings: Any, tmp_path: Path) -> None:
    base, tuned = cases.pair()
    quantised = config_quantised(tmp_path / "model", {**tuned, "x": np.ones((2, 3), "i2")})
    for inputs in ((from_arrays(base), quantised), (quantised, from_arrays(tuned))):
        with pytest.raises(PolicyError, match=r"config\.json has a quantization_config"):
            operator(*inputs, **settings)
