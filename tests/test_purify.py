"""`purify` equals the naive whole-model sort, and finds what was planted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import cases, reference
from weightsurgery.checkpoint import Checkpoint, from_arrays
from weightsurgery.error_codes import CODES
from weightsurgery.errors import FormatError, MismatchError, NonFiniteError, SurgeryError
from weightsurgery.formats import open_checkpoint, save
from weightsurgery.masks import changed_mask
from weightsurgery.operators.mix import mix
from weightsurgery.operators.purify import purify
from weightsurgery.stream import Engine
from weightsurgery.token_counts import TokenCounts

F32 = np.float32
DENORMAL = np.float32(1e-45)


def fisher_of(tuned: cases.Arrays, seed: int = 5, *, zeros: float = 0.2) -> cases.Arrays:
    """Curvature for every floating tensor, some of it zero."""
    rng = np.random.default_rng(seed)
    return {
        n: (rng.random(a.shape) ** 4 * (rng.random(a.shape) > zeros)).astype(F32)
        for n, a in tuned.items()
        if a.dtype.kind not in "ib"
    }


def three(family: str = "bert") -> tuple[cases.Arrays, cases.Arrays, cases.Arrays]:
    base, tuned = cases.pair(family)
    return base, tuned, fisher_of(tuned)


def run(base: Any, tuned: Any, fisher: Any, **options: Any) -> cases.Arrays:
    given = None if fisher is None else from_arrays(fisher)
    return cases.read(purify(from_arrays(base), from_arrays(tuned), fisher=given, **options))


@pytest.mark.parametrize("ratio", [0, 1e-9, 0.1, 0.3, 0.5, 0.999, 1])
@pytest.mark.parametrize("family", cases.FAMILIES)
@pytest.mark.parametrize("block", [1 << 20, 16, 4], ids=["whole", "rows", "parts of rows"])
def test_it_equals_the_sort(
    family: str, ratio: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned, fisher = three(family)
    cases.shrink_blocks(monkeypatch, block)
    found = run(base, tuned, fisher, ratio=ratio)
    skip = cases.EMBEDDING[family]
    expected = reference.purify(base, tuned, fisher, ratio=ratio, epsilon=1e-8, skip=skip)
    assert cases.stored(found) == cases.stored(expected)
    if ratio == 0:
        assert cases.stored(found) == cases.stored(tuned)


VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1.0000001, 1e-30, 1e-45, 3e38, -2e38])
CURVES = st.sampled_from([0.0, 1e-45, 1e-8, 1.0, 3e38])


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(VALUES, VALUES, CURVES), min_size=1, max_size=30),
    ratio=st.floats(0, 1),
    epsilon=st.sampled_from([0.0, 1e-8, 1.0]),
)
def test_never_more_than_the_share_and_bit_for_bit(
    rows: list[tuple[float, float, float]], ratio: float, epsilon: float
) -> None:
    b, t, h = (np.array(column, F32) for column in zip(*rows, strict=True))
    h[0] = 1  # a fisher of zeros alone is refused
    with np.errstate(over="ignore"):
        t = np.where(np.isfinite(t - b), t, b)
    found = run({"w": b}, {"w": t}, {"w": h}, ratio=ratio, epsilon=epsilon)["w"].view("u4")
    expected = reference.purify({"w": b}, {"w": t}, {"w": h}, ratio=ratio, epsilon=epsilon)["w"]
    assert found.tolist() == expected.view("u4").tolist()
    old, new = b.view("u4"), t.view("u4")
    assert ((found == old) | (found == new)).all()
    assert (found != new).sum() <= int(ratio * b.size)


def test_ratio_one_gives_base_back_even_where_it_is_not_finite() -> None:
    b, t = np.array([1, 2, np.inf], F32), np.array([np.inf, 3, np.inf], F32)
    with pytest.raises(NonFiniteError, match="the score is NaN, infinite or negative"):
        run({"w": b}, {"w": t}, {"w": np.ones(3, F32)}, ratio=0.5)


@pytest.mark.parametrize("score", ["fisher", "drift", "inverse-fisher", "random"])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_scores_and_scopes_reset_the_share(score: str, scope: str) -> None:
    base = cases.model("bert")
    tuned = cases.finetuned(base, share=1)  # drifts of equal size would tie at a threshold
    options = {"score": score, "scope": scope, "embeddings": "pool"}
    found = run(base, tuned, fisher_of(tuned, zeros=0), ratio=0.5, **options)
    sizes = {n: a.size for n, a in tuned.items() if a.dtype == F32}
    reset = {n: int((found[n] != tuned[n]).sum()) for n in sizes}
    if scope == "tensor":
        assert reset == {n: int(0.5 * size) for n, size in sizes.items()}
    else:
        assert sum(reset.values()) == int(0.5 * sum(sizes.values()))


def test_the_scores_rank_as_they_say() -> None:
    b, t = np.zeros(4, F32), np.array([0, 1, 2, 4], F32)
    h = np.array([1e-6, 1, 100, 1000], F32)

    def reset(score: str) -> list[int]:
        found = run({"w": b}, {"w": t}, {"w": h}, ratio=0.25, score=score)["w"]
        return [i for i in range(4) if found[i] != t[i]]

    # δ² is 0, 1, 4, 16; δ²/H is 0, 1, 0.04, 0.016; 1/H is largest where nothing drifted.
    assert (reset("drift"), reset("fisher"), reset("inverse-fisher")) == ([3], [1], [1])


def test_without_drift_nothing_is_reset_whatever_the_curvature() -> None:
    b = np.arange(6, dtype=F32)
    result = purify(
        from_arrays({"w": b}), from_arrays({"w": b}), fisher=from_arrays({"w": b}), epsilon=0
    )
    assert result.notes["purify"]["threshold"] == 0
    assert result["w"].read(0, 6).tolist() == b.tolist()


@pytest.mark.parametrize("workers", cases.WORKERS)
def test_workers_and_sharding_do_not_matter(workers: int, tmp_path: Path) -> None:
    base, tuned, fisher = three()
    outputs = []
    for shards in cases.SHARDS:
        given = [
            open_checkpoint(cases.write_directory(tmp_path / f"{n}{shards}", a, shards=shards))
            for n, a in (("base", base), ("tuned", tuned), ("fisher", fisher))
        ]
        engine = Engine(workers=workers)
        result = purify(*given[:2], fisher=given[2], engine=engine)
        assert result.notes["purify"]["diagnostics"]
        outputs.append(cases.stored(cases.read(result)))
    assert outputs[0] == outputs[1] == outputs[2]
    assert outputs[0] == cases.stored(run(base, tuned, fisher))


# --- word embeddings --------------------------------------------------------------------------


@pytest.mark.parametrize("embeddings", ["keep", "pool", "reset", "epur"])
def test_what_becomes_of_the_word_embedding(embeddings: str) -> None:
    base, tuned, fisher = three()
    fisher = {n: np.linspace(0.1, 1, a.size, dtype=F32).reshape(a.shape) for n, a in fisher.items()}
    name = cases.EMBEDDING["bert"]
    tuned[name] = base[name] + np.linspace(0.1, 1, 11, dtype=F32)[:, None]
    counts = TokenCounts({"token1": 1}, "one")
    options = {"counts": counts, "top": 2} if embeddings == "epur" else {}
    models = from_arrays(base), from_arrays(tuned, **cases.vocabulary())
    purified = purify(
        *models, fisher=from_arrays(fisher), ratio=0.3, embeddings=embeddings, **options
    )
    assert ("epur" in purified.notes) == (embeddings == "epur")
    found = cases.read(purified)[name]
    reset = (found == base[name]).all(1)
    expected = {"keep": [], "reset": list(range(11)), "epur": [9, 10]}
    if embeddings == "pool":
        assert (found != tuned[name]).any()
    else:
        assert np.flatnonzero(reset).tolist() == expected[embeddings]
        assert (found[~reset] == tuned[name][~reset]).all()


def test_a_tied_head_is_edited_like_its_embedding() -> None:
    base, tuned, fisher = three("llama")
    for arrays in (base, tuned):
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    del fisher["lm_head.weight"]  # a fisher has tied weights once
    config = {**cases.CONFIGS["llama"], "tie_word_embeddings": True}
    result = purify(
        *(from_arrays(a, config=config) for a in (base, tuned)),
        fisher=from_arrays(fisher),
        embeddings="pool",
        ratio=0.5,
    )
    found = cases.stored(cases.read(result))
    assert found["lm_head.weight"] == found["model.embed_tokens.weight"]
    assert found["lm_head.weight"] != cases.stored(tuned)["lm_head.weight"]


# --- masks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1 << 20, 16], ids=["whole", "cut"])
def test_a_mask_gives_the_same_bytes_on_another_sharding(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned, fisher = three()
    cases.shrink_blocks(monkeypatch, block)
    once = purify(from_arrays(base), from_arrays(tuned), fisher=from_arrays(fisher))
    save(changed_mask(once), tmp_path / "mask.safetensors")
    mask = open_checkpoint(tmp_path / "mask.safetensors")
    packed = sum(view.nbytes for view in mask.values())
    assert packed == sum((once[n].size + 7) // 8 for n in mask)
    given = [
        open_checkpoint(cases.write_directory(tmp_path / n, a, shards=7))
        for n, a in (("base", base), ("tuned", tuned))
    ]
    again = purify(*given, from_mask=mask)
    assert cases.stored(cases.read(again)) == cases.stored(cases.read(once))
    outs = ((once, "once.safetensors"), (again, "again"))
    shares = [save(one, tmp_path / out)["effective_share"] for one, out in outs]
    assert shares[0] == shares[1] > 0
    other = cases.read(purify(*given, from_mask=mask, invert=True))
    for name, view in once.items():
        if name in mask:
            changed = cases.read(once)[name] != tuned[name]
            expected = np.where(changed, tuned[name], base[name])
            assert other[name].tobytes() == expected.tobytes()
        elif view.dtype.arithmetic:
            assert other[name].tobytes() == base[name].tobytes()


NORM = "embeddings.LayerNorm.weight"


def wrong_mask(change: Callable[[cases.Arrays], Any], *, shaped: bool) -> Checkpoint:
    base, tuned, fisher = three()
    mask = changed_mask(purify(*map(from_arrays, (base, tuned)), fisher=from_arrays(fisher)))
    arrays = cases.read(mask)
    change(arrays)
    metadata = {k: v for k, v in mask.metadata.items() if shaped or k != "shapes"}
    return from_arrays(arrays, metadata=metadata)


WRONG_MASKS: dict[str, tuple[Callable[[cases.Arrays], Any], bool, str]] = {
    "too short": (lambda a: a.update({NORM: a[NORM][:0]}), True, r"has 0 bytes; .* shape \[6\]"),
    "too short, no shapes": (lambda a: a.update({NORM: a[NORM][:0]}), False, "expected 1"),
    "without a shape": (lambda a: a.update({"more": a[NORM]}), True, "'more': .*not give this"),
    "one more": (lambda a: a.update({"more": a[NORM]}), False, "'more': .* no counterpart"),
}


@pytest.mark.parametrize(("change", "shaped", "match"), WRONG_MASKS.values(), ids=WRONG_MASKS)
def test_wrong_masks_are_refused(
    change: Callable[[cases.Arrays], Any], shaped: bool, match: str
) -> None:
    base, tuned = map(from_arrays, cases.pair())
    with pytest.raises(MismatchError, match=match):
        purify(base, tuned, from_mask=wrong_mask(change, shaped=shaped))


def test_a_mask_of_another_model_is_refused() -> None:
    base, tuned = map(from_arrays, cases.pair())
    other = {name: array[..., :2] for name, array in cases.read(tuned).items()}
    mask = changed_mask(mix(from_arrays(other), from_arrays(other), ratio=1))
    with pytest.raises(MismatchError, match=r"the mask is of shape \[2\]; expected \[6\]"):
        purify(base, tuned, from_mask=mask)
    with pytest.raises(MismatchError, match="not a mask that wsurg wrote"):
        purify(base, tuned, from_mask=tuned)
    shapes = '{"a":'
    with pytest.raises(FormatError, match="the mask's shapes"):
        purify(base, tuned, from_mask=replace(mask, metadata={**mask.metadata, "shapes": shapes}))


def test_a_mask_of_what_is_kept_is_refused() -> None:
    base, tuned = map(from_arrays, cases.pair())
    mask = changed_mask(mix(base, tuned))
    with pytest.raises(MismatchError, match=r"not edited here \(excluded\)"):
        purify(base, tuned, from_mask=mask, exclude=(NORM,))


def test_a_mask_of_version_0_1_0_has_no_shapes() -> None:
    base, tuned = map(from_arrays, cases.pair())
    half = mix(base, tuned)
    old = wrong_mask(lambda arrays: None, shaped=False)
    old = replace(changed_mask(half), metadata=old.metadata)
    assert cases.stored(cases.read(purify(base, tuned, from_mask=old))) == cases.stored(
        cases.read(half)
    )


def test_what_does_not_count_is_not_in_the_record() -> None:
    base, tuned, fisher = map(from_arrays, three())
    mask = changed_mask(purify(base, tuned, fisher=fisher))

    def step(**given: Any) -> Any:
        return purify(base, tuned, **given).step

    by_mask = step(fisher=fisher, from_mask=mask, ratio=0.7, embeddings="reset")
    assert set(by_mask.settings) == {
        *("invert", "include", "exclude", "keep_mismatched", "allow_partial")
    }
    assert list(by_mask.inputs) == ["base", "tuned", "from_mask"]
    by_drift = step(fisher=fisher, score="drift", seed=3, top=9)
    assert not {"epsilon", "seed", "counts", "top", "clamp", "invert"} & set(by_drift.settings)
    assert list(by_drift.inputs) == ["base", "tuned"]
    assert step(score="random", seed=3).settings["seed"] == 3


@pytest.mark.parametrize("score", ["fisher", "drift", "inverse-fisher", "random"])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_an_engine_that_keeps_scores_changes_nothing(score: str, scope: str) -> None:
    base, tuned, fisher = map(from_arrays, three("gpt2"))
    given: dict[str, Any] = {"fisher": fisher, "score": score, "scope": scope, "seed": 4}
    engine = Engine(kept={})
    for ratio in (0.2, 0.5, 1, 0, 0.2):
        found = purify(base, tuned, ratio=ratio, engine=engine, **given)
        expected = purify(base, tuned, ratio=ratio, **given)
        assert cases.stored(cases.read(found)) == cases.stored(cases.read(expected))
        assert found.notes == expected.notes
    other = purify(base, base, ratio=0.5, engine=engine, **given)  # another pair, same engine
    assert cases.stored(cases.read(other)) == cases.stored(cases.read(base))


def test_an_engine_that_keeps_scores_computes_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import weightsurgery.operators.purify as module

    base, tuned, fisher = map(from_arrays, three())
    count = 0
    whole = module.fisher_score

    def counted(*blocks: Any) -> Any:
        nonlocal count
        count += blocks[0].size
        return whole(*blocks)

    monkeypatch.setattr(module, "fisher_score", counted)
    engine = Engine(kept={})
    ranked = 0
    for ratio in (0.1, 0.4, 0.9):
        found = module.purify(base, tuned, fisher=fisher, ratio=ratio, engine=engine)
        cases.read(found)
        ranked = found.notes["purify"]["ranked_dimensions"]
    assert count == ranked


def test_the_word_embedding_can_be_named() -> None:
    base, tuned, fisher = three()
    renamed = [
        {n.replace("word_embeddings", "table"): a for n, a in arrays.items()}
        for arrays in (base, tuned, fisher)
    ]
    opened = [from_arrays(arrays) for arrays in renamed]
    name = next(n for n in renamed[0] if "table" in n)
    unseen = purify(*opened[:2], fisher=opened[2])
    assert "no word embedding was recognized" in unseen.warnings[0]
    assert "edited" in {view.status for n, view in unseen.items() if n == name}
    named = purify(*opened[:2], fisher=opened[2], embedding=name)
    assert named.warnings == ()
    found = cases.read(named)
    assert cases.stored({name: found[name]}) == cases.stored({name: renamed[1][name]})
    plain = cases.read(purify(*map(from_arrays, (base, tuned)), fisher=from_arrays(fisher)))
    assert len(found) == len(plain)
    for n, array in plain.items():
        assert array.tobytes() == found[n.replace("word_embeddings", "table")].tobytes()


# --- what cannot be ---------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "no fisher": ({}, "E-SETTING-CONFLICT", "score 'fisher' needs the curvature"),
    "ratio": ({"ratio": 1.5}, "E-SETTING", "ratio is 1.5; expected a share"),
    "epsilon": ({"epsilon": -1.0}, "E-SETTING", "epsilon is -1; expected 0 or more"),
    "invert": ({"invert": True}, "E-SETTING-CONFLICT", "invert is for a mask"),
    "no counts": (
        {"score": "drift", "embeddings": "epur"},
        "E-SETTING-CONFLICT",
        "embeddings=epur needs token counts",
    ),
    "no vocabulary": (
        {"score": "drift", "embeddings": "epur", "counts": TokenCounts({"the": 9}, "x")},
        "E-VOCABULARY",
        "no vocabulary beside TUNED",
    ),
    "nothing to rank": (
        {"score": "drift", "include": ("*word_embeddings*",)},
        "E-NOTHING-TO-DO",
        "there is nothing to rank",
    ),
    "no embedding": (
        {"score": "drift", "embeddings": "reset", "exclude": ("*word_embeddings*",)},
        "E-EMBEDDING-NAME",
        "embeddings is 'reset', but no word embedding",
    ),
}


@pytest.mark.parametrize(("options", "code", "reason"), BAD.values(), ids=BAD)
def test_refusals(options: dict[str, Any], code: str, reason: str) -> None:
    with pytest.raises(SurgeryError, match=reason) as told:
        purify(*map(from_arrays, cases.pair()), **options)
    assert (type(told.value), told.value.code) == (CODES[code].kind, code)


def bad_fisher(name: str, value: Any) -> cases.Arrays:
    fisher = three()[2]
    if value is None:
        del fisher[name]
    else:
        fisher[name] = value(fisher[name])
    return fisher


NAME = "encoder.layer.1.output.LayerNorm.bias"
FISHERS: dict[str, tuple[Any, str]] = {
    "missing": (None, f"it lacks 1 tensor, .*first: {NAME}"),
    "shape": (lambda a: a[:3], "tensor '.*LayerNorm.bias': the fisher does not fit"),
    "dtype": (lambda a: a.astype(np.float16), "a dtype other than F32"),
    "negative": (lambda a: a - 1, "elements of the fisher negative, NaN or infinite"),
    "nan": (lambda a: a * F32(np.nan), "6 elements of the fisher negative, NaN"),
}


@pytest.mark.parametrize(("value", "reason"), FISHERS.values(), ids=FISHERS)
def test_a_fisher_that_does_not_fit_names_the_tensor(value: Any, reason: str) -> None:
    with pytest.raises(MismatchError, match=reason):
        run(*cases.pair(), bad_fisher(NAME, value))


def test_a_fisher_of_another_model_is_named(tmp_path: Path) -> None:
    base, tuned = map(from_arrays, cases.pair())
    other = from_arrays({"something.else": np.ones(3, F32)}, label="other.safetensors")
    with pytest.raises(MismatchError, match=r"^other\.safetensors: the fisher is of another model"):
        purify(base, tuned, fisher=other)
    error = from_arrays(three()[2], metadata={"estimator": "fisher-standard-error"})
    with pytest.raises(MismatchError, match="the fisher's standard error, not the fisher"):
        purify(base, tuned, fisher=error)


def test_ratio_one_needs_no_finite_drift() -> None:
    base, tuned, fisher = three()
    tuned[NAME] = tuned[NAME] * F32(np.nan)
    found = run(base, tuned, fisher, ratio=1)
    assert found[NAME].tobytes() == base[NAME].tobytes()
    with pytest.raises(NonFiniteError, match="the score is NaN"):
        run(base, tuned, fisher, ratio=0.5)


def test_a_fisher_of_zeros_is_refused() -> None:
    base, tuned = cases.pair()
    fisher = {n: a * 0 for n, a in fisher_of(tuned).items()}
    with pytest.raises(MismatchError, match="zero everywhere"):
        run(base, tuned, fisher)


# --- the science ------------------------------------------------------------------------------


def diffused(size: int, k: float, seed: int = 3) -> tuple[Any, Any, Any]:
    """A base, drifts that are N(0, k·H), and H over five orders of magnitude."""
    rng = np.random.default_rng(seed)
    h = (10.0 ** rng.uniform(-9, -4, size)).astype(F32)
    base = rng.normal(0, 1e-3, size).astype(F32)
    return base, (base + rng.normal(0, np.sqrt(k * h))).astype(F32), h


@pytest.mark.parametrize("k", [0.01, 1.0, 300.0])
def test_diagnostics_of_pure_diffusion(k: float) -> None:
    base, tuned, h = diffused(1_000_000, k)
    result = purify(*(from_arrays({"w": a}) for a in (base, tuned)), fisher=from_arrays({"w": h}))
    (entry,) = result.notes["purify"]["diagnostics"]
    assert entry["k"] == pytest.approx(k, rel=0.02)
    assert entry["tail_excess"] == pytest.approx(1, abs=0.1)
    assert entry["ks"] < 0.01


def test_planted_dimensions_are_found_better_than_by_drift_or_chance() -> None:
    base, tuned, h = diffused(100_000, 1.0)
    rng = np.random.default_rng(0)
    planted = rng.choice(base.size, 2000, replace=False)
    tuned[planted] = base[planted] + rng.normal(0, 10 * np.sqrt(h[planted])).astype(F32)
    given = [from_arrays({"w": a}) for a in (base, tuned)]

    def precision(score: str) -> float:
        result = purify(*given, fisher=from_arrays({"w": h}), ratio=0.02, score=score)
        reset = np.flatnonzero(result["w"].read(0, base.size) != tuned)
        return float(np.isin(reset, planted).mean())  # as many are reset as planted: also recall

    found = {score: precision(score) for score in ("fisher", "drift", "random")}
    assert found["fisher"] > 0.6
    assert found["fisher"] > found["drift"] + 0.4 > found["random"]


def test_planted_drift_shows_in_the_tail() -> None:
    base, tuned, h = diffused(100_000, 1.0)
    tuned[:1000] = base[:1000] + 20 * np.sqrt(h[:1000])
    result = purify(*(from_arrays({"w": a}) for a in (base, tuned)), fisher=from_arrays({"w": h}))
    (entry,) = result.notes["purify"]["diagnostics"]
    assert entry["tail_excess"] == pytest.approx(11, rel=0.1)  # 1 % of the dimensions, and 0.1 %


def test_diagnostics_are_per_tensor_and_leave_out_what_did_not_move() -> None:
    base, tuned, h = diffused(50_000, 2.0)
    tensors = {"a": base[:20_000], "b": base[20_000:]}
    moved = {"a": tensors["a"], "b": tuned[20_000:]}
    fisher = {"a": h[:20_000], "b": h[20_000:]}
    result = purify(from_arrays(tensors), from_arrays(moved), fisher=from_arrays(fisher))
    still, entry = result.notes["purify"]["diagnostics"]
    assert still == {
        "tensor": "a",
        "dimensions": 20_000,
        "moved": 0,
        "k": None,
        "tail_excess": None,
        "ks": None,
    }
    assert entry["k"] == pytest.approx(2, rel=0.05)


def test_a_mask_of_a_scalar() -> None:
    base = from_arrays({"scale": np.float32(1), "w": np.ones((3, 3), F32)})
    tuned = from_arrays({"scale": np.float32(2), "w": np.zeros((3, 3), F32)})
    masked = purify(base, tuned, from_mask=changed_mask(mix(base, tuned, ratio=1)))
    assert cases.stored(cases.read(masked)) == cases.stored(cases.read(base))
