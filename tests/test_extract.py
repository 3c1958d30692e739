"""Adapters extracted from two models: what they keep, what they hold, who can read them."""

from __future__ import annotations

import json
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import cases, reference, tiny_models
from weightsurgery import (
    apply_adapter,
    extract_adapter,
    from_arrays,
    open_checkpoint,
    save,
    verify_adapter,
)
from weightsurgery.adapters import decompose, extract, memory
from weightsurgery.adapters.places import find_places
from weightsurgery.alignment import align
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.errors import (
    MismatchError,
    NonFiniteError,
    PolicyError,
    SettingError,
    SurgeryError,
)
from weightsurgery.stream import Engine

FAMILIES = pytest.mark.parametrize("family", cases.FAMILIES)
FRONT = "base_model.model."


def pair_of(
    base: cases.Arrays, tuned: cases.Arrays, **fields: Any
) -> tuple[Checkpoint, Checkpoint]:
    return from_arrays(base, label="base", **fields), from_arrays(tuned, label="tuned", **fields)


def one_matrix(drift: Any) -> tuple[Checkpoint, Checkpoint]:
    """A pair of models of one matrix, whose difference is exactly the drift."""
    name = "layers.0.mlp.up_proj.weight"
    return pair_of({name: np.zeros_like(drift)}, {name: drift})


def report_of(adapter: Checkpoint) -> Any:
    return adapter.notes["adapter"]


def product_of(adapter: Checkpoint) -> Any:
    """B·A of an adapter of one matrix, in float64."""
    arrays = {name.rpartition("lora_")[2]: a for name, a in cases.read(adapter).items()}
    return arrays["B.weight"].astype("f8") @ arrays["A.weight"].astype("f8")


def decaying(rows: int, columns: int, *, power: float, seed: int = 0) -> Any:
    """A float32 matrix whose singular values are 1, 2^-power, 3^-power and so on."""
    rng = np.random.default_rng(seed)
    least = min(rows, columns)
    left, right = (np.linalg.qr(rng.normal(size=(n, least)))[0] for n in (rows, columns))
    values = np.arange(1.0, least + 1) ** -power
    return ((left * values) @ right.T).astype("f4")


# --- what is kept -----------------------------------------------------------------------------


@pytest.mark.parametrize("svd", ["exact", "randomised"])
@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("shape", [(9, 7), (7, 12), (8, 8)])
def test_what_is_left_are_the_other_singular_values(
    shape: tuple[int, int], rank: int, svd: str
) -> None:
    drift = np.random.default_rng(0).normal(size=shape).astype("f4")
    expected, left = reference.truncated(drift, rank)
    adapter = extract_adapter(*one_matrix(drift), rank=rank, svd=svd)
    np.testing.assert_allclose(product_of(adapter), expected, atol=1e-5)
    (told,) = report_of(adapter)["matrices"]
    norm = np.linalg.norm(drift.astype("f8"))
    assert told["rank"] == rank
    assert told["method"] == svd
    assert told["drift"] == pytest.approx(norm, rel=1e-6)
    assert told["residual"] == pytest.approx(left, rel=1e-5, abs=1e-5)
    assert told["relative_residual"] == pytest.approx(left / norm, rel=1e-5, abs=1e-5)
    assert told["energy_kept"] == pytest.approx(1 - (left / norm) ** 2, abs=1e-6)


def test_rows_in_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    drift = decaying(40, 30, power=1)
    for elements in (1, 31, 64, 1200):  # less than a row, one row, two, all
        monkeypatch.setattr(decompose, "BLOCK", elements)
        adapter = extract_adapter(*one_matrix(drift), rank=4, svd="randomised")
        expected, left = reference.truncated(drift, 4)
        np.testing.assert_allclose(product_of(adapter), expected, atol=1e-3)
        assert report_of(adapter)["residual"] == pytest.approx(left, rel=1e-3)


@pytest.mark.parametrize(("power", "within"), [(2.0, 1e-4), (1.0, 1e-2), (0.5, 3e-2)])
@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
def test_the_randomised_decomposition_is_close_to_the_exact_one(
    shape: tuple[int, int], power: float, within: float
) -> None:
    drift = decaying(*shape, power=power)
    least = reference.truncated(drift, 8)[1]
    found = []
    for iterations in (0, 1, 4):
        settings: dict[str, Any] = {"svd": "randomised", "power_iterations": iterations}
        adapter = extract_adapter(*one_matrix(drift), rank=8, **settings)
        found.append(report_of(adapter)["residual"])
    assert found[0] >= found[1] >= found[2] >= least * (1 - 1e-6)
    assert found[2] < least * (1 + within)
    assert found[0] > found[2] * (1 + 1e-7)


def test_a_drift_of_low_rank_is_found_whole_and_the_rest_is_zero() -> None:
    rng = np.random.default_rng(0)
    drift = (rng.integers(-3, 4, (60, 3)) @ rng.integers(-3, 4, (3, 50))).astype("f4")
    for svd in ("exact", "randomised"):
        adapter = extract_adapter(*one_matrix(drift), rank=6, svd=svd)
        np.testing.assert_allclose(product_of(adapter), drift, atol=1e-4)
        for name, array in cases.read(adapter).items():
            axis = 1 if "lora_A" in name else 0
            assert (np.abs(array).max(axis=axis) > 0).tolist() == [True] * 3 + [False] * 3
        told = report_of(extract_adapter(*one_matrix(drift), energy=1.0, svd=svd))
        assert told["matrices"][0]["rank"] == 3


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_tiny_and_huge_drifts(size: float) -> None:
    drift = decaying(90, 70, power=1.0)
    expected = report_of(extract_adapter(*one_matrix(drift), rank=3, svd="randomised"))
    scaled = (drift * size).astype("f4")
    found = report_of(extract_adapter(*one_matrix(scaled), rank=3, svd="randomised"))
    assert found["energy_kept"] == pytest.approx(expected["energy_kept"], rel=1e-4)
    assert found["residual"] == pytest.approx(expected["residual"] * size, rel=1e-4)


