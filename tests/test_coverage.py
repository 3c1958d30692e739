"""Coverage: which part of TUNED was compared or edited, and who says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import cases
from weightsurgery.alignment import align
from weightsurgery.checkpoint import from_arrays
from weightsurgery.comparison import diff
from weightsurgery.coverage import Coverage, percent
from weightsurgery.errors import GateError, MismatchError, SettingError
from weightsurgery.gates import check_gates, parse_gate
from weightsurgery.masks import changed_mask
from weightsurgery.operators.epur import epur
from weightsurgery.operators.interpolate import interpolate
from weightsurgery.operators.mix import mix
from weightsurgery.operators.purify import purify
from weightsurgery.token_counts import TokenCounts

MLP, NORM = "layers.0.mlp.up_proj.weight", "norm.weight"
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
WIDE = np.ones((10, 10), np.float32)


def pair(**more: Any) -> tuple[Any, Any]:
    base = {MLP: WIDE, NORM: np.ones(4, np.float32)}
    return from_arrays(base), from_arrays({**{n: a + 1 for n, a in base.items()}, **more})


def test_all_of_it() -> None:
    found = align(*pair())
    assert (found.coverage.share, found.coverage.is_complete) == (1.0, True)
    assert (found.coverage.summary, found.warnings) == ("", ())
    assert found.to_json()["coverage"]["architecture"] is None


def test_task_heads_do_not_count() -> None:
    found = align(*pair(**{"classifier.weight": np.ones((2, 10), np.float32)}))
    assert (found.coverage.heads, found.coverage.parameters) == (20, 124)
    assert found.coverage.is_complete
    assert found.coverage.to_json()["unpaired"] == []


def test_a_head_is_outside_of_the_layers_and_of_the_base_model() -> None:
    base, _ = pair()
    more = np.ones((10, 10), np.float32)
    for config, name in (
        ({}, "layers.3.evil.score.weight"),
        (LLAMA, "model.layers.0.mlp.score.weight"),
        (LLAMA, "evil_head.weight"),
    ):
        ours = cases.read(base)
        tuned = from_arrays({**ours, name: more}, config=config)
        found = align(from_arrays(ours, config=config), tuned).coverage
        assert (found.heads, list(found.unpaired)) == (0, [name])


def test_integers_of_another_dtype_need_no_more_permission() -> None:
    base = from_arrays({MLP: WIDE, "ids": np.zeros(10_000, np.int32)})
    ours = {MLP: WIDE, "extra.weight": WIDE, "ids": np.zeros(10_000, np.int64)}
    with pytest.raises(MismatchError, match=r"50\.00 %"):
        mix(base, from_arrays(ours), keep_mismatched=True)


def test_integers_do_not_count() -> None:
    assert align(*pair(position_ids=np.arange(500))).coverage.is_complete


def test_what_has_no_counterpart_is_warned_of_and_named() -> None:
    base, tuned = pair(**{"extra.weight": np.ones(2, np.float32)})
    (warning,) = align(base, tuned).warnings
    assert warning == (
        "98.11 % of TUNED's parameters have a counterpart in BASE: 1 tensor has none "
        "('extra.weight')"
    )
    assert mix(base, tuned).warnings == (warning,)
    assert diff(base, tuned).warnings == [warning]
    assert diff(base, tuned).alignment["coverage"]["unpaired"] == [
        {"tensor": "extra.weight", "reason": "BASE has no such tensor"}
    ]


OPERATORS: dict[str, Any] = {
    "mix": mix,
    "interpolate": interpolate,
    "purify": lambda *models, **more: purify(*models, score="drift", **more),
    "from a mask": lambda *models, **more: purify(
        *models, from_mask=changed_mask(mix(*models, ratio=1, allow_partial=True)), **more
    ),
    "epur": lambda *models, **more: epur(
        *models, counts=TokenCounts({"a": 1.0}, "made up"), embedding=MLP, **more
    ),
}


@pytest.mark.parametrize("run", OPERATORS.values(), ids=OPERATORS)
def test_operators_refuse_below_95_percent(run: Any) -> None:
    models = pair(**{"extra.weight": np.ones(10, np.float32)})
    with pytest.raises(MismatchError, match=r"91\.23 % of TUNED's .*'extra\.weight'") as caught:
        run(*models)
    assert (caught.value.code, caught.value.exit_code) == ("E-PAIR-COVERAGE", 4)
    assert "--allow-partial" in str(caught.value)
    if run is OPERATORS["epur"]:
        with pytest.raises(MismatchError, match="no vocabulary beside TUNED"):
            run(*models, allow_partial=True)
        return
    result = run(*models, allow_partial=True)
    assert "91.23 %" in result.warnings[0]
    assert result["extra.weight"].status == "copied"


def test_exactly_95_percent_is_enough() -> None:
    base = from_arrays({"a": np.ones(95, np.float32)})
    tuned = from_arrays({"a": np.ones(95, np.float32), "b": np.ones(5, np.float32)})
    assert mix(base, tuned)["b"].status == "copied"


def test_shapes_that_are_kept_on_request_need_no_other_permission() -> None:
    _, tuned = pair()
    other = from_arrays({MLP: WIDE[:5], NORM: np.ones(4, np.float32)})
    with pytest.raises(MismatchError, match="shapes differ"):
        mix(other, tuned)
    assert mix(other, tuned, keep_mismatched=True)[MLP].status == "copied"


def test_added_tokens_need_no_permission_but_are_warned_of() -> None:
    base = from_arrays({"embed_tokens.weight": np.ones((4, 2), np.float32)})
    tuned = from_arrays({"embed_tokens.weight": np.zeros((6, 2), np.float32)})
    mixed = mix(base, tuned, ratio=1)
    assert cases.read(mixed)["embed_tokens.weight"].tolist() == [[1, 1]] * 4 + [[0, 0]] * 2
    assert "66.67 %" in mixed.warnings[0]
    assert align(base, tuned).coverage.to_json()["added_tokens"] == 4


# --- the wrong way round ----------------------------------------------------------------------


def test_base_and_tuned_the_wrong_way_round_are_recognized() -> None:
    """By a task head, by added tokens, by all that TUNED would lack."""
    plain = {MLP: WIDE, "embed_tokens.weight": np.ones((4, 10), np.float32)}
    more: dict[str, Any] = {
        "a head that TUNED lacks, 'score.weight'": {"score.weight": WIDE[:2]},
        "6 rows of the vocabulary and TUNED 4": {"embed_tokens.weight": WIDE[:6]},
        "58.33 % of BASE's parameters": {"visual.weight": WIDE},
    }
    for says, added in more.items():
        tuned, base = from_arrays(plain), from_arrays({**plain, **added})
        (warning,) = align(base, tuned).warnings
        assert says in warning
        assert warning.endswith("are BASE and TUNED the right way round?")
        right_way = align(tuned, base).warnings
        assert not any("right way round" in one for one in right_way)


# --- gates ------------------------------------------------------------------------------------


def judged(text: str, *models: Any) -> None:
    check_gates(diff(*models), [parse_gate(text)])


GATES = {
    "unpaired > 0": "unpaired is 1: extra.weight",
    "extra*: unpaired > 0": "unpaired is 1: extra.weight",
    "only_in_base > 0": "only_in_base is 1: old.weight",
    "extra.*: changed > 0": r"extra.weight: not compared \(BASE has no such tensor\)",
    "unpaired == 1": "unpaired is 1",
}


@pytest.mark.parametrize(("text", "says"), GATES.items(), ids=GATES)
def test_gates_on_what_was_not_compared(text: str, says: str) -> None:
    base, tuned = pair(**{"extra.weight": np.ones(2, np.float32)})
    base = from_arrays({**cases.read(base), "old.weight": np.ones(3, np.float32)})
    with pytest.raises(GateError, match=says):
        judged(text, base, tuned)


@pytest.mark.parametrize("text", ["unpaired > 0", "only_in_base > 0", "*mlp*: unpaired > 0"])
def test_gates_that_hold(text: str) -> None:
    judged(text, *pair())


def test_a_head_is_not_unpaired_and_a_tied_head_not_only_in_base() -> None:
    words = {"embed_tokens.weight": WIDE}
    base = from_arrays({**words, "lm_head.weight": WIDE})
    tuned = from_arrays({**words, "score.weight": WIDE}, config={"tie_word_embeddings": True})
    judged("unpaired > 0", base, tuned)
    judged("only_in_base > 0", base, tuned)


def test_a_glob_that_matches_nothing_is_still_an_error() -> None:
    with pytest.raises(SettingError, match=r"'\*expertz\*' matches no tensor"):
        judged("*expertz*: unpaired > 0", *pair())


def test_json_has_the_gates_and_the_verdict_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = {name: cases.read(given) for name, given in zip("bt", pair(), strict=True)}
    base, tuned = (
        cases.write_file(tmp_path / f"{name}.safetensors", found) for name, found in arrays.items()
    )
    gates = ["--fail-if", "changed > 0", "--fail-if", "unpaired > 0"]
    assert cases.wsurg("diff", base, tuned, "--json", *gates) == 10
    report = json.loads(capsys.readouterr().out)
    assert report["gates"] == [
        {"condition": "changed > 0", "failed": True, "failures": ["model: changed is 104"]},
        {"condition": "unpaired > 0", "failed": False, "failures": []},
    ]
    assert cases.wsurg("diff", base, base) == 0
    shown = capsys.readouterr().out
    assert "All tensors compared are equal, bit for bit." in shown
    assert "100 % of TUNED's parameters (architecture unknown: paired by names)" in shown


# --- numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "text"),
    [(1.0, "100 %"), (0.9999999, "99.99999 %"), (0.95, "95.00 %"), (0.0, "0.00 %"),
     (1 - 1e-16, "<100 %")],
)  # fmt: skip
def test_percent_says_all_of_all_alone(share: float, text: str) -> None:
    assert percent(share) == text


def test_nothing_to_cover_is_covered() -> None:
    found = Coverage(parameters=5, paired=0, heads=5, added=0, unpaired={}, partly={})
    assert (found.share, found.is_complete, found.is_enough()) == (1.0, True, True)


# --- proofs -----------------------------------------------------------------------------------


def test_a_proof_says_which_part_of_tuned_it_is_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = pair(**{"extra.weight": np.ones(10, np.float32)})
    base, tuned = (
        cases.write_file(tmp_path / f"{name}.safetensors", cases.read(given))
        for name, given in zip(("base", "tuned"), models, strict=True)
    )
    out = str(tmp_path / "out.safetensors")
    assert cases.wsurg("mix", base, tuned, "--allow-partial", "-o", out) == 0
    capsys.readouterr()
    assert cases.wsurg("verify", out, "--base", base, "--tuned", tuned) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "for 91.23 % of TUNED's parameters; BASE has no counterpart for the rest" in shown
    assert "1 tensor, compared only with TUNED: 'extra.weight'" in shown
    assert cases.wsurg("verify", out, "--base", base, "--tuned", tuned, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["selection"]["coverage"]["unpaired"][0]["tensor"] == "extra.weight"
