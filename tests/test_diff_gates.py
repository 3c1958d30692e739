"""`--fail-if`, and the drift as a checkpoint of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import cases, reference
from weightsurgery.checkpoint import from_arrays
from weightsurgery.comparison import diff, drift
from weightsurgery.errors import GateError, NonFiniteError, PolicyError, SettingError
from weightsurgery.formats import open_checkpoint, save
from weightsurgery.gates import check_gates, parse_gate
from weightsurgery.statistics import METRICS

# --- gates ------------------------------------------------------------------------------------

BASE = {"a.weight": np.ones(4, np.float32), "a.bias": np.zeros(2, np.float32)}
TUNED = {"a.weight": np.full(4, 1.5, np.float32), "a.bias": np.array([0, 3], np.float32)}


def judge(*gates: str) -> None:
    check_gates(diff(from_arrays(BASE), from_arrays(TUNED)), [parse_gate(g) for g in gates])


@pytest.mark.parametrize(
    ("gate", "says"),
    [
        ("max_abs > 2", "model: max_abs is 3"),
        ("max_abs>=3", "model: max_abs is 3"),
        ("max_abs <= 3", "model: max_abs is 3"),
        ("changed == 5", "model: changed is 5"),
        ("changed != 6", "model: changed is 5"),
        ("cosine < 1", "model: cosine is 0."),
        ("q50 <= 0.6", "model: q50 is 0."),
        ("q99.9 > 2.9", "model: q99.9 is "),
        ("*.weight: max_abs > 0.1", "a.weight: max_abs is 0.5"),
        ("a.*:max_abs > 0.1", r"a\.(weight|bias): max_abs is .*\(and 1 more\)"),
        ("*.bias: relative_l2 > 1000", "a.bias: relative_l2 is inf"),
        ("  a.bias :  max_abs > 1e0 ", "a.bias: max_abs is 3"),
    ],
)
def test_gates_that_fail(gate: str, says: str) -> None:
    with pytest.raises(GateError, match=f"the gate '.*' failed: {says}") as caught:
        judge("max_abs > 1000", gate)
    assert caught.value.exit_code == 10


@pytest.mark.parametrize(
    "gate",
    ["max_abs > 3", "max_abs < 3", "changed < 5", "*.weight: max_abs > 0.5", "a.bias: cosine < 2"],
)
def test_gates_that_hold(gate: str) -> None:
    judge(gate)


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_can_be_a_gate(metric: str) -> None:
    gate = parse_gate(f"{metric} > 1e300")
    assert (gate.metric, gate.bound, gate.glob) == (metric, 1e300, "")
    judge(f"{metric} > 1e300")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read the condition ''.*write for example"),
        ("max_abs", "cannot read the condition 'max_abs'"),
        ("max_abs > ", "cannot read the condition"),
        ("max_abs > much", "cannot read the condition 'max_abs > much'"),
        ("max_abs > nan", "cannot read the condition 'max_abs > nan'"),
        ("max_abs => 1", "cannot read the condition"),
        ("max_abs > 1 2", "cannot read the condition"),
        ("largest > 1", r"unknown metric 'largest'; expected count, changed, .*q99\.9"),
        ("*.bias: l3 > 1", "unknown metric 'l3'"),
    ],
)
def test_conditions_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        parse_gate(text)


def test_a_gate_that_looks_at_no_tensor_is_an_error() -> None:
    with pytest.raises(SettingError, match=r"'\*\.wieght' matches no tensor"):
        judge("*.wieght: max_abs > 0")


@pytest.mark.parametrize("gate", ["classifier.*: max_abs > 9", "classifier.*: unpaired > 9"])
def test_a_gate_may_look_at_a_head_that_base_lacks(gate: str) -> None:
    """It was not compared, so that a bound for its drift fails, and it is not missing either."""
    base = cases.model("bert")
    tuned = base | {"classifier.weight": np.ones((2, 8), np.float32)}
    report = diff(from_arrays(base), from_arrays(tuned))
    if "unpaired" in gate:
        check_gates(report, [parse_gate(gate)])
        return
    with pytest.raises(GateError, match="not compared"):
        check_gates(report, [parse_gate(gate)])


def test_gates_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [
        cases.write_file(tmp_path / f"{name}.safetensors", arrays)
        for name, arrays in (("base", BASE), ("tuned", TUNED))
    ]
    assert cases.wsurg("diff", *files, "--fail-if", "max_abs > 3") == 0
    assert cases.wsurg("diff", *files, "--fail-if", "max_abs > 2") == 10
    shown = capsys.readouterr()
    assert shown.err == "error[E-GATE]: the gate 'max_abs > 2' failed: model: max_abs is 3\n"
    assert "L2 of the drift" in shown.out
    assert cases.wsurg("diff", *files, "--fail-if", "nothing > 2") == 2


# --- drift as a checkpoint --------------------------------------------------------------------


def expected_drift(base: cases.Arrays, tuned: cases.Arrays) -> cases.Arrays:
    found: cases.Arrays = {}
    for name, t in tuned.items():
        if reference.is_eligible(base, name, t):
            wide = reference.arithmetic(base[name], t)
            b = reference.widened(base[name]).astype(wide)
            found[name] = reference.widened(t).astype(wide) - b
    return found


@pytest.mark.parametrize("dtype", cases.DTYPES.values(), ids=cases.DTYPES)
@pytest.mark.parametrize("family", cases.FAMILIES)
def test_drift_is_the_difference(
    family: str, dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases.shrink_blocks(monkeypatch)
    base, tuned = cases.pair(family, dtype=dtype)
    out = tmp_path / "drift.safetensors"
    save(drift(from_arrays(base), from_arrays(tuned)), str(out))
    expected = cases.stored(expected_drift(base, tuned))
    assert cases.stored_in(out) == expected
    assert {kind for kind, _, _ in expected.values()} == {"F64" if dtype.itemsize == 8 else "F32"}
    assert cases.stored(cases.read(open_checkpoint(out))) == expected


def test_drift_of_mixed_dtypes_is_in_the_wider() -> None:
    base = {n: np.ones(3, d) for n, d in cases.DTYPES.items()}
    tuned = {n: np.full(3, 2, cases.BF16) for n in cases.DTYPES}
    found = cases.read(drift(from_arrays(base), from_arrays(tuned)))
    assert {n: a.dtype.name for n, a in found.items()} == {
        n: "float64" if n == "F64" else "float32" for n in cases.DTYPES
    }
    assert all((array == 1).all() for array in found.values())


def test_drift_of_a_sharded_directory_is_one_file(tmp_path: Path) -> None:
    base, tuned = (
        cases.write_directory(tmp_path / name, arrays, shards=3, config=cases.CONFIGS["bert"])
        for name, arrays in zip(("base", "tuned"), cases.pair("bert"), strict=True)
    )
    out = tmp_path / "drift.safetensors"
    assert cases.wsurg("diff", base, tuned, "--drift", out) == 0
    assert cases.stored_in(out) == cases.stored(expected_drift(*cases.pair("bert")))


def test_drift_of_an_extended_vocabulary_has_its_common_rows() -> None:
    bias, name = "cls.predictions.bias", cases.EMBEDDING["bert"]
    base = cases.model("bert") | {bias: np.ones(11, np.float32)}
    tuned = cases.finetuned(base)
    tuned[name] = np.concatenate([tuned[name], np.ones((3, 6), np.float32)])
    tuned[bias] = np.concatenate([tuned[bias], np.ones(3, np.float32)])
    configs = {"vocab_size": 11}, {"vocab_size": 14}
    found = cases.read(
        drift(*(from_arrays(a, config=c) for a, c in zip((base, tuned), configs, strict=True)))
    )
    for key in (name, bias):
        assert found[key].shape == base[key].shape
        assert (found[key] == tuned[key][:11] - base[key]).all()


def test_drift_refuses_what_is_not_finite(tmp_path: Path) -> None:
    base, tuned = cases.pair("bert")
    tuned[cases.EMBEDDING["bert"]][2, 3] = np.inf
    given = from_arrays(base), from_arrays(tuned)
    out = tmp_path / "drift.safetensors"
    with pytest.raises(NonFiniteError, match="NaN or infinity among elements"):
        save(drift(*given), str(out))
    assert not list(tmp_path.iterdir())
    save(drift(*given, allow_nonfinite=True), str(out))
    assert cases.stored_in(out) == cases.stored(expected_drift(base, tuned))


def test_opposite_infinities_give_nan_without_a_warning() -> None:
    base, tuned = {"w": np.array([np.inf], "f4")}, {"w": np.array([-np.inf], "f4")}
    base["v"], tuned["v"] = np.array([np.inf], "f4"), np.array([np.inf], "f4")
    found = cases.read(drift(from_arrays(base), from_arrays(tuned), allow_nonfinite=True))
    assert found["w"][0] == -np.inf
    assert np.isnan(found["v"][0])


def test_drift_refuses_quantised_models() -> None:
    base, tuned = cases.pair("bert")
    tuned["layer.qweight"] = np.zeros(4, np.int32)
    with pytest.raises(PolicyError, match="stores GPTQ or AWQ codes"):
        drift(from_arrays(base), from_arrays(tuned))