def test_factors_are_of_one_size_and_their_signs_are_settled() -> None:
    drift = np.random.default_rng(1).normal(size=(12, 10)).astype("f4")
    for negated in (drift, -drift):
        arrays = cases.read(extract_adapter(*one_matrix(negated), rank=10))
        b, a = (arrays[f"{FRONT}layers.0.mlp.up_proj.lora_{x}.weight"] for x in "BA")
        values = np.linalg.svd(drift, compute_uv=False)
        np.testing.assert_allclose((a**2).sum(axis=1), values, rtol=1e-4)
        np.testing.assert_allclose((b**2).sum(axis=0), values, rtol=1e-4)
        assert a.dtype == b.dtype == np.float32
        assert (a[np.arange(10), np.abs(a).argmax(axis=1)] > 0).all()


@pytest.mark.parametrize("svd", ["exact", "randomised"])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_the_least_rank_that_keeps_the_energy(share: float, svd: str) -> None:
    drift = decaying(120, 90, power=1)
    rank = reference.least_rank(drift, share)
    told = report_of(extract_adapter(*one_matrix(drift), energy=share, svd=svd))["matrices"][0]
    # Random directions may need a few more.
    assert rank <= told["rank"] <= rank + (0 if svd == "exact" else 2)
    assert told["energy_kept"] >= share - 1e-6
    capped = report_of(extract_adapter(*one_matrix(drift), energy=share, max_rank=2, svd=svd))
    assert capped["matrices"][0]["rank"] == min(2, rank)


def test_energy_beyond_the_first_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompose, "BEGIN", 2)
    drift = decaying(100, 80, power=0.5)
    told = report_of(extract_adapter(*one_matrix(drift), energy=0.8, svd="randomised"))
    rank = reference.least_rank(drift, 0.8)
    assert rank > 20
    assert rank <= told["matrices"][0]["rank"] <= rank + 3


def test_methods_are_chosen_by_size_and_rank() -> None:
    rng = np.random.default_rng(0)
    large = rng.normal(size=(600, 600)).astype("f4")
    found = [
        report_of(extract_adapter(*one_matrix(drift), rank=rank))["matrices"][0]["method"]
        for drift, rank in ((large[:, :500], 4), (large, 4), (large, 400))
    ]
    assert found == ["exact", "randomised", "exact"]


def test_a_seed_changes_the_randomised_one_alone() -> None:
    drift = np.random.default_rng(0).normal(size=(40, 30)).astype("f4")
    for svd, differ in (("exact", False), ("randomised", True)):
        one, two = (
            cases.read(extract_adapter(*one_matrix(drift), rank=2, svd=svd, seed=seed))
            for seed in (0, 1)
        )
        assert (cases.stored(one) != cases.stored(two)) is differ


def test_torch_gives_nearly_the_same() -> None:
    drift = decaying(80, 60, power=1)
    for svd in ("exact", "randomised"):
        ours, torchs = (
            product_of(extract_adapter(*one_matrix(drift), rank=3, svd=svd, device=device))
            for device in (None, "cpu")
        )
        np.testing.assert_allclose(ours, torchs, atol=1e-5)


@FAMILIES
def test_the_widest_float_counts(family: str) -> None:
    base = cases.model(family, dtype="f8")
    tuned = cases.finetuned(base, size=1e-9)  # below float32's resolution next to the weights
    adapter = extract_adapter(*pair_of(base, tuned), rank=20)
    merged = cases.read(apply_adapter(from_arrays(base), adapter, force_base=True))
    matrices = [one["tensor"] for one in report_of(adapter)["matrices"]]
    assert matrices
    for name in matrices:
        drift = tuned[name] - base[name]
        np.testing.assert_allclose(merged[name] - base[name], drift, atol=1e-6 * 1e-9 * 10)


def test_progress_ends_at_all_there_is() -> None:
    told: list[tuple[str, int, int]] = []
    engine = Engine(workers=2, progress=lambda *report: told.append(report))
    base, tuned = cases.pair("bert")
    extract_adapter(*pair_of(base, tuned), engine=engine)
    total = sum(array.nbytes for array in (*base.values(), *tuned.values()))
    assert told[-1] == ("decomposing", total, total)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_memory_stays_below_the_drift() -> None:
    rng = np.random.default_rng(0)
    tuned = rng.normal(size=(12_000, 640)).astype("f4")
    given = one_matrix(tuned)
    extract_adapter(*given, rank=2, svd="randomised", engine=Engine(workers=1))  # compiles
    tracemalloc.start()
    try:
        extract_adapter(*given, rank=4, svd="randomised", engine=Engine(workers=1))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < tuned.nbytes


# --- there and back ---------------------------------------------------------------------------


def spoiled(path: Path, out: Path, dtype: str, *, size: float = 0.05) -> Path:
    """A directory's model with every floating weight moved, in a dtype."""
    from safetensors.numpy import load_file

    rng = np.random.default_rng(5)
    out.mkdir()
    arrays = load_file(path / "model.safetensors")
    moved = {
        name: (array + rng.normal(0, size, array.shape)).astype(cases.DTYPES[dtype])
        for name, array in arrays.items()
    }
    for file in path.iterdir():
        if file.name != "model.safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    cases.write_file(out / "model.safetensors", moved)
    return out


