"""`diff` against the naive whole-model numbers."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests import cases, reference
from weightsurgery.anatomy import kind_of, layer_of
from weightsurgery.checkpoint import from_arrays
from weightsurgery.comparison import DiffReport, diff
from weightsurgery.errors import MismatchError, SettingError
from weightsurgery.formats import open_checkpoint
from weightsurgery.statistics import METRICS, QUANTILE_ERROR
from weightsurgery.stream import Engine

EXACT = ("count", "changed", "max_abs", "sign_flips", "skipped")
EXACT += ("base_nan", "base_inf", "tuned_nan", "tuned_inf")
SMALLEST_BIN = 2.0**-131  # the first bin of the histogram: |drift| below this counts as zero


def compare(base: cases.Arrays, tuned: cases.Arrays, **options: Any) -> DiffReport:
    return diff(from_arrays(base), from_arrays(tuned), **options)


def check(entry: dict[str, Any], base: Any, tuned: Any) -> None:
    """An entry of the report against the naive statistics of the same elements."""
    expected = reference.statistics(base, tuned)
    assert {n: entry[n] for n in EXACT} == {n: expected[n] for n in EXACT}
    assert entry["changed_share"] == pytest.approx(expected["changed"] / max(1, expected["count"]))
    assert entry["bit_equal"] == (expected["changed"] == 0)
    assert entry["l2"] == pytest.approx(expected["l2"], rel=1e-5)
    for name in ("relative_l2", "cosine"):  # None where BASE, or a side, is zero
        assert (entry[name] is None) == (expected[name] is None)
        assert (entry[name] or 0) == pytest.approx(expected[name] or 0, rel=1e-5, abs=1e-5)
    typical = expected["l2"] / max(1, expected["count"]) ** 0.5
    assert entry["mean"] == pytest.approx(expected["mean"], abs=1e-5 * typical)
    assert entry["std"] == pytest.approx(expected["std"], abs=1e-3 * typical)
    for name in ("q50", "q90", "q99", "q99.9"):
        assert entry[name] == pytest.approx(expected[name], rel=QUANTILE_ERROR, abs=SMALLEST_BIN)


def joined(arrays: cases.Arrays, names: list[str]) -> Any:
    return np.concatenate([arrays[name].ravel() for name in names])


@pytest.mark.parametrize("dtype", cases.DTYPES.values(), ids=cases.DTYPES)
@pytest.mark.parametrize("family", cases.FAMILIES)
@pytest.mark.parametrize("block", [1 << 20, 16, 4], ids=["whole", "rows", "parts of rows"])
def test_tensors_layers_kinds_and_the_model(
    family: str, dtype: Any, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases.shrink_blocks(monkeypatch, block)
    base, tuned = cases.pair(family, dtype=dtype)
    report = compare(base, tuned)
    names = list(cases.shapes_of(family))
    assert sorted(e["tensor"] for e in report.tensors) == sorted(names)
    for entry in report.tensors:
        check(entry, base[entry["tensor"]], tuned[entry["tensor"]])
    check(report.model, joined(base, names), joined(tuned, names))
    for entries, key, group_of in (
        (report.layers, "layer", layer_of),
        (report.kinds, "kind", kind_of),
    ):
        groups = {entry[key]: [n for n in names if group_of(n) == entry[key]] for entry in entries}
        assert sorted(name for group in groups.values() for name in group) == sorted(names)
        for entry in entries:
            check(entry, joined(base, groups[entry[key]]), joined(tuned, groups[entry[key]]))


def test_the_order_is_that_of_relative_drift() -> None:
    report = compare(*cases.pair("bert"))
    relative = [entry["relative_l2"] for entry in report.tensors]
    assert relative == sorted(relative, reverse=True)
    layers = compare(*cases.pair("bert", layers=12)).layers
    assert [e["layer"] for e in layers] == ["", *(f"encoder.layer.{i}" for i in range(12))]


def test_what_has_no_relative_drift() -> None:
    zero, one = np.zeros(4, np.float32), np.ones(4, np.float32)
    report = compare({"a": one, "b": zero, "c": zero}, {"a": one * 2, "b": zero, "c": one})
    assert [(e["tensor"], e["relative_l2"]) for e in report.tensors] == [
        ("c", None),
        ("a", 1.0),
        ("b", None),
    ]
    assert [e["cosine"] for e in report.tensors] == [None, 1.0, None]


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_a_model_against_itself(family: str) -> None:
    base = cases.model(family)
    base[cases.EMBEDDING[family]][3, 2] = np.nan
    report = compare(base, {n: a.copy() for n, a in base.items()})
    for entry in (report.model, *report.tensors, *report.layers, *report.kinds):
        assert entry["bit_equal"]
        assert {entry[n] for n in ("changed", "l2", "max_abs", "mean", "std", "q99.9")} == {0}
        assert entry["cosine"] == pytest.approx(1)
    assert all(not entry["changed"] for entry in report.other)
    assert not any(report.top.values())


DRIFTS = hnp.arrays(
    np.float32,
    st.integers(1, 80),
    elements=st.floats(-(2.0**100), 2.0**100, width=32)
    | st.sampled_from([0.0, 1.0, 2.0**-126, 1.03125]),
)


@settings(max_examples=150, deadline=None)
@given(DRIFTS)
def test_quantiles_are_within_their_bound(drifts: Any) -> None:
    """Of normal numbers; below them the bins are no longer narrow."""
    drifts[np.abs(drifts) < 2.0**-126] = 0
    entry = compare({"w": np.zeros_like(drifts)}, {"w": drifts}).model
    sizes = np.sort(np.abs(drifts).astype(np.float64))
    for share in (0.5, 0.9, 0.99, 0.999):
        exact = sizes[math.ceil(share * sizes.size) - 1]
        assert abs(entry[f"q{share * 100:g}"] - exact) <= QUANTILE_ERROR * exact
        assert entry[f"q{share * 100:g}"] <= entry["max_abs"]


# --- odd values -------------------------------------------------------------------------------


def test_nan_and_infinity_are_counted_and_left_out() -> None:
    base, tuned = cases.pair("bert")
    first, second = cases.EMBEDDING["bert"], "embeddings.LayerNorm.weight"
    base[first][0, :2] = [np.nan, np.inf]
    tuned[first][3, 1:4] = [-np.inf, np.nan, np.nan]
    tuned[second][:] = np.nan
    report = compare(base, tuned)
    for entry in report.tensors:
        check(entry, base[entry["tensor"]], tuned[entry["tensor"]])
    assert report.model["skipped"] == 5 + 6
    assert (report.model["base_nan"], report.model["base_inf"]) == (1, 1)
    assert (report.model["tuned_nan"], report.model["tuned_inf"]) == (2 + 6, 1)
    assert "11 dimensions are NaN or infinite" in report.warnings[0]
    assert all(math.isfinite(e["drift"]) for e in report.top["dimensions"])


@pytest.mark.parametrize("value", [1e200, 1e300, 1e-200], ids=str)
def test_float64_beyond_float32(value: float, tmp_path: Path, capsys: Any) -> None:
    base = {"w": np.array([value, 1.0, 2.0, 3.0])}
    files = [cases.write_file(tmp_path / f"{i}.safetensors", {"w": base["w"] * i}) for i in (1, 2)]
    assert cases.wsurg("diff", *files, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"]["max_abs"] == max(value, 3.0)


def test_integers_are_compared_as_bytes() -> None:
    base, tuned = cases.pair("bert")
    report = compare(base, tuned)
    assert report.other == [
        {"tensor": "causal_mask", "changed": 12},
        {"tensor": "position_ids", "changed": 4},
    ]
    assert report.model["count"] == sum(base[n].size for n in cases.shapes_of("bert"))


def test_mixed_dtypes_are_compared_by_value() -> None:
    base = cases.model("bert", dtype=np.float32)
    tuned = cases.finetuned(cases.model("bert", dtype=cases.BF16))
    for entry in compare(base, tuned).tensors:
        check(entry, base[entry["tensor"]], tuned[entry["tensor"]])


def test_tied_copies_count_once() -> None:
    base, tuned = cases.pair("llama")
    embedding = cases.EMBEDDING["llama"]
    base["lm_head.weight"], tuned["lm_head.weight"] = base[embedding], tuned[embedding]
    given = [from_arrays(a, config={"tie_word_embeddings": True}) for a in (base, tuned)]
    report = diff(*given)
    assert "lm_head.weight" not in {e["tensor"] for e in report.tensors}
    names = [n for n in cases.shapes_of("llama") if n != "lm_head.weight"]
    check(report.model, joined(base, names), joined(tuned, names))


def test_packed_tensors_are_compared_not_refused() -> None:
    base, tuned = cases.pair("bert")
    base["layer.qweight"], tuned["layer.qweight"] = np.zeros(4, np.int32), np.ones(4, np.int32)
    report = compare(base, tuned)
    assert {"tensor": "layer.qweight", "changed": 4} in report.other
    assert any("packed tensors as bytes only" in warning for warning in report.warnings)


def test_an_extended_vocabulary_is_compared_on_its_common_rows() -> None:
    base, tuned = cases.pair("bert")
    name = cases.EMBEDDING["bert"]
    tuned[name] = np.concatenate([tuned[name], np.full((3, 6), 1e6, np.float32)])
    report = compare(base, tuned)
    (entry,) = [e for e in report.tensors if e["tensor"] == name]
    check(entry, base[name], tuned[name][:11])
    assert all(e["row"] < 11 for e in report.top["tokens"])
    assert report.alignment["partly_eligible"][0]["dimensions"] == 66


# --- what it costs, what it depends on --------------------------------------------------------


@pytest.mark.parametrize("shards", cases.SHARDS)
@pytest.mark.parametrize("workers", cases.WORKERS)
def test_sharding_and_workers_do_not_matter(
    shards: int, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases.shrink_blocks(monkeypatch, 16)
    base, tuned = cases.pair("gpt2")
    opened = [
        dataclasses.replace(
            open_checkpoint(cases.write_directory(tmp_path / name, arrays, shards=shards)),
            label="memory",
        )
        for name, arrays in (("base", base), ("tuned", tuned))
    ]
    plain = diff(from_arrays(base), from_arrays(tuned), engine=Engine(workers=1)).to_json()
    found = diff(*opened, engine=Engine(workers=workers)).to_json()
    assert json.dumps(found) == json.dumps(plain)


def test_every_block_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cases.shrink_blocks(monkeypatch, 16)
    watched = [cases.counted(from_arrays(arrays)) for arrays in cases.pair("bert")]
    diff(*(checkpoint for checkpoint, _ in watched), top=0)
    for checkpoint, reads in watched:
        assert sorted(reads) == sorted((n, *s) for n, v in checkpoint.items() for s in v.blocks())


def test_blocks_are_not_written_to() -> None:
    base, tuned = (from_arrays(arrays) for arrays in cases.pair("llama"))
    found = diff(cases.frozen(base), cases.frozen(tuned))
    assert found.to_json() == diff(base, tuned).to_json()


def test_the_report_has_its_schema() -> None:
    report = compare(*cases.pair("bert")).to_json()
    assert report["schema"] == "wsurg.diff/1"
    for entry in (report["model"], *report["tensors"], *report["layers"], *report["kinds"]):
        assert set(METRICS) < entry.keys()
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_refusals() -> None:
    base, tuned = cases.pair("bert")
    with pytest.raises(SettingError, match="top is -1; expected 0 or more"):
        compare(base, tuned, top=-1)
    with pytest.raises(MismatchError, match="no tensors of BASE and TUNED could be paired"):
        compare(base, {"other": np.zeros(3, np.float32)})


HEAD = "lm_head.weight"


def tied(copy_differs: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    base = cases.model("llama")
    tuned = cases.finetuned(base)
    tuned[HEAD] = tuned[cases.EMBEDDING["llama"]].copy()
    if copy_differs:
        tuned[HEAD][0] += 1
    return base, tuned


def test_an_equal_tied_copy_is_counted_once() -> None:
    base, tuned = tied(copy_differs=False)
    config = {"tie_word_embeddings": True}
    report = diff(from_arrays(base, config=config), from_arrays(tuned, config=config))
    assert HEAD not in {entry["tensor"] for entry in report.tensors}
    assert report.alignment["tied"] == [{"tensor": HEAD, "to": cases.EMBEDDING["llama"]}]
    assert report.warnings == []


def test_a_tied_copy_of_other_bytes_cannot_hide() -> None:
    base, tuned = tied(copy_differs=True)
    config = {"tie_word_embeddings": True}
    report = diff(from_arrays(base, config=config), from_arrays(tuned, config=config))
    assert HEAD in {entry["tensor"] for entry in report.tensors}
    (warning,) = report.warnings
    assert "its class and config.json tie it, but its stored values differ" in warning


def test_models_without_floating_tensors_are_compared_too() -> None:
    codes = {"w": np.arange(8, dtype=np.int32)}
    report = diff(from_arrays(codes), from_arrays({"w": codes["w"] + (codes["w"] > 5)}))
    assert report.other == [{"tensor": "w", "changed": 2}]
    assert report.model["count"] == 0


def test_models_of_other_shapes_throughout_are_refused() -> None:
    base, tuned = (from_arrays({"w": np.ones(n, np.float32)}) for n in (4, 5))
    with pytest.raises(MismatchError, match="no tensor of BASE and TUNED can be compared"):
        diff(base, tuned)


def test_the_cosine_of_near_models_is_not_rounded_away(rng: np.random.Generator) -> None:
    b = rng.standard_normal(1 << 18).astype(np.float32)
    t = (b + 1e-4 * rng.standard_normal(b.size)).astype(np.float32)
    found = diff(from_arrays({"w": b}), from_arrays({"w": t})).model["cosine"]
    x, y = b.astype(np.float64), t.astype(np.float64)
    true = 1 - (x @ y) / np.sqrt((x @ x) * (y @ y))
    assert 1 - found == pytest.approx(true, rel=1e-3)
