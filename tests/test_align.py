"""Which tensors belong together, and that every other one is accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import cases
from tests.cases import zeros
from weightsurgery.alignment import Alignment, align
from weightsurgery.checkpoint import from_arrays
from weightsurgery.comparison import diff
from weightsurgery.errors import MismatchError, SettingError
from weightsurgery.formats import save
from weightsurgery.operators.mix import mix

Shapes = dict[str, tuple[int, ...]]


def pairing(found: Alignment) -> dict[str, str | None]:
    return {p.name: p.base.name if p.base else None for p in found.pairs}


def prefixed(prefix: str, names: Any) -> dict[str, str]:
    return {prefix + name: name for name in names}


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_exact_names(family: str) -> None:
    shapes = cases.shapes_of(family)
    found = align(zeros(shapes), zeros(shapes))
    assert pairing(found) == {name: name for name in shapes}
    assert (found.unused, found.prefix, found.prefix_on) == ((), "", "")
    assert found.dimensions == sum(int(np.prod(shape)) for shape in shapes.values())


WRAPPERS = ["module.", "_orig_mod.", "base_model.model."]


@pytest.mark.parametrize("prefix", ["bert.", "model.", *WRAPPERS])
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_common_prefix_on_either_side(prefix: str, side: str) -> None:
    plain = cases.shapes_of("bert")
    longer = {prefix + name: shape for name, shape in plain.items()}
    given = {"base": plain, "tuned": plain} | {side: longer}
    found = align(zeros(given["base"]), zeros(given["tuned"]))
    assert (found.prefix, found.prefix_on) == (("", "") if prefix in WRAPPERS else (prefix, side))
    assert found.unused == ()
    expected = prefixed(prefix, plain)
    if side == "base":
        expected = {name: long for long, name in expected.items()}
    assert pairing(found) == expected
    told = None if prefix in WRAPPERS else {"text": prefix, "on": side}
    assert found.to_json()["prefix"] == told


def test_prefix_and_exact_names_together() -> None:
    plain = cases.shapes_of("bert")
    tuned = {f"bert.{name}": shape for name, shape in plain.items()} | {"temperature": (1,)}
    found = align(zeros(plain | {"temperature": (1,)}), zeros(tuned))
    assert pairing(found) == prefixed("bert.", plain) | {"temperature": "temperature"}


def test_the_prefix_that_pairs_most_wins() -> None:
    base = zeros({"a.w": (2,), "b.w": (2,), "c.w": (2,)})
    tuned = zeros({"x.a.w": (2,), "y.b.w": (2,), "y.c.w": (2,)})
    found = align(base, tuned)
    assert found.prefix == "y."
    assert pairing(found) == {"x.a.w": None, "y.b.w": "b.w", "y.c.w": "c.w"}
    assert found.unused == (("a.w", "TUNED has no such tensor"),)


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_tensor_is_not_paired_twice(side: str) -> None:
    """Where a name occurs with the prefix and without it, the exact one has the counterpart."""
    plain: Shapes = {"w": (2,), "v": (2,), "u": (2,)}
    longer: Shapes = {"p.v": (2,), "p.u": (2,)} | {"w": (2,), "p.w": (2,)}
    base, tuned = (plain, longer) if side == "tuned" else (longer, plain)
    found = align(zeros(base), zeros(tuned))
    partners = [name for name in pairing(found).values() if name]
    assert len(set(partners)) == len(partners)
    assert pairing(found)["w"] == "w"
    left = [n for n, b in pairing(found).items() if b is None] + [n for n, _ in found.unused]
    assert left == ["p.w"]


# --- tied weights -----------------------------------------------------------------------------

TIED = {"tie_word_embeddings": True}
EMBEDDING, HEAD = cases.EMBEDDING["llama"], "lm_head.weight"


def llama_pair(base_head: bool, tuned_head: bool) -> tuple[cases.Arrays, cases.Arrays]:
    """Both models tied: a stored head is the embedding again."""
    base, tuned = cases.pair("llama")
    for arrays, stores in ((base, base_head), (tuned, tuned_head)):
        arrays[HEAD] = arrays[EMBEDDING].copy()
        if not stores:
            del arrays[HEAD]
    return base, tuned


def test_base_ties_what_tuned_stores() -> None:
    base, tuned = llama_pair(False, True)
    found = align(from_arrays(base, config=TIED), from_arrays(tuned))
    assert pairing(found)[HEAD] == EMBEDDING
    assert {"tensor": HEAD, "note": f"tied in BASE to '{EMBEDDING}'"} in found.to_json()["notes"]
    assert found.unused == ()


@pytest.mark.parametrize("base_head", [False, True], ids=["base stores one", "base stores both"])
@pytest.mark.parametrize("base_config", [{}, TIED], ids=["base says nothing", "base says tied"])
@pytest.mark.parametrize("select", ["random", "drift"])
def test_tied_copies_stay_equal(base_head: bool, base_config: Any, select: str) -> None:
    base, tuned = llama_pair(base_head, True)
    inputs = from_arrays(base, config=base_config), from_arrays(tuned, config=TIED)
    alignment = align(*inputs)
    (copy,) = [pair for pair in alignment.pairs if pair.is_tied_copy]
    assert (copy.name, copy.key) == (HEAD, EMBEDDING)
    everything = sum(tuned[n].size for n in cases.shapes_of("llama"))
    assert alignment.dimensions == everything - tuned[HEAD].size
    found = cases.read(mix(*inputs, ratio=0.7, select=select))
    assert found[HEAD].tobytes() == found[EMBEDDING].tobytes()
    assert found[HEAD].tobytes() not in (base[EMBEDDING].tobytes(), tuned[EMBEDDING].tobytes())


@pytest.mark.parametrize("glob", [HEAD, EMBEDDING])
def test_globs_treat_tied_weights_as_one(glob: str) -> None:
    base, tuned = llama_pair(True, True)
    inputs = from_arrays(base, config=TIED), from_arrays(tuned, config=TIED)
    alignment = align(*inputs)
    assert [p.name for p in alignment.only(include=[glob]).eligible] == [HEAD, EMBEDDING]
    kept = {p.name for p in alignment.only(exclude=[glob]).pairs if p.reason == "excluded"}
    assert kept == {HEAD, EMBEDDING}
    found = cases.read(mix(*inputs, ratio=0, ratio_for=((glob, 1.0),)))
    assert found[HEAD].tobytes() == found[EMBEDDING].tobytes() == base[EMBEDDING].tobytes()


def test_a_head_that_tuned_ties_is_listed() -> None:
    base, tuned = llama_pair(True, False)
    found = align(from_arrays(base), from_arrays(tuned, config=TIED))
    assert found.unused == ((HEAD, "tied to another tensor in TUNED"),)


# --- everything is accounted for --------------------------------------------------------------

NAMES = ["w", "a.w", "p.w", "p.a.w", "p.p.w", "q.a.w", "wte.weight", "p.wte.weight"]
NAMES += ["lm_head.weight", "p.lm_head.weight", "score.weight", "b"]
SHAPES = [(), (2,), (3,), (2, 2), (3, 2), (0, 2)]
KINDS = [np.float32, np.float16, np.int16]
TENSORS = st.dictionaries(
    st.sampled_from(NAMES), st.builds(np.zeros, st.sampled_from(SHAPES), st.sampled_from(KINDS))
)
CONFIG = st.sampled_from([{}, TIED, {"vocab_size": 2}, {"vocab_size": 3}])


@settings(max_examples=300, deadline=None)
@given(TENSORS, TENSORS, CONFIG, CONFIG)
def test_every_tensor_is_accounted_for_once(base: Any, tuned: Any, one: Any, other: Any) -> None:
    given = from_arrays(base, config=one), from_arrays(tuned, config=other)
    try:
        found = align(*given, mismatched="keep")
    except MismatchError:
        common = [(base[n], tuned[n]) for n in tuned if n in base and tuned[n].size]
        assert not [
            b for b, t in common if b.shape == t.shape and b.dtype.kind == t.dtype.kind == "f"
        ]
        return
    assert [p.name for p in found.pairs] == sorted(tuned)
    partners = [
        p.base.name
        for p in found.pairs
        if p.base and not p.is_tied_copy and "tied in" not in p.note
    ]
    assert len(set(partners)) == len(partners)
    paired = {p.base.name for p in found.pairs if p.base}
    report = found.to_json()
    alone = [entry["tensor"] for entry in report["only_in_base"]]
    assert sorted([*paired, *alone]) == sorted(base)
    eligible = [p.name for p in found.eligible]
    kept = [entry["tensor"] for entry in report["kept_from_tuned"]]
    assert sorted([*eligible, *kept]) == sorted(tuned)
    assert report["eligible_tensors"] == len(eligible)
    assert all(e["reason"] for e in (*report["kept_from_tuned"], *report["only_in_base"]))
    for pair in found.eligible:
        assert pair.base is not None
        assert 0 < pair.eligible <= min(pair.tuned.size, pair.base.size)
        assert bool(pair.reason) == (pair.eligible < pair.tuned.size)
    mixed = cases.read(mix(*given, ratio=1, keep_mismatched=True, allow_partial=True))
    assert {n: a.shape for n, a in mixed.items()} == {n: a.shape for n, a in tuned.items()}


def test_globs_need_a_match() -> None:
    found = align(zeros({"w": (2,)}), zeros({"w": (2,)}))
    assert found.only() is found
    with pytest.raises(SettingError, match=r"'v' matches no tensor; see `wsurg inspect`"):
        found.only(include=["v"])
    named = align(*[zeros({"layer.q_proj.weight": (2,)})] * 2)
    with pytest.raises(SettingError, match=r"did you mean '\*q_proj\*'"):
        named.only(include=["q_proj"])


def test_a_head_that_only_base_has_looks_swapped() -> None:
    base, tuned = cases.pair()
    head = {"classifier.weight": np.zeros((2, 6), np.float32)}
    right = align(from_arrays(base), from_arrays({**tuned, **head}))
    swapped = align(from_arrays({**tuned, **head}), from_arrays(base))
    assert right.warnings == ()
    assert len(swapped.warnings) == 1
    assert "'classifier.weight': are BASE and TUNED the right way round?" in swapped.warnings[0]
    both = align(from_arrays({**base, "score.weight": head["classifier.weight"]}),
                 from_arrays({**tuned, **head}))  # fmt: skip
    assert both.warnings == ()


def test_a_swapped_pair_is_told_by_diff_and_in_the_record(tmp_path: Path) -> None:
    base, tuned = cases.pair()
    head = {"classifier.weight": np.zeros((2, 6), np.float32)}
    swapped = from_arrays({**tuned, **head}), from_arrays(base)
    assert "right way round" in " ".join(diff(*swapped).warnings)
    record = save(mix(*swapped, ratio=0.5), tmp_path / "out.safetensors")
    assert ["right way round" in warning for warning in record["warnings"]] == [True]