def tiny_pair(folder: Path, family: str, dtype: str = "F32") -> tuple[Checkpoint, Checkpoint]:
    """A model that transformers loads, and one fine-tuned from it, both in a dtype."""
    made = getattr(tiny_models, family)(folder / "made")
    paths = [
        spoiled(made, folder / name, dtype, size=size)
        for name, size in (("base", 0.0), ("tuned", 0.05))
    ]
    base, tuned = map(open_checkpoint, paths)
    return base, tuned


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gpt2_classifier"])
def test_at_full_rank_applying_gives_tuned_back(family: str, dtype: str, tmp_path: Path) -> None:
    base, tuned = tiny_pair(tmp_path, family, dtype)
    save(extract_adapter(base, tuned, rank=1000), tmp_path / "adapter")
    adapter = open_checkpoint(tmp_path / "adapter")
    merged = apply_adapter(base, adapter)  # names its base, so needs no force
    assert not merged.warnings
    found, expected = cases.read(merged), cases.read(tuned)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        step = np.spacing(np.abs(array)).astype("f8")
        off = np.abs(found[name].astype("f8") - array.astype("f8"))
        # A sum near zero has steps finer than the drift's own rounding.
        assert (off <= np.maximum(step, 2**-24)).all(), name
        assert np.mean(off > 0) < (0.6 if dtype == "F32" else 0.05), name
    save(merged, tmp_path / "merged")
    assert verify_adapter(base, [adapter], open_checkpoint(tmp_path / "merged"))["proved"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("settings", [{"rank": 2}, {"energy": 0.7}], ids=["rank", "energy"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gpt2_classifier"])
def test_peft_loads_it_and_computes_what_the_merged_model_does(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    import peft
    import torch
    import transformers

    base, tuned = tiny_pair(tmp_path, family)
    save(extract_adapter(base, tuned, **settings), tmp_path / "adapter")
    save(apply_adapter(base, open_checkpoint(tmp_path / "adapter")), tmp_path / "merged")
    kind = getattr(transformers, base.config["architectures"][0])
    tokens = torch.arange(6, 18).reshape(2, 6)
    with torch.no_grad():
        plain, merged = (
            kind.from_pretrained(tmp_path / name).eval()(input_ids=tokens).logits
            for name in ("base", "merged")
        )
        adapted = peft.PeftModel.from_pretrained(
            kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
        )
        found = adapted.eval()(input_ids=tokens).logits
    torch.testing.assert_close(found, merged, rtol=1e-4, atol=1e-5)
    assert (merged - plain).abs().max() > 0.01
    config = adapted.peft_config["default"]
    if "energy" in settings:
        assert len(set(config.rank_pattern.values()) | {config.r}) > 1
        assert config.alpha_pattern == config.rank_pattern


def merged_by_peft(module: Any, base: cases.Arrays, adapter: Path) -> cases.Arrays:
    """A torch module's tensors after PEFT loaded an adapter and folded it in."""
    import peft
    import torch

    module.load_state_dict({name: torch.from_numpy(array) for name, array in base.items()})
    adapted = peft.PeftModel.from_pretrained(module, adapter)
    return {n: tensor.numpy() for n, tensor in adapted.merge_and_unload().state_dict().items()}


def test_convolutions_in_peft(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    layers = {
        "one": torch.nn.Conv1d(4, 6, 3),
        "two": torch.nn.Conv2d(4, 6, (3, 2)),
        "pixel": torch.nn.Conv2d(4, 6, 1),
        "each": torch.nn.Conv1d(4, 4, 3, groups=4),
    }
    module = torch.nn.ModuleDict(layers)
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        save_file(module.state_dict(), tmp_path / name / "model.safetensors")
        for parameter in module.parameters() if name == "base" else ():
            parameter.data += 0.1 * torch.randn(parameter.shape)
    base, tuned = (open_checkpoint(tmp_path / name) for name in ("base", "tuned"))
    save(extract_adapter(base, tuned, rank=30), tmp_path / "adapter")
    found = cases.read(apply_adapter(base, open_checkpoint(tmp_path / "adapter")))
    theirs = merged_by_peft(module, cases.read(base), tmp_path / "adapter")
    for name, array in cases.read(tuned).items():
        np.testing.assert_allclose(found[name], array, atol=1e-6)
        np.testing.assert_allclose(theirs[name], array, atol=1e-6)
    layouts = {
        one["tensor"]: one["layout"] for one in report_of(extract_adapter(base, tuned))["matrices"]
    }
    assert layouts == dict.fromkeys(("one.weight", "pixel.weight", "two.weight"), "convolution")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_head_that_base_lacks_is_held_if_asked_for(tmp_path: Path) -> None:
    import peft
    import torch
    import transformers

    _, tuned = tiny_pair(tmp_path, "bert")
    bare = {
        name.removeprefix("bert."): array
        for name, array in cases.read(open_checkpoint(tmp_path / "base")).items()
        if name.startswith("bert.")
    }
    base = open_checkpoint(cases.write_directory(tmp_path / "bare", bare, config=tuned.config))
    without = extract_adapter(base, tuned, rank=4)
    left_out = {one["tensor"]: one["reason"] for one in report_of(without)["left_out"]}
    assert left_out == dict.fromkeys(
        ("classifier.bias", "classifier.weight"), "a task head that BASE lacks"
    )
    assert any("2 tensors that differ are not in the adapter" in w for w in without.warnings)
    merged = cases.read(apply_adapter(base, without, force_base=True))  # found by its prefix
    name = "encoder.layer.0.output.dense.weight"
    assert not np.array_equal(merged[name], bare[name])

    held = extract_adapter(base, tuned, rank=1000, whole=["classifier.*"])
    save(held, tmp_path / "adapter")
    assert not report_of(held)["left_out"]
    kind = transformers.BertForSequenceClassification
    tokens = torch.arange(6, 18).reshape(2, 6)
    with torch.no_grad():
        adapted = peft.PeftModel.from_pretrained(
            kind.from_pretrained(tmp_path / "bare"), tmp_path / "adapter"
        )
        found = adapted.eval()(input_ids=tokens).logits
        expected = kind.from_pretrained(tmp_path / "tuned").eval()(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_rows_of_a_tied_embedding_that_moved(tmp_path: Path) -> None:
    base = cases.model("gpt2", dtype="f4")
    tuned = dict(base)
    rows = [0, 3, 4, 5, 10]
    tuned["wte.weight"] = base["wte.weight"].copy()
    tuned["wte.weight"][rows] += 1
    config = {"model_type": "gpt2", "tie_word_embeddings": True}
    for name, arrays in (("base", base), ("tuned", tuned)):
        cases.write_directory(tmp_path / name, arrays, config=config)
    given = [open_checkpoint(tmp_path / name) for name in ("base", "tuned")]
    adapter = extract_adapter(*given)
    assert adapter.config["trainable_token_indices"] == {"wte": rows}
    name = f"{FRONT}wte.token_adapter.trainable_tokens_delta"
    assert cases.read(adapter).keys() == {name}
    view = adapter[name]
    for start in range(view.size):  # any run of the elements
        for stop in range(start, view.size + 1):
            expected = tuned["wte.weight"][rows].ravel()[start:stop]
            assert np.array_equal(view.read(start, stop), expected)
    save(adapter, tmp_path / "adapter")
    merged = cases.read(apply_adapter(given[0], open_checkpoint(tmp_path / "adapter")))
    assert cases.stored(merged) == cases.stored(tuned)


TIED: dict[str, tuple[list[str], bool | None, str]] = {
    "a classifier": (["GPT2ForSequenceClassification"], True, "factors"),
    "the bare model": (["GPT2Model"], None, "factors"),
    "a language model": (["GPT2LMHeadModel"], None, "rows"),
    "a masked one": (["BertForMaskedLM"], None, "rows"),
    "untied": (["GPT2LMHeadModel"], False, "factors"),
}


@pytest.mark.parametrize("case", TIED)
def test_an_embedding_is_held_as_rows_only_where_a_head_is_tied_to_it(case: str) -> None:
    architectures, said, how = TIED[case]
    config: dict[str, Any] = {"architectures": architectures}
    config |= {"tie_word_embeddings": said} if said is not None else {}
    family = "bert" if "Bert" in architectures[0] else "gpt2"
    base, tuned = cases.pair(family, dtype="f4")
    given = (from_arrays(one, config={**cases.CONFIGS[family], **config}) for one in (base, tuned))
    places = {p.pair.name: p.how for p in find_places(align(*given))}
    assert places[cases.EMBEDDING[family]] == how


def test_the_embedding_of_a_classifier_goes_into_factors(tmp_path: Path) -> None:
    adapter = cases.read(extract_adapter(*tiny_pair(tmp_path, "gpt2_classifier"), rank=2))
    assert f"{FRONT}transformer.wte.lora_embedding_A" in adapter


def test_an_adapter_can_be_copied(tmp_path: Path) -> None:
    base, tuned = cases.pair("bert")
    save(extract_adapter(*pair_of(base, tuned)), tmp_path / "one")
    save(open_checkpoint(tmp_path / "one"), tmp_path / "two")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    with pytest.raises(SettingError, match="cannot be sharded"):
        save(open_checkpoint(tmp_path / "one"), tmp_path / "three", max_shard_size=100)


# --- what goes where --------------------------------------------------------------------------


@FAMILIES
def test_nothing_that_moved_is_lost_from_sight(family: str) -> None:
    base, tuned = cases.pair(family)
    adapter = extract_adapter(*pair_of(base, tuned), rank=2)
    told = report_of(adapter)
    named = [one["tensor"] for key in ("matrices", "whole", "left_out") for one in told[key]]
    moved = [name for name in base if base[name].tobytes() != tuned[name].tobytes()]
    assert sorted(named) == sorted(moved)
    assert told["unmoved"] == len(base) - len(moved)
    assert {one["tensor"] for one in told["left_out"]} == {"causal_mask", "position_ids"}
    assert told["parameters"] == adapter.size


def test_the_rest_can_be_listed_instead() -> None:
    base, tuned = cases.pair("bert")
    told = report_of(extract_adapter(*pair_of(base, tuned), rest="list"))
    assert told["whole"] == []
    reasons = {one["tensor"]: one["reason"] for one in told["left_out"]}
    assert reasons["embeddings.LayerNorm.weight"] == "a vector"
    assert reasons["encoder.layer.0.attention.self.query.bias"] == "a bias"
    some = extract_adapter(*pair_of(base, tuned), rest="list", whole=["*LayerNorm.weight"])
    assert [one["tensor"] for one in report_of(some)["whole"]] == ["embeddings.LayerNorm.weight"]
    assert some.config["modules_to_save"] == ["embeddings.LayerNorm"]


def test_globs_choose_and_what_they_leave_out_is_listed() -> None:
    base, tuned = cases.pair("llama")
    name = "model.layers.0.mlp.gate_proj.weight"
    told = report_of(extract_adapter(*pair_of(base, tuned), include=["*gate_proj*"]))
    assert [one["tensor"] for one in told["matrices"]] == [name, name.replace("0", "1")]
    assert {one["reason"] for one in told["left_out"]} >= {"not included"}
    adapter = extract_adapter(*pair_of(base, tuned), exclude=["*gate_proj*"])
    assert name not in [one["tensor"] for one in report_of(adapter)["matrices"]]
    assert {"tensor": name, "reason": "excluded"} in report_of(adapter)["left_out"]
    whole = extract_adapter(*pair_of(base, tuned), whole=[name])
    assert whole[f"{FRONT}{name}"].dtype.name == "BF16"
    merged = cases.read(apply_adapter(from_arrays(base), whole, force_base=True))
    assert merged[name].tobytes() == tuned[name].tobytes()


def test_what_is_saved_with_a_module_but_excluded_stays_bases() -> None:
    base = {"a.norm.weight": np.ones(3, "f4"), "a.norm.bias": np.ones(3, "f4")}
    tuned = {name: array * 2 for name, array in base.items()}
    adapter = extract_adapter(*pair_of(base, tuned), exclude=["*.bias"])
    found = cases.read(adapter)
    assert found[f"{FRONT}a.norm.weight"].tolist() == [2, 2, 2]
    assert found[f"{FRONT}a.norm.bias"].tolist() == [1, 1, 1]  # PEFT wants all of a module
    assert report_of(adapter)["left_out"] == [{"tensor": "a.norm.bias", "reason": "excluded"}]


def test_modules_that_peft_takes_for_the_saved_one_come_along(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = ["norm.weight", "layers.0.input_norm.weight", "layers.0.q.weight"]
    base = {name: rng.normal(size=(3, 3) if "q" in name else 3).astype("f4") for name in names}
    tuned = {**base, "norm.weight": base["norm.weight"] + 1}
    tuned["layers.0.q.weight"] = base["layers.0.q.weight"] + np.float32(0.1)
    adapter = extract_adapter(*pair_of(base, tuned))
    assert adapter.config["modules_to_save"] == ["layers.0.input_norm", "norm"]
    assert {f"{FRONT}layers.0.input_norm.weight", f"{FRONT}norm.weight"} < adapter.keys()
    save(adapter, tmp_path / "adapter")
    import torch

    def leaf(name: str) -> Any:
        return torch.nn.Linear(3, 3, bias=False) if "q" in name else torch.nn.RMSNorm(3)

    module = nested([name.removesuffix(".weight") for name in names], leaf)
    theirs = merged_by_peft(module, base, tmp_path / "adapter")
    for name, array in tuned.items():
        np.testing.assert_allclose(theirs[name], array, atol=1e-6)


def nested(names: list[str], leaf: Any) -> Any:
    """A torch module with leaves of these dotted names."""
    import torch

    root = torch.nn.ModuleDict()
    for name in names:
        here = root
        *path, last = name.split(".")
        for part in path:
            if part not in here:
                here[part] = torch.nn.ModuleDict()
            here = here[part]
        here[last] = leaf(name)
    return root


def test_names_that_end_alike_are_told_apart(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = ["mlp.up.weight", "other.mlp.up.weight", "more.mlp.up.weight"]
    base = {name: rng.normal(size=(6, 6)).astype("f4") for name in names}
    drift = {
        "mlp.up.weight": np.outer(np.ones(6), np.ones(6)),
        "other.mlp.up.weight": rng.normal(size=(6, 6)),
    }
    tuned = {n: (a + drift.get(n, 0)).astype("f4") for n, a in base.items()}
    adapter = extract_adapter(*pair_of(base, tuned), energy=0.999999)
    assert adapter.config["exclude_modules"] == ["more.mlp.up"]
    assert adapter.config["r"] == 6
    assert adapter.config["rank_pattern"] == {"^mlp.up": 1}
    merged = cases.read(apply_adapter(from_arrays(base), adapter, force_base=True))
    save(adapter, tmp_path / "adapter")
    import torch

    modules = [name.removesuffix(".weight") for name in names]
    module = nested(modules, lambda _: torch.nn.Linear(6, 6, bias=False))
    theirs = merged_by_peft(module, base, tmp_path / "adapter")
    for name, array in tuned.items():
        np.testing.assert_allclose(merged[name], array, atol=1e-2)
        np.testing.assert_allclose(theirs[name], array, atol=1e-2)


PLACES: dict[str, tuple[dict[str, tuple[int, ...]], str, str]] = {
    "router": ({"l.0.mlp.gate.weight": (4, 6)}, "whole", "a router"),
    "experts": ({"mlp.experts.gate_up_proj": (3, 6, 6)}, "whole", "not the weight of a module"),
    "stack": ({"moe.input_linear.weight": (3, 64, 64)}, "whole", "a stack of matrices"),
    "positions": ({"wpe.weight": (5, 6)}, "whole", "an embedding of something else than words"),
    "T5's": (
        {"a.relative_attention_bias.weight": (32, 8)},
        "whole",
        "an embedding of something else than words",
    ),
    "Linear beside Conv1D": (
        {"a.lin.weight": (2, 6), "a.c_attn.weight": (6, 18), "a.c_attn.bias": (18,)},
        "whole",
        "a linear layer beside Conv1D; one adapter holds one of the two",
    ),
    "of no module": ({"alone": (6,)}, "nowhere", "not the weight of a module; it belongs to no"),
    "above factors": (
        {"m.token": (6,), "m.up_proj.weight": (6, 6)},
        "nowhere",
        "not the weight of a module; its module holds others that go into factors",
    ),
    "empty": ({"a.weight": (0, 6), "b.up.weight": (2, 2)}, "nowhere", "empty"),
    "scalar": ({"a.norm.weight": ()}, "whole", "a scalar"),
    "depthwise": ({"a.conv.weight": (6, 1, 4)}, "whole", "a convolution of single channels"),
}


@pytest.mark.parametrize("case", PLACES)
def test_places(case: str) -> None:
    shapes, how, reason = PLACES[case]
    alignment = align(cases.zeros(shapes), cases.zeros(shapes), mismatched="keep")
    place = next(p for p in find_places(alignment) if p.pair.name == next(iter(shapes)))
    assert place.how == how
    assert place.reason.startswith(reason)


def test_a_module_with_integers_is_not_saved() -> None:
    arrays = {"bn.weight": np.ones(3, "f4"), "bn.num_batches_tracked": np.array(3)}
    alignment = align(*pair_of(arrays, arrays), mismatched="keep")
    assert [p.how for p in find_places(alignment)] == ["nowhere", "nowhere"]


def test_a_head_that_tuned_unties_is_left_out() -> None:
    base = cases.model("llama", dtype="f4")
    del base["lm_head.weight"]
    tuned = cases.finetuned(base) | {"lm_head.weight": base["model.embed_tokens.weight"] + 1}
    given = from_arrays(base, config={"tie_word_embeddings": True}), from_arrays(tuned)
    left_out = report_of(extract_adapter(*given))["left_out"]
    reason = "BASE ties it to the word embedding; an adapter cannot untie it"
    assert {"tensor": "lm_head.weight", "reason": reason} in left_out


def test_a_tied_copy_counts_only_if_it_differs() -> None:
    base = cases.model("llama", dtype="f4")
    base["lm_head.weight"] = base["model.embed_tokens.weight"]
    tuned = cases.finetuned(base)
    tuned["lm_head.weight"] = tuned["model.embed_tokens.weight"]
    fields = {"config": {"tie_word_embeddings": True}}
    told = report_of(extract_adapter(*pair_of(base, tuned, **fields)))
    assert "lm_head.weight" not in [one["tensor"] for one in told["left_out"]]
    tuned["lm_head.weight"] = tuned["lm_head.weight"] + 1
    told = report_of(extract_adapter(*pair_of(base, tuned, **fields)))
    (reason,) = (one["reason"] for one in told["left_out"] if one["tensor"] == "lm_head.weight")
    assert "an adapter cannot untie it" in reason


def test_the_base_is_named_without_its_place(tmp_path: Path) -> None:
    base, tuned = cases.pair("bert")
    for name, arrays in (("base", base), ("tuned", tuned)):
        cases.write_directory(tmp_path / name, arrays)
    given = [open_checkpoint(tmp_path / name) for name in ("base", "tuned")]
    config = extract_adapter(*given).config
    assert (config["base_model_name_or_path"], config["revision"]) == ("base", None)
    other = extract_adapter(*given, base_name="org/name").config
    assert other["base_model_name_or_path"] == "org/name"
    hub = from_arrays(base, label="org/name@main", hub_id="org/name@abc"), given[1]
    config = extract_adapter(*hub).config
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/name", "abc")


# --- what is refused --------------------------------------------------------------------------


def with_value(value: float, name: str) -> Callable[[cases.Arrays], cases.Arrays]:
    def change(arrays: cases.Arrays) -> cases.Arrays:
        changed = arrays[name].copy()
        changed.flat[1] = value
        return {**arrays, name: changed}

    return change


QUERY = "encoder.layer.0.attention.self.query.weight"
NORM = "embeddings.LayerNorm.weight"
WORDS = cases.EMBEDDING["bert"]
REFUSED: dict[str, tuple[dict[str, Any], Callable[..., cases.Arrays], type[SurgeryError], str]] = {
    "NaN": ({}, with_value(np.nan, QUERY), NonFiniteError, f"{QUERY}'.*NaN or infinity"),
    "infinity": ({}, with_value(np.inf, NORM), NonFiniteError, f"{NORM}'.*NaN or infinity"),
    "overflow": ({}, with_value(3e38, QUERY), NonFiniteError, f"{QUERY}'.*NaN or infinity"),
    "rank 0": ({"rank": 0}, dict, SettingError, "rank is 0; expected an integer from 1"),
    "rank -3": ({"rank": -3}, dict, SettingError, "rank is -3"),
    "rank 1.5": ({"rank": 1.5}, dict, SettingError, "rank is 1.5"),
    "max_rank 0": ({"energy": 0.5, "max_rank": 0}, dict, SettingError, "max_rank is 0"),
    "energy 0": ({"energy": 0.0}, dict, SettingError, "energy is 0.0; expected a share above 0"),
    "energy 1.5": ({"energy": 1.5}, dict, SettingError, "energy is 1.5"),
    "energy NaN": ({"energy": float("nan")}, dict, SettingError, "energy is nan"),
    "both": ({"energy": 0.5, "rank": 2}, dict, SettingError, "rank and energy are both"),
    "max_rank": ({"rank": 2, "max_rank": 2}, dict, SettingError, "max_rank is given without"),
    "iterations": ({"power_iterations": -1}, dict, SettingError, "power_iterations is -1"),
    "oversampling": ({"oversampling": -1}, dict, SettingError, "oversampling is -1"),
    "iterations of none": (
        {"svd": "exact", "power_iterations": 4},
        dict,
        SettingError,
        "power_iterations is given, and svd is exact",
    ),
    "oversampling of none": (
        {"svd": "exact", "oversampling": 0},
        dict,
        SettingError,
        "oversampling is given, and svd is exact",
    ),
    "svd": ({"svd": "fast"}, dict, SettingError, "svd is 'fast'; expected auto or exact"),
    "rest": ({"rest": "drop"}, dict, SettingError, "rest is 'drop'; expected whole or list"),
    "device": ({"device": "abacus"}, dict, SettingError, "device 'abacus'"),
    "a glob": ({"include": ["*.quarry.*"]}, dict, SettingError, "matches no tensor"),
    "a glob of whole": ({"whole": ["x*"]}, dict, SettingError, "'x.' matches no tensor"),
    "nothing left": ({"exclude": ["*"]}, dict, SettingError, "leave nothing"),
    "another shape": (
        {},
        lambda arrays: {**arrays, QUERY: np.ones((6, 7), "f4")},
        MismatchError,
        f"{QUERY}'.*shapes differ.*--exclude",
    ),
    "integers on one side": (
        {},
        lambda arrays: {**arrays, QUERY: np.ones((6, 6), "i4")},
        MismatchError,
        f"{QUERY}'.*floating on one side only.*--exclude",
    ),
    "quantised": (
        {},
        lambda arrays: {**arrays, "a.qweight": np.ones((6, 7), "i4")},
        PolicyError,
        "stores GPTQ or AWQ codes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_error_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    settings, change, kind, reason = REFUSED[case]
    base = cases.model("bert")
    if case == "overflow":
        base = with_value(-3e38, QUERY)(base)
    cases.write_directory(tmp_path / "base", base)
    cases.write_directory(tmp_path / "tuned", change(cases.finetuned(base)))
    before = cases.digests(tmp_path)
    with pytest.raises(kind, match=reason) as told:
        extract_adapter(*(open_checkpoint(tmp_path / n) for n in ("base", "tuned")), **settings)
    assert type(told.value) is kind
    assert "\n" not in str(told.value)
    assert cases.digests(tmp_path) == before


def test_without_drift_there_is_nothing_to_extract() -> None:
    base = cases.model("bert")
    with pytest.raises(MismatchError, match="nothing moved between BASE and TUNED"):
        extract_adapter(*pair_of(base, base))
    tuned = {**base, "position_ids": base["position_ids"] + 1}
    with pytest.raises(MismatchError, match=r"nothing moved.*'position_ids': not floating"):
        extract_adapter(*pair_of(base, tuned))


def test_an_excluded_vocabulary_is_listed() -> None:
    base, tuned = cases.pair("bert")
    tuned[WORDS] = np.ones((13, 6), "f4")
    told = report_of(extract_adapter(*pair_of(base, tuned), exclude=[WORDS]))
    assert {"tensor": WORDS, "reason": "excluded"} in told["left_out"]


def test_a_drift_that_float32_cannot_factor_is_refused() -> None:
    drift = np.full((3, 3), 1e80)
    with pytest.raises(NonFiniteError, match=r"a drift of norm 3e\+80, too large for factors"):
        extract_adapter(*one_matrix(drift))
    extract_adapter(*one_matrix(drift * 1e-10))


def test_a_new_head_of_nan_is_refused() -> None:
    base, tuned = cases.pair("bert")
    tuned["classifier.weight"] = np.full((2, 6), np.nan, "f4")
    with pytest.raises(NonFiniteError, match=r"classifier\.weight.*NaN or infinity in TUNED"):
        extract_adapter(*pair_of(base, tuned), whole=["classifier.*"])


# --- bytes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [["--rank", "3"], ["--energy", "0.8"]], ids=["rank", "energy"])
@pytest.mark.parametrize("svd", ["exact", "randomised"])
def test_workers_and_shards_do_not_matter(
    svd: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases.shrink_blocks(monkeypatch, 32)
    monkeypatch.setattr(decompose, "BLOCK", 32)
    found = []
    for shards in cases.SHARDS:
        place = tmp_path / str(shards)
        for name, arrays in zip(("base", "tuned"), cases.pair("llama", layers=4), strict=True):
            cases.write_directory(
                place / name, arrays, shards=shards, config=cases.CONFIGS["llama"]
            )
        for workers in cases.WORKERS:
            out = place / f"out{workers}"
            given = [place / "base", place / "tuned", *options, "--svd", svd]
            assert cases.wsurg("extract-adapter", *given, "--workers", workers, "-o", out) == 0
            files = cases.digests(out)
            record = json.loads((out / "wsurg-record.json").read_text())
            del record["inputs"], record["record_sha256"]  # how the inputs are stored
            del files["wsurg-record.json"]
            found.append((files, record))
    assert all(one == found[0] for one in found)
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert found[0][0].keys() == names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, arrays in zip(("base", "tuned"), cases.pair("bert"), strict=True):
        cases.write_directory(tmp_path / name, arrays, config=cases.CONFIGS["bert"])
    return tmp_path


def test_a_dry_run_tells_what_would_be_written_and_writes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["extract-adapter", folder / "base", folder / "tuned", "-o", folder / "adapter"]
    given += ["--energy", "0.8", "--workers", "2"]
    before = cases.digests(folder)
    assert cases.wsurg(*given, "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert cases.wsurg(*given, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "Matrices, least energy kept first" in shown
    assert "Plan; nothing was written" in shown
    assert cases.digests(folder) == before
    assert cases.wsurg(*given, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    written = folder / "adapter" / "adapter_model.safetensors"
    assert plan["files"] == {written.name: written.stat().st_size}
    assert plan["report"] == {"adapter": record["report"]["adapter"]}
    assert plan["alignment"] == record["alignment"]
    assert plan["workers"] == 2
    assert sum(plan["tensors"].values()) == len(record["tensors"])
    assert cases.wsurg(*given, "--dry-run") == 5  # it is there now
    assert cases.wsurg(*given, "--dry-run", "--overwrite") == 0


def test_a_memory_limit_takes_workers_and_changes_no_byte(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["extract-adapter", folder / "base", folder / "tuned", "--workers", "4"]

    def planned(*more: object) -> Any:
        assert cases.wsurg(*given, *more, "-o", folder / "x", "--dry-run", "--json") == 0
        return json.loads(capsys.readouterr().out)

    free = planned()
    assert free["workers"] == 4
    less = planned("--max-memory", free["memory"] - 1)
    assert less["workers"] == 3
    assert less["memory"] < free["memory"]
    assert cases.wsurg(*given, "-o", folder / "free") == 0
    assert cases.wsurg(*given, "-o", folder / "less", "--max-memory", less["memory"]) == 0
    capsys.readouterr()
    assert cases.digests(folder / "free") == cases.digests(folder / "less")
    assert cases.wsurg(*given, "-o", folder / "x", "--max-memory", "100MB") == 2
    assert "a memory limit of 100,000,000 bytes is too small" in capsys.readouterr().err
    assert not (folder / "x").exists()


def test_fewer_workers_decompose_at_a_time_under_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, most, lock = 0, [0], threading.Lock()
    original = extract.decompose

    def watched(*given: Any) -> Any:
        nonlocal at_once
        with lock:
            at_once += 1
            most.append(at_once)
        time.sleep(0.02)
        try:
            return original(*given)
        finally:
            with lock:
                at_once -= 1

    monkeypatch.setattr(extract, "decompose", watched)
    given, engine = pair_of(*cases.pair("bert")), Engine(workers=3)
    works = memory.works_of(extract_adapter(*given, engine=engine))
    assert max(most) > 1
    most.clear()
    limit = memory.peak_of(works, 1, given)
    extract_adapter(*given, max_memory=limit, engine=engine)
    assert max(most) == 1
    with pytest.raises(SettingError, match=f"{limit - 1:,} bytes is too small; one worker may"):
        extract_adapter(*given, max_memory=limit - 1, engine=engine)
    with pytest.raises(SettingError, match="beside energy, max_rank bounds it"):
        extract_adapter(*given, energy=0.9, max_memory=limit // 2, engine=engine)


SHAPES = [(1024, 768, "exact", 16), (300, 6000, "randomised", 64), (6000, 300, "randomised", 64)]
SHAPES += [(2000, 1500, "auto", 8)]


@pytest.mark.parametrize(("rows", "columns", "svd", "rank"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_memory_stays_below_its_estimate(
    rows: int, columns: int, svd: str, rank: int, dtype: str
) -> None:
    drift = np.random.default_rng(0).normal(size=(rows, columns)).astype(dtype)
    given = one_matrix(drift)
    settings: dict[str, Any] = {"rank": rank, "svd": svd}
    settings |= {} if svd == "exact" else {"power_iterations": 1}
    extract_adapter(*given, **settings, engine=Engine(workers=1))  # compiles
    tracemalloc.start()
    try:
        adapter = extract_adapter(*given, **settings, engine=Engine(workers=1))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    (work,) = memory.works_of(adapter)
    assert work.held == sum(view.nbytes for view in adapter.values())
    assert peak < work.held + work.passing < 6 * peak
    places = find_places(align(*given))
    wanted = decompose.Wanted(rank=rank, energy=None, svd=svd)
    assert memory.works_expected(places, wanted, given) == [work]


def test_the_energy_counts_as_all_that_is_allowed() -> None:
    given = one_matrix(decaying(600, 700, power=2.0))
    places = find_places(align(*given))
    (bounded,) = memory.works_expected(places, decompose.Wanted(rank=9, energy=0.9), given)
    (free,) = memory.works_expected(places, decompose.Wanted(rank=None, energy=0.9), given)
    assert (bounded.held, free.held) == (4 * 9 * 1300, 4 * 600 * 1300)
    for settings, expected in (({"max_rank": 9}, bounded), ({}, free)):
        (work,) = memory.works_of(extract_adapter(*given, energy=0.9, **settings))
        assert work.held <= expected.held
        assert work.passing <= expected.passing


def test_the_record_and_the_table_tell_what_was_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, arrays in zip(("base", "tuned"), cases.pair("bert"), strict=True):
        cases.write_directory(tmp_path / name, arrays, config=cases.CONFIGS["bert"])
    given = ["extract-adapter", tmp_path / "base", tmp_path / "tuned", "-o", tmp_path / "adapter"]
    assert cases.wsurg(*given, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    written = json.loads((tmp_path / "adapter" / "wsurg-record.json").read_text())
    assert record.pop("out") == str(tmp_path / "adapter")
    assert record == written
    assert record["recipe"]["operator"] == "extract-adapter"
    assert record["recipe"]["inputs"] == {"base": {"input": 0}, "tuned": {"input": 1}}
    assert record["dropped"] == []
    assert record["effective_share"] is None
    assert all(entry["sha256"] for entry in record["outputs"].values())
    assert len(record["report"]["adapter"]["matrices"]) == 7
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card
    assert f"An adapter of {record['report']['adapter']['parameters']:,} parameters." in card
    assert cases.wsurg(*given) == 5  # it is there
    assert cases.wsurg(*given, "--overwrite", "--rank", "2", "--rest", "list") == 0
    text = capsys.readouterr().out
    for words in (
        "Matrices, least energy kept first",
        "Not in the adapter, though it differs",
        "rank 2",
    ):
        assert words in text
    assert cases.wsurg(*given, "--overwrite", "--rank", "0") == 2
    assert "--rank is 0; expected an integer" in capsys.readouterr().err
    assert cases.wsurg(*given, "--overwrite", "--energy", "0.5", "--rank", "3") == 2
    assert cases.digests(tmp_path / "adapter")  # the old one is still there


@pytest.mark.parametrize("flag", ["--power-iterations", "--oversampling", "--seed"])
def test_what_an_exact_decomposition_has_no_use_for_is_refused(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, arrays in zip(("base", "tuned"), cases.pair("bert"), strict=True):
        cases.write_directory(tmp_path / name, arrays)
    given = ["extract-adapter", tmp_path / "base", tmp_path / "tuned", "-o", tmp_path / "out"]
    assert cases.wsurg(*given, "--svd", "exact", flag, "1") == 2
    assert f"{flag} is for the randomised decomposition" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "wsurg.toml").write_text("seed = 1\n")  # may be meant for other commands
    config = ["--config", tmp_path / "wsurg.toml"]
    assert cases.wsurg(*config, *given, "--svd", "exact", "--dry-run") == 0
    assert cases.wsurg(*given, "--svd", "auto", flag, "1") == 0


def test_an_adapter_without_factors_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = cases.pair("bert")
    for name, arrays in (("base", base), ("tuned", tuned)):
        cases.write_directory(tmp_path / name, arrays)
    given = [tmp_path / "base", tmp_path / "tuned", "--include", "*LayerNorm*"]
    assert cases.wsurg("extract-adapter", *given, "-o", tmp_path / "out") == 0
    assert "no matrix goes into factors" in capsys.readouterr().out
    assert cases.wsurg("extract-adapter", *given, "-o", tmp_path / "x.safetensors") == 2
    assert "an adapter is a folder" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_classifiers_adapter_without_its_head_loads_in_peft(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import BertForSequenceClassification

    for seed, name in enumerate(("base", "tuned")):
        tiny_models.bert(tmp_path / name, seed=seed)
    base, tuned = (open_checkpoint(tmp_path / name) for name in ("base", "tuned"))
    for exclude, task in ((("classifier.*",), None), ((), "SEQ_CLS")):
        adapter = extract_adapter(base, tuned, rank=2, exclude=exclude)
        assert adapter.config["task_type"] == task
        save(adapter, tmp_path / "adapter", overwrite=True)
        model = BertForSequenceClassification.from_pretrained(tmp_path / "base")
        assert PeftModel.from_pretrained(model, tmp_path / "adapter")
