"""Adapters: what PEFT merges, to the last bit or nearly; what is refused; what is proved."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import cases, hostile, reference
from weightsurgery import apply_adapter, from_arrays, open_checkpoint, save, verify_adapter
from weightsurgery.adapters.config import read_config
from weightsurgery.adapters.elements import compare
from weightsurgery.adapters.proof import check_proof
from weightsurgery.adapters.updates import Shift
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.error_codes import CODES
from weightsurgery.errors import (
    FormatError,
    GateError,
    MismatchError,
    NonFiniteError,
    PolicyError,
    SettingError,
)
from weightsurgery.low_rank_kernel import add_low_rank, residual_sums, squared_lines

# --- kernels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("rank", [1, 3, 4, 9])
def test_any_run_of_a_stack_of_products(rank: int, dtype: str) -> None:
    rng = np.random.default_rng(rank)
    left = rng.normal(size=(6, rank)).astype(dtype)
    right = rng.normal(size=(3, rank, 7)).astype(dtype)
    values = rng.normal(size=42).astype(dtype)
    naive = np.concatenate([left[2 * i : 2 * i + 2] @ right[i] for i in range(3)]).ravel()
    whole = add_low_rank(values, left, right, 0, 0.5)
    for start in range(42):
        for stop in range(start, 43):
            found = add_low_rank(values[start:stop], left, right, start, 0.5)
            assert found.dtype == dtype
            expected = values[start:stop] + 0.5 * naive[start:stop]
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
            assert found.tobytes() == whole[start:stop].tobytes()  # however rows are paired


def test_rows_longer_than_what_the_cache_holds() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(2, 5)), rng.normal(size=(1, 5, 2500))
    found = add_low_rank(np.zeros(5000), left, right, 0, 1.0)
    np.testing.assert_allclose(found, (left @ right[0]).ravel(), atol=1e-12)


@pytest.mark.parametrize("by_column", [False, True])
def test_squares_of_lines_add_up(by_column: bool) -> None:
    matrix = np.random.default_rng(0).normal(size=(4, 5))
    naive = (matrix**2).sum(axis=0 if by_column else 1)
    total = np.zeros(naive.size)
    for start, stop in ((0, 7), (7, 8), (8, 20)):
        part = squared_lines(matrix.ravel()[start:stop], start, 5, by_column=by_column)
        first = 0 if by_column else start // 5
        total[first : first + part.size] += part
    np.testing.assert_allclose(total, naive)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("odd", [None, np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_residuals(dtype: str, odd: float | None, place: int) -> None:
    rng = np.random.default_rng(3)
    before, expected, after = blocks = [rng.normal(size=37).astype(dtype) for _ in range(3)]
    after[:5] = before[:5]
    if odd is not None:
        blocks[place][11] = odd
    with np.errstate(invalid="ignore"):
        found = residual_sums(before, expected, after, 2.0**-8, 2.0**-134)
        naive = reference.residuals(before, expected, after, 2.0**-8, 2.0**-134)
    np.testing.assert_allclose(found, naive, rtol=1e-6)
    assert found[6] == 32


# --- several adapters, other names; what PEFT merges is in test_adapter_matrix.py -------------


def test_several_adapters_add_up_and_a_negative_weight_takes_back() -> None:
    base = cases.model("llama", dtype="f4")
    first, second = (cases.adapter(base, "llama", seed=seed) for seed in (3, 4))
    config = cases.adapter_config("llama")
    given = [from_arrays(a, config=config) for a in (first, second)]
    plain = from_arrays(base)
    found = cases.read(apply_adapter(plain, *given, weight=[0.5, -2.0]))
    for name, array in base.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        expected = array.astype("f8") if array.dtype.kind == "f" else array
        for weight, adapter in ((0.5, first), (-2.0, second)):
            if f"{module}.lora_A.weight" in adapter:
                a, b = (adapter[f"{module}.lora_{one}.weight"].astype("f8") for one in "AB")
                expected = expected + weight * 1.5 * (b @ a)
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=1e-6)
    back = apply_adapter(apply_adapter(plain, given[0]), given[0], weight=[-1.0])
    for name, array in cases.read(back).items():
        np.testing.assert_allclose(array, base[name], atol=1e-6)


@pytest.mark.parametrize("longer", ["adapter", "base"])
def test_names_may_differ_by_a_prefix(longer: str) -> None:
    base = cases.model("bert")
    adapter = cases.adapter(base)
    expected = cases.read(apply_adapter(*pair_of(base, adapter)))
    if longer == "base":
        base = {f"bert.{name}": array for name, array in base.items()}
        expected = {f"bert.{name}": array for name, array in expected.items()}
    else:
        front = "base_model.model."
        adapter = {name.replace(front, f"{front}bert."): a for name, a in adapter.items()}
    found = cases.read(apply_adapter(*pair_of(base, adapter)))
    assert cases.stored(found) == cases.stored(expected)


def pair_of(
    base: cases.Arrays, adapter: cases.Arrays, **settings: Any
) -> tuple[Checkpoint, Checkpoint]:
    config = cases.adapter_config(**settings)
    return from_arrays(base, label="base"), from_arrays(adapter, label="adapter", config=config)


# --- what is refused ---------------------------------------------------------------------------


def without(ending: str) -> Callable[[cases.Arrays], cases.Arrays]:
    return lambda arrays: dict(
        list({n: a for n, a in arrays.items() if not n.endswith(ending)}.items())
    )


def one_more(name: str, shape: tuple[int, ...]) -> Callable[[cases.Arrays], cases.Arrays]:
    return lambda arrays: {**arrays, name: np.zeros(shape, "f4")}


def same(arrays: cases.Arrays) -> cases.Arrays:
    return arrays


def with_nan(arrays: cases.Arrays) -> cases.Arrays:
    return {n: np.full_like(a, np.nan) for n, a in arrays.items()}


FRONT = "base_model.model."
NORM = "embeddings.LayerNorm.weight"
REFUSED: dict[str, tuple[dict[str, Any], Callable[..., cases.Arrays], str, str]] = {
    "another tuner": ({"peft_type": "LOHA"}, same, "E-ADAPTER-KIND", "type LOHA; only LORA"),
    "no tuner": ({"peft_type": 3}, same, "E-ADAPTER-CONFIG", "no peft_type"),
    "rank by configuration": ({"r": 5}, same, "E-ADAPTER-RANK", r"rank 5 by .*lora_A is \[2, 6\]"),
    "no rank": ({"r": 0}, same, "E-ADAPTER-RANK", "r is 0; expected a positive"),
    "a negative rank": ({"r": -2}, same, "E-ADAPTER-RANK", "r is -2; expected a positive"),
    "rank missing": ({"r": None}, same, "E-ADAPTER-RANK", "r is None; expected a positive"),
    "a pattern's rank": (
        {"rank_pattern": {"query": 3}},
        same,
        "E-ADAPTER-RANK",
        r"rank 3 by .*lora_A is \[2, 6\]",
    ),
    "no rank in a pattern": (
        {"rank_pattern": {"query": 0}},
        same,
        "E-ADAPTER-RANK",
        "rank_pattern is 0",
    ),
    "rank true": ({"r": True}, same, "E-ADAPTER-RANK", "r is True"),
    "alpha NaN": ({"lora_alpha": math.nan}, same, "E-JSON-NUMBER", "NaN"),
    "alpha infinite": ({"lora_alpha": "inf"}, same, "E-ADAPTER-ALPHA", "lora_alpha is 'inf'"),
    "alpha of hundreds of digits": (
        {"lora_alpha": 10**350},
        same,
        "E-ADAPTER-ALPHA",
        "a finite number",
    ),
    "alpha missing": ({"lora_alpha": None}, same, "E-ADAPTER-ALPHA", "lora_alpha is None"),
    "unknown setting": ({"use_magic": True}, same, "E-ADAPTER-FIELD", "has use_magic"),
    "replicated layers": (
        {"layer_replication": [[0, 1]]},
        same,
        "E-ADAPTER-FIELD",
        "layer_replication",
    ),
    "PiSSA": (
        {"init_lora_weights": "pissa"},
        same,
        "E-ADAPTER-FIELD",
        "changes the base's weights",
    ),
    "an expression": (
        {"rank_pattern": {"(a+)+$": 1}},
        same,
        "E-ADAPTER-PATTERN",
        "regular expression",
    ),
    "DoRA without norms": (
        {"use_dora": True},
        same,
        "E-ADAPTER-CONTRADICTION",
        "no magnitude beside it",
    ),
    "no B": ({}, without("lora_B.weight"), "E-ADAPTER-FACTOR", "lora_B is missing"),
    "no A": ({}, without("lora_A.weight"), "E-ADAPTER-FACTOR", "lora_A is missing"),
    "nothing": ({}, lambda _: {}, "E-ADAPTER-EMPTY", "no tensors"),
    "not BASE's": (
        {},
        lambda arrays: {n.replace("layer.0", "layer.7"): a for n, a in arrays.items()},
        "E-ADAPTER-TARGET",
        r"BASE has no 'encoder\.layer\.7",
    ),
    "another name": (
        {},
        one_more("something.else", (2, 6)),
        "E-ADAPTER-TENSOR",
        "begins with base_mod",
    ),
    "no saved module": (
        {"modules_to_save": ["LayerNorm"]},
        same,
        "E-ADAPTER-CONTRADICTION",
        "modules_to_save names 'LayerNorm', which BASE has",
    ),
    "no trained tokens": (
        {"trainable_token_indices": [1, 2]},
        same,
        "E-ADAPTER-CONTRADICTION",
        "trainable_token_indices names 'embeddings.word_embeddings'",
    ),
    "no adapted parameter": (
        {"target_parameters": ["word_embeddings.weight"]},
        same,
        "E-ADAPTER-CONTRADICTION",
        "target_parameters names 'word_embeddings.weight'",
    ),
    "no bias of a factor": (
        {"lora_bias": True},
        same,
        "E-ADAPTER-CONTRADICTION",
        "lora_bias names",
    ),
    "the same module twice": (
        {},
        lambda arrays: {
            **arrays,
            **{n.replace("model.encoder", "model.bert.encoder"): a for n, a in arrays.items()},
        },
        "E-ADAPTER-TENSOR",
        "adapts the same tensor of BASE",
    ),
    "unmatched": (
        {},
        one_more(f"{FRONT}embeddings.LayerNorm.weight", (6,)),
        "E-ADAPTER-TENSOR",
        "does not say what this tensor is for",
    ),
    "another shape": (
        {},
        lambda arrays: {n: a[:, :-1] if "lora_A" in n else a for n, a in arrays.items()},
        "E-ADAPTER-SHAPE",
        r"its product is \[6, 5\], BASE's '.*' \[6, 6\]; is this the model",
    ),
    "NaN": ({}, with_nan, "E-NONFINITE", "NaN or infinity in an adapter"),
    "another base": (
        {"base_model_name_or_path": "org/other"},
        same,
        "E-ADAPTER-BASE",
        "trained on 'org/other', BASE is .*--force-base",
    ),
}


def merge(folder: Path) -> None:
    base, adapter = (open_checkpoint(folder / name) for name in ("base", "adapter"))
    save(apply_adapter(base, adapter), folder / "out")


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_adapter_is_refused_and_nothing_written(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, change, code, reason = REFUSED[case]
    kind = CODES[code].kind
    assert kind is not None
    base = cases.model("bert")
    cases.write_directory(tmp_path / "base", base)
    config = cases.adapter_config(**settings)
    cases.write_adapter(tmp_path / "adapter", change(cases.adapter(base)), config)
    before = cases.digests(tmp_path)
    with pytest.raises(kind, match=reason) as told:
        merge(tmp_path)
    assert (type(told.value), told.value.code) == (kind, code)
    assert "\n" not in str(told.value)
    given = (tmp_path / "base", tmp_path / "adapter")
    capsys.readouterr()
    assert cases.wsurg("apply-adapter", *given, "-o", tmp_path / "out") == kind.exit_code
    assert [line for line in capsys.readouterr().err.splitlines() if "error" in line.lower()]
    if case != "another base":  # which verify-adapter does not ask for
        assert cases.wsurg("verify-adapter", *given, tmp_path / "base") == kind.exit_code
    assert cases.digests(tmp_path) == before


def test_weights_must_be_as_many_as_adapters() -> None:
    base, adapter = pair_of(cases.model("bert"), cases.adapter(cases.model("bert")))
    with pytest.raises(SettingError, match=r"2 weights for 1 adapter$"):
        apply_adapter(base, adapter, weight=[1, 2])
    with pytest.raises(SettingError, match="no adapter"):
        apply_adapter(base)
    for weight in (math.nan, math.inf):
        with pytest.raises(SettingError, match="expected finite numbers"):
            apply_adapter(base, adapter, weight=[weight])


def test_what_a_model_lacks_may_be_named_for_saving() -> None:
    """PEFT names `classifier` and `score` for every classifier."""
    base = cases.model("bert")
    named = pair_of(base, cases.adapter(base), modules_to_save=["classifier", "score"])
    assert cases.stored(cases.read(apply_adapter(*named)))


@pytest.mark.parametrize("dtype", ["?", "i4"])
def test_only_floating_tensors_are_adapted(dtype: str) -> None:
    base = cases.model("bert")
    adapter = cases.adapter(base)
    name = next(iter(adapter)).removeprefix(FRONT).replace("lora_A.", "")
    base[name] = np.ones(base[name].shape, dtype)
    with pytest.raises(MismatchError, match="expected a floating tensor"):
        apply_adapter(*pair_of(base, adapter))


def test_two_prefixes_that_fit_alike_are_refused() -> None:
    base = {f"{part}.l.q.weight": np.ones((3, 3), "f4") for part in ("text", "vision")}
    factors = {f"{FRONT}l.q.lora_{one}.weight": np.ones((3, 3), "f4") for one in "AB"}
    with pytest.raises(MismatchError, match=r"prefixes 'text\.' and 'vision\.' alike"):
        apply_adapter(*pair_of(base, factors, rank=3))


@pytest.mark.parametrize("given", [".", "./", "../base"])
def test_the_base_may_be_the_folder_one_is_in(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = cases.model("bert")
    cases.write_directory(tmp_path / "base", base)
    monkeypatch.chdir(tmp_path / "base")
    arrays = cases.adapter(base)
    for named, fits in (("base", True), ("org/other", False), (".", False)):
        config = cases.adapter_config(base_model_name_or_path=named)
        adapter = from_arrays(arrays, label="adapter", config=config)
        if fits:
            assert apply_adapter(open_checkpoint(given), adapter).warnings == ()
        else:
            with pytest.raises(PolicyError, match="--force-base"):
                apply_adapter(open_checkpoint(given), adapter)


def test_what_may_not_be_meant_is_told() -> None:
    base = cases.model("llama")
    head = base.pop("lm_head.weight", None)
    del head
    arrays = cases.adapter(base, "llama")
    still = pair_of(base, arrays, family="llama", lora_alpha=0)
    assert any("its scale is 0" in told for told in apply_adapter(*still).warnings)
    given = pair_of(base, arrays, family="llama")
    lost = "model.layers.0.self_attn.q_proj"
    config = cases.adapter_config("llama", modules_to_save=["q_proj"])
    whole = {f"{FRONT}{n}": a for n, a in base.items() if "q_proj" in n}
    saved = from_arrays(whole, label="saved", config=config)
    warnings = apply_adapter(*given, saved).warnings
    assert any(f"saved replaces '{lost}.weight'" in told for told in warnings)
    rows, width = base["model.embed_tokens.weight"].shape
    embedding = {
        f"{FRONT}model.embed_tokens.lora_embedding_A": np.ones((2, rows), "f4"),
        f"{FRONT}model.embed_tokens.lora_embedding_B": np.ones((width, 2), "f4"),
    }
    warnings = apply_adapter(*pair_of(base, embedding, family="llama")).warnings
    assert any("stores no output head" in told for told in warnings)


MODULES = [f"encoder.layer.{layer}.attention.self.query" for layer in (0, 1)]


def emptied(arrays: cases.Arrays, *endings: str) -> cases.Arrays:
    """The arrays with minus zeros in those whose names end so."""
    return {n: -0.0 * np.abs(a) if n.endswith(endings) else a for n, a in arrays.items()}


def zeros_told(adapter: cases.Arrays, **settings: Any) -> list[str]:
    given = pair_of(cases.model("bert"), adapter, **settings)
    return [told for told in apply_adapter(*given).warnings if "was it trained?" in told]


def test_an_adapter_that_adds_nothing_is_told() -> None:
    """As from a training that never moved: every second factor begins as zero."""
    full = cases.adapter(cases.model("bert"))
    assert zeros_told(full) == []
    ends = [f"{module}.lora_B.weight" for module in MODULES]
    what = f"is exactly zero, first '{MODULES[0]}'; was it trained?"
    assert zeros_told(emptied(full, *ends)) == [f"adapter: what it adds to 2 of 6 modules {what}"]
    assert zeros_told(emptied(full, ends[0], f"{MODULES[1]}.lora_A.weight"))  # either factor
    one = {n: a for n, a in full.items() if MODULES[0] in n}
    whole = "adapter: the whole adapter changes nothing: what it adds to 1 of 1 module"
    assert zeros_told(emptied(one, *ends)) == [f"{whole} {what}"]
    # What replaces may change something, and what a scale of 0 takes away is told already.
    saved = {**one, f"{FRONT}embeddings.LayerNorm.weight": np.ones(6, "f4")}
    found = zeros_told(emptied(saved, *ends), modules_to_save=["LayerNorm"])
    assert found == [f"adapter: what it adds to 1 of 1 module {what}"]
    assert zeros_told(emptied(one, *ends), lora_alpha=0) == []
    # A module's bias is its own.
    biased = {**emptied(one, *ends), f"{FRONT}{MODULES[0]}.lora_B.bias": np.ones(6, "f4")}
    assert zeros_told(biased, lora_bias=True) == []
    assert zeros_told(emptied(biased, "bias"), lora_bias=True) == [f"{whole} {what}"]


def test_an_embeddings_factors_may_be_zero_too() -> None:
    base = cases.model("bert")
    rows, width = base["embeddings.word_embeddings.weight"].shape
    front = f"{FRONT}embeddings.word_embeddings.lora_embedding_"
    arrays = {f"{front}A": np.zeros((2, rows), cases.BF16), f"{front}B": np.ones((width, 2), "f4")}
    (told,) = zeros_told(arrays)
    assert "the whole adapter changes nothing" in told
    arrays[f"{front}A"][1, rows - 1] = 1
    assert zeros_told(arrays) == []


def test_zeros_of_stored_experts_are_one_modules() -> None:
    base = {f"mlp.experts.{i}.down_proj.weight": np.ones((4, 6), "f4") for i in range(3)}
    front = f"{FRONT}mlp.experts.lora_"
    arrays = {f"{front}A.weight": np.ones((6, 6), "f4"), f"{front}B.weight": np.zeros((4, 6), "f4")}
    given = pair_of(base, arrays, target_parameters=["mlp.experts.down_proj"])
    told = apply_adapter(*given).warnings
    assert any("changes nothing: what it adds to 1 of 1 module" in one for one in told)
    told = apply_adapter(*given, weight=[0.0]).warnings
    assert any("its scale is 0, so 3 tensors stay as they are" in one for one in told)
    assert not any("changes nothing" in one for one in told)


def test_what_tells_zeros_reads_no_large_tensor(tmp_path: Path) -> None:
    base = cases.model("bert")
    given, adapter = pair_of(base, emptied(cases.adapter(base), "lora_B.weight"))
    counted, reads = cases.counted(given)
    assert any("changes nothing" in told for told in apply_adapter(counted, adapter).warnings)
    assert reads == []
    cases.write_directory(tmp_path / "base", base)
    config = cases.adapter_config(base_model_name_or_path="base")
    arrays = emptied(cases.adapter(base), "lora_B.weight")
    cases.write_adapter(tmp_path / "adapter", arrays, config)
    paths = (tmp_path / "base", tmp_path / "adapter")
    assert cases.wsurg("apply-adapter", *paths, "-o", tmp_path / "out") == 0
    record = json.loads((tmp_path / "out" / "wsurg-record.json").read_text())
    assert any("the whole adapter changes nothing" in told for told in record["warnings"])


def test_what_is_replaced_has_no_weight() -> None:
    base = cases.model("bert")
    arrays = cases.adapter(base) | {f"{FRONT}embeddings.LayerNorm.weight": np.ones(6, "f4")}
    given = pair_of(base, arrays, modules_to_save=["LayerNorm"])
    found = cases.read(apply_adapter(*given))
    assert (found["embeddings.LayerNorm.weight"] == 1).all()
    with pytest.raises(PolicyError, match="only what is added can be weighed"):
        apply_adapter(*given, weight=[-1.0])


@pytest.mark.parametrize("named", ["org/base", "/somewhere/base/", "org/base@main"])
def test_the_bases_name_is_compared_by_its_last_part(named: str) -> None:
    base = cases.model("bert")
    given = pair_of(base, cases.adapter(base), base_model_name_or_path=named)
    assert not [w for w in apply_adapter(*given).warnings if "which base" in w]


HUB = {"hub_id": "orgA/model@c0ffee", "label": "orgA/model"}
NAMES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "one id": ("orgA/Model", HUB, True),
    "one id at a revision": ("orgA/model@refs/pr/1", HUB, True),
    "another's model of that name": ("orgB/model", HUB, False),
    "a path": ("/somewhere/model", HUB, True),
    "what its config says": ("orgA/model", {"config": {"_name_or_path": "orgA/model"}}, True),
    "another than its config": ("orgB/model", {"config": {"_name_or_path": "orgA/model"}}, False),
    "a folder": ("orgB/model", {"label": "models/model"}, True),
    "a folder below an @": ("org/model", {"label": "/home/me@work/model"}, True),
    "another below it": ("org/me", {"label": "/home/me@work/model"}, False),
    "no folder": ("/home/model@work/other", HUB, False),
}


@pytest.mark.parametrize("case", NAMES)
def test_hub_ids_are_compared_whole_and_paths_by_their_ends(case: str) -> None:
    named, fields, same_base = NAMES[case]
    arrays = cases.model("bert")
    base = replace(from_arrays(arrays), **fields)
    adapter = pair_of(arrays, cases.adapter(arrays), base_model_name_or_path=named)[1]
    if same_base:
        assert apply_adapter(base, adapter)
        return
    with pytest.raises(PolicyError, match="--force-base"):
        apply_adapter(base, adapter)


@pytest.mark.parametrize(
    ("one", "other", "settings"),
    [
        (
            "encoder.layer.0.output.dense.lora_magnitude_vector",
            "encoder.layer.0.output.dense.lora_magnitude_vector.weight",
            {"use_dora": True},
        ),
        (
            "encoder.layer.0.attention.self.query.bias",
            "encoder.layer.0.attention.self.query.base_layer.bias",
            {"bias": "all"},
        ),
    ],
)
def test_two_tensors_of_one_role_are_refused(
    one: str, other: str, settings: dict[str, Any]
) -> None:
    base = cases.model("bert")
    twice = {f"{FRONT}{one}": np.zeros(6, "f4"), f"{FRONT}{other}": np.ones(6, "f4")}
    given = pair_of(base, cases.adapter(base) | twice, **settings)
    with pytest.raises(FormatError, match="has the same role; expected one of the two") as told:
        apply_adapter(*given)
    assert f"'{FRONT}{one}'" in str(told.value)
    assert f"'{FRONT}{other}'" in str(told.value)


@pytest.mark.parametrize(
    "beside",
    ["adapter_model.bin", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin"],
)
def test_other_weights_beside_an_adapter_are_two_answers(beside: str, tmp_path: Path) -> None:
    cases.write_adapter(
        tmp_path / "adapter", cases.adapter(cases.model("bert")), cases.adapter_config()
    )
    for harmless in ("model_card.md", "modelcard.json"):
        (tmp_path / "adapter" / harmless).write_text("{}")
    assert open_checkpoint(tmp_path / "adapter")
    (tmp_path / "adapter" / beside).write_bytes(b"pickle")
    told = f"ambiguous weights: adapter_model.safetensors and {beside}"
    with pytest.raises(PolicyError, match=re.escape(told)):
        open_checkpoint(tmp_path / "adapter")


def test_a_model_beside_an_adapter_is_two_answers(tmp_path: Path) -> None:
    cases.write_adapter(
        tmp_path / "adapter", cases.adapter(cases.model("bert")), cases.adapter_config()
    )
    cases.write_file(tmp_path / "adapter" / "model.safetensors", cases.model("bert"))
    with pytest.raises(PolicyError, match="ambiguous"):
        open_checkpoint(tmp_path / "adapter")


def test_adapter_weights_that_are_not_a_pytorch_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(cases.adapter_config()))
    with pytest.raises(FormatError, match=r"without adapter_model\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(FormatError, match=r"adapter_model\.bin: not a PyTorch file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("kept", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_without_its_configuration_is_told(kept: str, tmp_path: Path) -> None:
    (tmp_path / kept).write_bytes(b"")
    told = rf"^{re.escape(str(tmp_path))}: {re.escape(kept)} without adapter_config\.json; take it"
    with pytest.raises(FormatError, match=told):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("key", ["r", "lora_alpha"])
def test_what_the_scale_is_made_of_is_not_guessed(key: str) -> None:
    base = cases.model("bert")
    config = {k: v for k, v in cases.adapter_config().items() if k != key}
    adapter = from_arrays(cases.adapter(base), config=config)
    with pytest.raises(FormatError, match=f"{key} is None; expected"):
        apply_adapter(from_arrays(base), adapter)


def test_first_match_of_a_pattern_counts_and_dots_are_dots() -> None:
    patterns = {"b.c": 1, "c": 2, "^a.c": 3}
    config = cases.adapter_config(rank_pattern=patterns, alpha_pattern={"c": 4.0})
    read = read_config(from_arrays({}, config=config))
    ranks = [read.rank_of(name) for name in ("a.b.c", "bxc", "xb.c", "a.c", "c", "x.a.c")]
    assert ranks == [1, 2, 2, 2, 2, 2]
    assert read.scale_of("a.b.c") == 4.0
    assert read.scale_of("other") == 1.5


def test_patterns_are_looked_up_not_gone_through() -> None:
    several = {"rank_pattern": {"x": 1, **{f"m{i}.x": 2 + i for i in range(100_000)}}}
    config = read_config(from_arrays({}, config=cases.adapter_config(**several)))
    with hostile.deadline(60):
        assert {config.rank_of(f"a.m{i}.x") for i in range(100_000)} == {1}
    long = ".".join("a" * 1000)
    keys = {long[-500:]: 3, long[-499:]: 4}
    config = read_config(from_arrays({}, config=cases.adapter_config(rank_pattern=keys)))
    assert config.rank_of(long) == 4  # the other begins with a dot, and so within a name
    assert config.rank_of(long[-498:]) == 2


# --- proof -------------------------------------------------------------------------------------


def test_a_wrong_merge_is_described() -> None:
    base = cases.model("llama")
    adapter = cases.adapter(base, "llama", rank=4)
    given = pair_of(base, adapter, family="llama", rank=4)
    merged = cases.read(apply_adapter(*given))
    names = sorted(
        n for n in base if f"{FRONT}{n.removesuffix('.weight')}.lora_A.weight" in adapter
    )
    change = {n: merged[n].astype("f4") - base[n].astype("f4") for n in names}
    wrong = dict(merged)
    for name, scale in zip(names, (0.0, -1.0, 2.0), strict=False):
        wrong[name] = (base[name].astype("f4") + scale * change[name]).astype(cases.BF16)
    wrong[names[3]] = merged[names[3]][::-1].copy()
    wrong["model.norm.weight"] = merged["model.norm.weight"] + cases.BF16.type(1)
    report = verify_adapter(given[0], [given[1]], from_arrays(wrong))
    found = {one["tensor"]: one["verdict"] for one in report["tensors"]}
    told = [found[name] for name in (*names[:4], "model.norm.weight")]
    assert told == ["unchanged", "wrong sign", "wrong scale", "wrong", "edited"]
    assert {found[name] for name in names[4:]} == {"proved"}
    assert not report["proved"]
    with pytest.raises(GateError, match="5 tensors are not what"):
        check_proof(report)


def test_messages_say_merged_and_how_many_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = cases.model("bert", layers=9)
    config = cases.adapter_config()
    bert, other = cases.CONFIGS["bert"], cases.CONFIGS["gpt2"]
    cases.write_directory(tmp_path / "base", base, config=bert)
    cases.write_adapter(tmp_path / "adapter", cases.adapter(base), config)
    cases.write_directory(tmp_path / "other", base, config=other)
    cases.write_directory(tmp_path / "odd", {**base, NORM: base[NORM][:-1]}, config=bert)
    given = ["verify-adapter", tmp_path / "base", tmp_path / "adapter"]

    assert cases.wsurg(*given, tmp_path / "base") == 10  # where nothing was added
    told = capsys.readouterr()
    assert "27 tensors are not what BASE and the adapters give: " in told.err
    assert told.err.rstrip().endswith("(unchanged) and 24 more")
    assert told.out.count("unchanged") == 20
    assert "and 7 more; --all shows them" in told.out
    assert cases.wsurg(*given, tmp_path / "base", "--all") == 10
    told = capsys.readouterr()
    assert told.out.count("unchanged") == 27
    assert "more" not in told.out
    assert cases.wsurg(*given, tmp_path / "base", "--json") == 10
    assert len(json.loads(capsys.readouterr().out)["tensors"]) == 27

    for folder, reason in (
        ("other", "bert in BASE and gpt2 in MERGED; give the model that MERGED was made from"),
        ("odd", "[6] in BASE, [5] in MERGED (1 tensor like this)"),
    ):
        assert cases.wsurg(*given, tmp_path / folder) == MismatchError.exit_code
        (line,) = capsys.readouterr().err.splitlines()
        assert reason in line
        assert "TUNED" not in line


def test_what_rounding_explains_one_by_one_is_not_explained_together() -> None:
    """Each element is within the tolerance, and all should have moved."""
    name = "l.q.weight"
    base = {name: np.full((64, 64), 1.9).astype(cases.BF16)}
    factor = np.full((64, 1), 0.07, "f4")
    adapter = {f"{FRONT}l.q.lora_A.weight": factor.T, f"{FRONT}l.q.lora_B.weight": factor}
    given = pair_of(base, adapter, rank=1, lora_alpha=1)
    merged = cases.read(apply_adapter(*given))
    assert (merged[name] != base[name]).all()
    assert verify_adapter(given[0], [given[1]], from_arrays(merged))["proved"]
    report = verify_adapter(given[0], [given[1]], from_arrays(base))
    assert [one["verdict"] for one in report["tensors"]] == ["unchanged"]


def test_adapters_that_cancel_each_other_are_proved_wherever_they_were_rounded() -> None:
    """What is rounded on the way is larger than the result."""
    base = cases.model("llama")  # bfloat16
    given = pair_of(base, cases.adapter(base, "llama"), family="llama")
    twice, weight = [given[1], given[1]], [8.0, -8.0]
    once = apply_adapter(given[0], *twice, weight=weight)
    peft = apply_adapter(given[0], *twice, weight=weight, rounding="peft")
    between = apply_adapter(given[0], given[1], weight=weight[:1])
    steps = apply_adapter(between, given[1], weight=weight[1:])
    found = [cases.read(one) for one in (peft, steps)]
    assert all(any((one[n] != base[n]).any() for n in base) for one in found)
    for merged in (once, peft, steps):
        report = verify_adapter(given[0], twice, merged, weight=weight)
        assert report["proved"], report["tensors"]
        assert 0 <= max(one["worst"] for one in report["tensors"]) <= 1
    for wrong in (between, apply_adapter(given[0], given[1], weight=[0.5])):
        assert not verify_adapter(given[0], twice, wrong, weight=weight)["proved"]


@pytest.mark.parametrize("odd", [None, np.nan])
def test_the_room_of_several_updates_is_that_of_each(odd: float | None) -> None:
    rng = np.random.default_rng(0)
    before, *by = (rng.normal(size=40).astype("f4") for _ in range(4))
    sums = np.cumsum([before, *by], axis=0, dtype="f4")
    after = (sums[-1] + 0.3 * rng.normal(size=40)).astype(cases.BF16)
    if odd is not None:
        after[7] = odd
    views = from_arrays({str(i): one for i, one in enumerate(by)})
    updates = [Shift(view, 1.0) for view in views.values()]
    found = compare(before.astype(cases.BF16), before.astype(cases.BF16), 0, [])
    assert not found.any()
    found = compare(before, after, 0, updates)
    room = sum(
        reference.room(one, other, 2.0**-8, 2.0**-134) for one, other in itertools.pairwise(sums)
    )
    left = np.abs(after.astype("f8") - sums[-1])
    np.testing.assert_allclose(found[5], np.max(left / room), rtol=1e-4)


COUNTER = "norm.num_batches_tracked"


@pytest.mark.parametrize("kind", ["i8", "?"])
def test_integers_of_a_saved_module_are_copied_and_proved(kind: str) -> None:
    """Batch normalisation counts batches."""
    base = {**cases.model("bert"), COUNTER: np.zeros(3, kind)}
    counter = np.array([1, 0, 1], kind)
    arrays = {**cases.adapter(base), FRONT + COUNTER: counter}
    given = pair_of(base, arrays, modules_to_save=["norm"])
    merged = cases.read(apply_adapter(*given))
    assert cases.stored({COUNTER: merged[COUNTER]}) == cases.stored({COUNTER: counter})
    assert verify_adapter(given[0], [given[1]], from_arrays(merged))["proved"]
    report = verify_adapter(given[0], [given[1]], from_arrays({**merged, COUNTER: base[COUNTER]}))
    wrong = [one for one in report["tensors"] if one["verdict"] != "proved"]
    assert [(one["tensor"], one["verdict"]) for one in wrong] == [(COUNTER, "wrong")]
    given = pair_of({**base, COUNTER: np.zeros(3, "i4")}, arrays, modules_to_save=["norm"])
    with pytest.raises(PolicyError, match="weights in an adapter; expected floating ones"):
        apply_adapter(*given)


@pytest.mark.parametrize("name", ["l.mixer.A_log", "l.experts.gate_up_proj", "l.rotary.inv_freq"])
def test_a_parameter_of_any_name_may_not_be_lost(name: str) -> None:
    base = {**cases.model("bert"), name: np.ones((2, 2), "f4")}
    given = pair_of(base, cases.adapter(cases.model("bert")))
    merged = cases.read(apply_adapter(*given))
    del merged[name]
    assert verify_adapter(given[0], [given[1]], from_arrays(merged))["proved"] == (
        "inv_freq" in name
    )


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.self_attn.q_proj.bias", (6,)),
        ("model.layers.2.self_attn.q_proj.weight", (6, 6)),
        ("planted", (2,)),
    ],
)
def test_what_base_lacks_is_extra(
    name: str, shape: tuple[int, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = cases.model("llama")
    arrays, config = cases.adapter(base, "llama"), cases.adapter_config("llama")
    given = pair_of(base, arrays, family="llama")
    merged = cases.read(apply_adapter(*given))
    assert verify_adapter(given[0], [given[1]], from_arrays(merged))["proved"]
    for kind in ("f4", "i4"):
        planted = {**merged, name: np.ones(shape, kind)}
        report = verify_adapter(given[0], [given[1]], from_arrays(planted))
        wrong = [one for one in report["tensors"] if one["verdict"] != "proved"]
        assert wrong == [{"tensor": name, "adapted": False, "verdict": "extra"}]
        assert (report["proved"], report["not_compared"]) == (False, [])
    cases.write_directory(tmp_path / "base", base)
    cases.write_directory(tmp_path / "merged", planted)
    cases.write_adapter(tmp_path / "adapter", arrays, config)
    paths = [tmp_path / one for one in ("base", "adapter", "merged")]
    assert cases.wsurg("verify-adapter", *paths) == GateError.exit_code == 10
    table = capsys.readouterr().out.splitlines()
    assert [line for line in table if name in line and "extra" in line]


@pytest.mark.parametrize("change", [0, 1])
def test_a_copy_of_the_tied_embedding_is_extra_unless_it_is_the_same(change: int) -> None:
    base = cases.model("llama", dtype="f4")
    del base["lm_head.weight"]
    given = pair_of(base, cases.adapter(base, "llama"), family="llama")
    merged = cases.read(apply_adapter(*given))
    name, copy = "model.embed_tokens.weight", "decoder.wte.weight"
    merged[copy] = merged[name] + np.float32(change)
    config = {"tie_word_embeddings": True}
    merged = {copy: merged.pop(copy), "shared.weight": merged.pop(name), **merged}
    base = {"shared.weight": base.pop(name), **base}
    tied = (from_arrays(base, config=config), [given[1]], from_arrays(merged, config=config))
    report = verify_adapter(*tied)
    assert report["proved"] == (change == 0)
    found = {one["tensor"]: one["verdict"] for one in report["tensors"]}
    assert found.get(copy, "untouched") == ("extra" if change else "untouched")


def test_a_tensor_of_another_shape_is_not_bases() -> None:
    base = cases.model("llama")
    config = {"vocab_size": 11}
    adapter = pair_of(base, cases.adapter(base, "llama"), family="llama")[1]
    merged = cases.read(apply_adapter(from_arrays(base), adapter))
    name = "model.embed_tokens.weight"
    merged[name] = np.concatenate([merged[name], merged[name][:1]])
    merged["position_ids"] = merged["position_ids"].astype("i4")
    given = (from_arrays(base, config=config), [adapter], from_arrays(merged, config=config))
    report = verify_adapter(*given)
    found = {one["tensor"]: one["verdict"] for one in report["tensors"] if not one["adapted"]}
    assert found == {name: "edited", "position_ids": "edited"}
    assert not report["proved"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("allowed", [False, True])
def test_nan_and_infinity_prove_nothing(
    value: float, allowed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = cases.model("llama")
    arrays, config = cases.adapter(base, "llama"), cases.adapter_config("llama")
    given = pair_of(base, arrays, family="llama")
    merged = cases.read(apply_adapter(*given))
    name = "model.layers.0.mlp.down_proj.weight"
    merged[name] = np.full_like(merged[name], value)
    wrong = from_arrays(merged)
    report = verify_adapter(given[0], [given[1]], wrong, allow_nonfinite=allowed)
    verdicts = {one["tensor"]: one for one in report["tensors"] if one["verdict"] != "proved"}
    assert list(verdicts) == [name]
    assert verdicts[name]["verdict"] == "wrong"
    assert verdicts[name]["residual"] is verdicts[name]["worst"] is None
    cases.write_directory(tmp_path / "base", base)
    cases.write_directory(tmp_path / "merged", merged)
    cases.write_adapter(tmp_path / "adapter", arrays, config)
    paths = [tmp_path / one for one in ("base", "adapter", "merged")]
    assert cases.wsurg("verify-adapter", *paths) == GateError.exit_code
    assert re.search(r"worst element\s+NaN or infinity", capsys.readouterr().out)
    assert cases.wsurg("verify-adapter", *paths, "--json") == GateError.exit_code
    assert json.loads(capsys.readouterr().out) == {
        **verify_adapter(given[0], [given[1]], wrong),
        "base": str(paths[0]),
        "adapters": [str(paths[1])],
        "merged": str(paths[2]),
    }


# --- NaN and infinity that are let pass ---------------------------------------------------------

NORM, QUERY_BIAS = "embeddings.LayerNorm.weight", "encoder.layer.0.attention.self.query.bias"
WORDS, TOKENS = "embeddings.word_embeddings", np.ones((2, 6), "f4")
PARTS: dict[str, tuple[dict[str, Any], Callable[[cases.Arrays, cases.Arrays], cases.Arrays]]] = {
    "a factor": ({}, lambda _base, adapter: adapter),
    "a saved module": (
        {"modules_to_save": ["LayerNorm"]},
        lambda base, _: {f"{FRONT}{NORM}": base[NORM]},
    ),
    "a bias": ({"bias": "all"}, lambda base, _: {f"{FRONT}{QUERY_BIAS}": base[QUERY_BIAS]}),
    "trained tokens": (
        {"trainable_token_indices": {"word_embeddings": [1, 3]}},
        lambda _base, _adapter: {f"{FRONT}{WORDS}.token_adapter.trainable_tokens_delta": TOKENS},
    ),
}


def spoilt(arrays: cases.Arrays, value: float) -> tuple[cases.Arrays, str]:
    """The first element of the first tensor is this value; and that tensor's name."""
    name = next(iter(arrays))
    array = arrays[name].copy()
    array.flat[0] = value
    return {**arrays, name: array}, name


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("case", PARTS)
def test_nan_in_an_adapter_is_refused_by_file_and_tensor_or_let_pass(
    case: str, value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, change = PARTS[case]
    base = cases.model("bert")
    arrays, name = spoilt(change(base, cases.adapter(base)), value)
    config = cases.adapter_config(**settings)
    cases.write_directory(tmp_path / "base", base)
    cases.write_adapter(tmp_path / "adapter", arrays, config)
    given, out = (tmp_path / "base", tmp_path / "adapter"), tmp_path / "out"
    before = cases.digests(tmp_path)
    assert cases.wsurg("apply-adapter", *given, "-o", out) == NonFiniteError.exit_code == 4
    (told,) = capsys.readouterr().err.splitlines()
    reason = "NaN or infinity in an adapter; --allow-nonfinite lets it pass"
    assert told == f"error[E-NONFINITE]: {given[1]}: tensor '{name}': {reason}"
    assert cases.digests(tmp_path) == before

    assert cases.wsurg("apply-adapter", *given, "-o", out, "--allow-nonfinite") == 0
    capsys.readouterr()
    record = json.loads((out / "wsurg-record.json").read_text())
    warning = f"adapter: NaN or infinity in 1 of {len(arrays)} tensors, first '{name}'; let pass"
    assert warning in record["warnings"]
    passed = [n for n, a in cases.read(open_checkpoint(out)).items() if not np.isfinite(a).all()]
    assert len(passed) == 1
    assert cases.wsurg("verify-adapter", *given, out) == NonFiniteError.exit_code
    assert f"error[E-NONFINITE]: {given[1]}: tensor '{name}'" in capsys.readouterr().err
    assert cases.wsurg("verify-adapter", *given, out, "--allow-nonfinite") == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_base_is_proved_where_it_is_let_pass(value: float) -> None:
    base = cases.model("bert")
    name = "encoder.layer.0.attention.self.query.weight"
    base[name].flat[7] = value
    given = pair_of(base, cases.adapter(base))
    assert name in {view.name for view in apply_adapter(*given).values() if view.status == "edited"}
    with pytest.raises(NonFiniteError, match=f"{name}.*--allow-nonfinite lets it pass"):
        cases.read(apply_adapter(*given))
    merged = apply_adapter(*given, allow_nonfinite=True)
    assert not [told for told in merged.warnings if "NaN" in told]  # the adapter has none
    assert verify_adapter(given[0], [given[1]], merged, allow_nonfinite=True)["proved"]
    assert not verify_adapter(given[0], [given[1]], merged)["proved"]
    other = {**cases.read(merged), name: base[name]}  # nothing added, and the same NaN
    report = verify_adapter(given[0], [given[1]], from_arrays(other), allow_nonfinite=True)
    found = {one["tensor"]: one["verdict"] for one in report["tensors"]}
    assert found[name] == "unchanged"


def test_dora_of_a_line_of_zeros_has_no_direction() -> None:
    base = cases.model("bert")
    name = "encoder.layer.0.attention.self.query"
    base[f"{name}.weight"][2] = 0
    arrays = {n: np.zeros_like(a) for n, a in cases.adapter(base).items() if name in n}
    arrays[f"{FRONT}{name}.lora_magnitude_vector"] = np.ones(6, "f4")
    given = pair_of(base, arrays, use_dora=True)
    with pytest.raises(MismatchError, match="a line of the adapted matrix is zero") as told:
        cases.read(apply_adapter(*given))
    assert type(told.value) is MismatchError
    base[f"{name}.weight"][2] = np.nan  # is no zero
    given = pair_of(base, arrays, use_dora=True)
    with pytest.raises(NonFiniteError, match="--allow-nonfinite lets it pass"):
        cases.read(apply_adapter(*given))
    found = cases.read(apply_adapter(*given, allow_nonfinite=True))[f"{name}.weight"]
    assert (np.isnan(found).all(axis=1) == (np.arange(6) == 2)).all()


def test_a_snapshot_in_the_hubs_cache_is_known_by_its_repository(tmp_path: Path) -> None:
    arrays = cases.model("bert")
    path = tmp_path / "models--org--tiny" / "snapshots" / "0123456789abcdef"
    cases.write_directory(path, arrays)
    base = open_checkpoint(path)
    factors = cases.adapter(arrays, "bert")
    for named, is_same in (("org/tiny", True), ("org/other", False)):
        config = cases.adapter_config("bert", base_model_name_or_path=named)
        adapter = from_arrays(factors, config=config)
        if is_same:
            apply_adapter(base, adapter)
        else:
            with pytest.raises(PolicyError, match="trained on 'org/other'"):
                apply_adapter(base, adapter)


def test_the_folder_that_has_the_adapter_is_named(tmp_path: Path) -> None:
    arrays = cases.model("bert")
    for step in (500, 1000):
        path = tmp_path / "run" / f"checkpoint-{step}"
        cases.write_adapter(path, cases.adapter(arrays, "bert"), cases.adapter_config("bert"))
    run = tmp_path / "run"
    with pytest.raises(FormatError, match=r"its folder checkpoint-.* contains an adapter"):
        open_checkpoint(run)
    # Some trainers save the whole model beside it, and the adapter's configuration.
    cases.write_directory(tmp_path / "model", arrays)
    shutil.copy(tmp_path / "model" / "model.safetensors", run)
    shutil.copy(run / "checkpoint-500" / "adapter_config.json", run)
    with pytest.raises(PolicyError, match="for the adapter, give its folder checkpoint-"):
        open_checkpoint(run)
    shutil.copy(run / "checkpoint-500" / "adapter_model.safetensors", run)
    with pytest.raises(PolicyError, match="for the adapter, move its two files"):
        open_checkpoint(run)
