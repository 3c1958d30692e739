"""Pairs of other shapes, dtypes or models: what is paired in part, kept, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import cases
from tests.cases import zeros
from weightsurgery.alignment import align
from weightsurgery.checkpoint import from_arrays
from weightsurgery.errors import MismatchError
from weightsurgery.operators.mix import mix

EMBEDDING, HEAD = cases.EMBEDDING["llama"], "lm_head.weight"
Shapes = dict[str, tuple[int, ...]]


@pytest.mark.parametrize("rows", [9, 14], ids=["shrunken", "extended"])
def test_vocabularies_pair_on_their_common_rows(rows: int) -> None:
    base, tuned = cases.pair("llama")
    rng = np.random.default_rng(3)
    for name in (EMBEDDING, HEAD):
        tuned[name] = rng.normal(0, 1, (rows, 6)).astype(cases.BF16)
    sizes = {"base": {"vocab_size": 11}, "tuned": {"vocab_size": rows}}
    given = from_arrays(base, config=sizes["base"]), from_arrays(tuned, config=sizes["tuned"])
    common = min(rows, 11)
    found = align(*given)
    reason = f"{common} common rows ([11, 6] in BASE, [{rows}, 6] in TUNED)"
    if rows > common:
        assert found.to_json()["partly_eligible"] == [
            {"tensor": name, "dimensions": common * 6, "reason": reason}
            for name in (HEAD, EMBEDDING)
        ]
    else:  # TUNED's rows all have a counterpart
        assert {e["note"] for e in found.to_json()["notes"]} == {reason}
    mixed = cases.read(mix(*given, ratio=1))
    for name in (EMBEDDING, HEAD):
        assert mixed[name][:common].tobytes() == base[name][:common].tobytes()
        assert mixed[name][common:].tobytes() == tuned[name][common:].tobytes()


@pytest.mark.parametrize("size", [9, 14], ids=["shrunken", "extended"])
def test_a_bias_over_the_vocabulary_pairs_on_its_common_part(size: int) -> None:
    bias = "cls.predictions.bias"
    base, tuned = {bias: np.zeros(11, np.float32)}, {bias: np.ones(size, np.float32)}
    given = (
        from_arrays(base, config={"vocab_size": 11}),
        from_arrays(tuned, config={"vocab_size": size}),
    )
    common = min(size, 11)
    assert align(*given).dimensions == common
    mixed = cases.read(mix(*given, ratio=1))[bias]
    assert mixed.tolist() == [0.0] * common + [1.0] * (size - common)


@pytest.mark.parametrize("shape", [(14, 5), (14,), (14, 6, 1)], ids=str)
def test_other_widths_are_no_vocabulary(shape: tuple[int, ...]) -> None:
    base = cases.shapes_of("llama")
    with pytest.raises(MismatchError, match=r"'model\.embed_tokens\.weight': shapes differ"):
        align(zeros(base), zeros(base | {EMBEDDING: shape}))


def test_task_heads_are_kept_from_tuned() -> None:
    plain = cases.shapes_of("bert")
    base = zeros(plain | {"score.weight": (3, 6)})
    tuned = zeros(plain | {"score.weight": (2, 6), "classifier.bias": (2,), "extra": (4,)})
    assert align(base, tuned).to_json()["kept_from_tuned"] == [
        {"tensor": "classifier.bias", "reason": "a task head that BASE lacks"},
        {"tensor": "extra", "reason": "BASE has no such tensor"},
        {
            "tensor": "score.weight",
            "reason": "a task head of another shape ([3, 6] in BASE, [2, 6] in TUNED)",
        },
    ]


NORM = "embeddings.LayerNorm.weight"


def test_shapes_that_differ_are_refused_or_kept() -> None:
    plain = cases.shapes_of("bert")
    base, tuned = zeros(plain), zeros(plain | {NORM: (7,)}, label="tuned/")
    message = r"tuned/: tensor '.*Norm.weight': shapes differ: \[6\] in BASE, \[7\] in TUNED \(1 te"
    with pytest.raises(MismatchError, match=message + ".*--keep-mismatched"):
        align(base, tuned)
    kept = align(base, tuned, mismatched="keep")
    assert [p.name for p in kept.pairs if not p.eligible] == [NORM]


def test_on_the_command_line_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = cases.pair("bert")
    tuned[NORM] = np.zeros(7, np.float32)
    files = [
        cases.write_file(tmp_path / f"{name}.safetensors", arrays)
        for name, arrays in (("base", base), ("tuned", tuned))
    ]
    out = tmp_path / "out.safetensors"
    assert cases.wsurg("mix", *files, "-o", out) == 4
    assert capsys.readouterr().err.startswith("error[E-PAIR-SHAPE]: ")
    assert not out.exists()
    assert cases.wsurg("mix", *files, "-o", out, "--keep-mismatched", "--ratio", 1) == 0
    assert cases.stored_in(out)[NORM] == ("F32", (7,), bytes(28))


def test_other_model_types_are_refused() -> None:
    shapes = cases.shapes_of("bert")
    base, tuned = (zeros(shapes, config={"model_type": t}) for t in ("bert", "roberta"))
    with pytest.raises(MismatchError, match="model_type is bert in BASE and roberta in TUNED"):
        align(base, tuned, partial="refuse")
    assert "model_type is bert in BASE and roberta in TUNED" in align(base, tuned).warnings[0]
    assert align(base, zeros(shapes)).dimensions == align(base, base).dimensions


@pytest.mark.parametrize("kind", [[], ["gpt2"], {}, {"gpt2": 1}, 3, None], ids=str)
def test_a_model_type_that_is_no_name_ties_nothing(kind: Any) -> None:
    shapes = {"wte.weight": (3, 2), "lm_head.weight": (3, 2)}
    base, tuned = (zeros(shapes, config={"model_type": kind}) for _ in range(2))
    assert align(base, tuned).dimensions == 12


@pytest.mark.parametrize(
    ("base", "told"),
    [
        (np.zeros((2, 3), np.int32), r"'i': dtypes differ: I32 in BASE, I64 in TUNED \(1 tensor "),
        (np.zeros((2, 3), np.uint8), "dtypes differ: U8 in BASE, I64 in TUNED"),
        (np.zeros((3, 2), np.int64), r"'i': shapes differ: \[3, 2\] in BASE, \[2, 3\] in TUNED"),
        (np.zeros((4, 3), np.int64), r"'i': shapes differ: \[4, 3\] in BASE, \[2, 3\] in TUNED"),
    ],
    ids=["other integers", "codes", "another shape", "more rows"],
)
def test_integers_must_be_alike(base: Any, told: str) -> None:
    w = np.zeros(2, np.float32)
    given = from_arrays({"w": w, "i": base})
    tuned = from_arrays({"w": w, "i": np.zeros((2, 3), np.int64)})
    with pytest.raises(MismatchError, match=told):
        align(given, tuned)
    for mismatched in ("keep", "keep integers"):
        kept = {p.name: p.eligible for p in align(given, tuned, mismatched=mismatched).pairs}
        assert kept == {"i": 0, "w": 2}


def test_to_keep_integers_is_not_to_keep_the_rest() -> None:
    w = np.zeros((2, 3), np.float32)
    for other in (w.T, w.astype(np.int8)):
        with pytest.raises(MismatchError, match=r"'w': (shapes differ|floating on one side)"):
            align(from_arrays({"w": w}), from_arrays({"w": other}), mismatched="keep integers")


@pytest.mark.parametrize("tuned", [{"other.thing": (2, 2)}, {}], ids=["other names", "no tensors"])
def test_models_that_share_nothing_are_refused(tuned: Shapes) -> None:
    with pytest.raises(
        MismatchError, match=r"no tensors of BASE and TUNED could be paired.*--strip-prefix"
    ):
        align(zeros({"some.weight": (2, 3)}), zeros(tuned))


def test_dtypes_are_judged() -> None:
    floats = {"w": np.zeros(2, np.float32), "k": np.zeros(2, np.float32)}
    base = from_arrays(floats | {"i": np.zeros(2, np.int64)})
    tuned = from_arrays(
        {"w": np.zeros(2, cases.BF16), "k": np.zeros(2, np.int8), "i": np.zeros(2, np.int64)}
    )
    with pytest.raises(MismatchError, match=r"'k': floating on one side only \(F32 in BASE, I8"):
        align(base, tuned)
    report = align(base, tuned, mismatched="keep").to_json()
    assert report["notes"] == [{"tensor": "w", "note": "F32 in BASE, BF16 in TUNED"}]
    assert report["kept_from_tuned"] == [
        {"tensor": "i", "reason": "not floating (I64 in BASE, I64 in TUNED)"},
        {"tensor": "k", "reason": "floating on one side only (F32 in BASE, I8 in TUNED)"},
    ]
