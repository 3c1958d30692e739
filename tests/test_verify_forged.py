"""A record that was written anew, seal and all: what BASE and TUNED still prove against it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import cases
from tests.test_verify import QUERY, RECORD, Pair, counts, forge
from weightsurgery import (
    FormatError,
    GateError,
    changed_mask,
    epur,
    mix,
    open_checkpoint,
    purify,
    save,
    verify,
)
from weightsurgery.proof.verification import check_verification

Record = dict[str, Any]
OTHER = "encoder.layer.1.attention.self.query.weight"


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """A pair with a tokenizer beside TUNED."""
    made = Pair(tmp_path)
    for name in ("base", "tuned"):
        (tmp_path / name / "vocab.txt").write_text("".join(f"{w}\n" for w in cases.WORDS))
    config = {**cases.CONFIGS["bert"], "auto_map": {"AutoModel": "evil.py"}}
    (tmp_path / "tuned" / "config.json").write_text(json.dumps(config))
    made.base, made.tuned = (open_checkpoint(tmp_path / name) for name in ("base", "tuned"))
    return made


def settings(**given: Any) -> Callable[[Record], None]:
    return lambda record: record["recipe"]["settings"].update(given)


OTHER_STEPS: dict[str, Callable[[Record], None]] = {
    "another ratio": settings(ratio=0.31),
    "another seed": settings(seed=1),
    "by drift": settings(select="drift"),
    "one tensor less": settings(exclude=["*query*"]),
}


@pytest.mark.parametrize("name", OTHER_STEPS)
def test_other_steps_than_told_are_found(pair: Pair, name: str) -> None:
    """The bits are BASE's and TUNED's, as many as recorded; but not those of these steps."""
    pair.save(mix(pair.base, pair.tuned, ratio=0.3))
    change = OTHER_STEPS[name]

    def told(record: Record) -> None:
        change(record)
        if name == "by drift":
            del record["recipe"]["settings"]["seed"]

    pair.rewrite(told)
    assert pair.problems() == []
    assert "not what its steps give" in {problem for _, _, problem in pair.prove()}


def test_tensors_of_other_names_are_told(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    """BASE may have been renamed by whom made the output; whoever proves it is told."""
    one, other = sorted(n for n in pair.base if n.endswith("query.weight"))[:2]
    pair.save(mix(pair.base.renamed({one: other, other: one}), pair.tuned))
    report = verify(pair.out, base=pair.base, tuned=pair.tuned)
    assert report["proved"]
    assert report["selection"]["renamed"] == {one: other, other: one}
    given = ("--base", pair.root / "base", "--tuned", pair.root / "tuned")
    assert cases.wsurg("verify", pair.out, *given) == 0
    assert (
        f"the record renames 2 tensors of BASE, first {one} to {other}" in capsys.readouterr().out
    )


def test_two_tensors_of_one_name(pair: Pair) -> None:
    pair.save(mix(pair.base.renamed({}), pair.tuned))

    def told(record: Record) -> None:
        record["recipe"]["inputs"]["base"]["settings"]["names"] = {QUERY: OTHER}

    pair.rewrite(told)
    with pytest.raises(FormatError, match="two tensors would get this name") as raised:
        pair.prove()
    assert raised.value.code == "E-RECORD"


IMPOSSIBLE: dict[str, tuple[Callable[[Record], None], str]] = {
    "ratio": (settings(ratio=7), "its steps cannot be done again: ratio is 7"),
    "kind": (settings(seed="x"), "seed is 'x'"),
    "unknown": (settings(x=1), "no setting is called x"),
    "less": (lambda r: r["recipe"]["settings"].pop("ratio"), "expected .*'ratio'"),
    "other operator": (lambda r: r["recipe"].update(operator="epur"), "no setting is called"),
    "epur": (
        lambda r: r["recipe"].update(operator="epur", settings={"counts": None}),
        "the token counts are None",
    ),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_steps_that_nothing_can_do_are_one_error(pair: Pair, name: str) -> None:
    pair.save()
    change, reason = IMPOSSIBLE[name]
    pair.rewrite(change)
    with pytest.raises(FormatError, match=reason) as raised:
        pair.prove()
    assert raised.value.code == "E-RECORD"


def put(pair: Pair, name: str, data: bytes | None) -> None:
    """Write a file of the output, or take it away, and record it so."""
    (pair.out / name).unlink(missing_ok=True)
    if data is None:
        pair.rewrite(lambda r: r["outputs"].pop(name))
        return
    (pair.out / name).write_bytes(data)
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    pair.rewrite(lambda r: r["outputs"].update({name: entry}))


SIDES: dict[str, tuple[str, bytes | None, str, bool]] = {
    "tokenizer": ("vocab.txt", b"evil\n", "not TUNED's", False),
    "template": ("chat_template.jinja", b"{{ evil }}", "not TUNED's", False),
    "config": ("config.json", b'{"model_type": "bert"}', "not TUNED's", False),
    "gone": ("vocab.txt", None, "missing", False),
    "code": ("modeling.py", b"import os", "extra", True),
    "pickle": ("pytorch_model.bin", b"PK", "extra", True),
}


@pytest.mark.parametrize("name", SIDES)
def test_side_files_are_tuneds(pair: Pair, name: str) -> None:
    """Against the record alone only what wsurg never writes is found."""
    pair.save()
    assert pair.prove() == []
    file, data, problem, always = SIDES[name]
    put(pair, file, data)
    assert (file, None, problem) in pair.prove()
    assert ((file, None, problem) in pair.problems()) == always


def test_a_tuned_without_side_files_says_nothing_of_them(pair: Pair) -> None:
    arrays = cases.read(pair.tuned)
    alone = open_checkpoint(cases.write_file(pair.root / "alone.safetensors", arrays))
    pair.save()
    put(pair, "vocab.txt", b"evil\n")
    assert pair.problems(base=pair.base, tuned=alone) == []


STATEMENTS: dict[str, Callable[[Record], Any]] = {
    "changed_dimensions": lambda r: r.update(changed_dimensions=1),
    "changed_by": lambda r: r["changed_by"]["layer"].clear(),
    "alignment": lambda r: r["alignment"]["kept_from_tuned"].clear(),
    "effective_share": lambda r: r.pop("effective_share"),
    "eligible_dimensions": lambda r: r.update(eligible_dimensions=2.5),
    "dropped": lambda r: r["dropped"].append("x"),
    "report": lambda r: r["report"].update(x=1),
}


@pytest.mark.parametrize("key", STATEMENTS)
def test_what_the_record_tells_of_the_whole_is_checked(pair: Pair, key: str) -> None:
    pair.save()
    pair.rewrite(STATEMENTS[key])
    assert pair.problems() == []
    report = verify(pair.out, base=pair.base, tuned=pair.tuned)
    assert [(p["file"], p["problem"]) for p in report["problems"]] == [(RECORD, "tells otherwise")]
    assert f"'{key}'" in report["problems"][0]["detail"]


def test_a_sum_is_checked_without_the_steps_too(pair: Pair) -> None:
    pair.save(epur(pair.base, pair.tuned, counts=counts(), top=3))
    assert pair.prove() == []
    pair.rewrite(STATEMENTS["changed_dimensions"])
    assert pair.prove() == [(RECORD, None, "tells otherwise")]


def test_a_copied_tensor_cannot_have_changed(pair: Pair) -> None:
    pair.save()
    pair.rewrite(lambda r: r["tensors"]["position_ids"].update(changed=1))
    with pytest.raises(FormatError, match=r"tensors\['position_ids'\] lacks something"):
        verify(pair.out)


def test_by_what_the_dimensions_are_known(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    """By the steps, where BASE and TUNED are all they took; by the mask; or not at all."""
    path = pair.root / "mask.safetensors"
    made = epur(pair.base, pair.tuned, counts=counts(), top=3)
    save(changed_mask(made), path)
    mask = open_checkpoint(path)
    cases_of: list[tuple[Any, dict[str, Any], list[str], str | None]] = [
        (mix(pair.base, pair.tuned), {}, ["recipe"], None),
        (mix(pair.base, pair.tuned, select="drift"), {}, ["recipe"], None),
        (purify(pair.base, pair.tuned, score="random"), {}, ["recipe"], None),
        (made, {}, [], "its steps took token counts too"),
        (made, {"mask": mask}, ["mask"], "its steps took token counts too"),
        (purify(pair.base, pair.tuned, from_mask=mask), {"mask": mask}, ["recipe", "mask"], None),
        (
            purify(pair.base, pair.tuned, from_mask=mask),
            {},
            [],
            "its steps took 'mask.safetensors' too",
        ),
    ]
    for one, given, known, why_not in cases_of:
        pair.save(one, overwrite=True)
        report = verify(pair.out, base=pair.base, tuned=pair.tuned, **given)
        assert report["proved"]
        told = report["selection"]
        assert (told["known_by"], told["not_by_recipe"]) == (known, why_not)
    both = ("--base", pair.root / "base", "--tuned", pair.root / "tuned")
    assert cases.wsurg("verify", pair.out, *both) == 0
    expected = "NOT proved: its steps took 'mask.safetensors' too; give --mask, or replay it"
    assert expected in capsys.readouterr().out


def test_another_version_is_not_done_again(pair: Pair) -> None:
    pair.save()
    pair.rewrite(lambda r: r["tool"].update(version="0.0.1"))
    report = verify(pair.out, base=pair.base, tuned=pair.tuned)
    assert report["proved"]
    assert "weightsurgery 0.0.1 made it" in report["selection"]["not_by_recipe"]


def test_models_the_other_way_round_are_told(pair: Pair) -> None:
    pair.save(mix(pair.base, pair.tuned, ratio=0.1))
    report = verify(pair.out, base=pair.tuned, tuned=pair.base)
    with pytest.raises(GateError) as raised:
        check_verification(report)
    assert raised.value.hint == "BASE and TUNED are given the other way round"
    right = verify(pair.out, base=pair.base, tuned=pair.tuned)
    assert [given["swapped"] for given in right["selection"]["inputs"]] == [False, False]


def test_many_problems_are_not_all_shown(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    pair.save(mix(pair.base, pair.tuned, ratio=0.1))
    for number in range(25):
        (pair.out / f"extra-{number:02}").write_text("x")
    assert cases.wsurg("verify", pair.out) == 10
    told = capsys.readouterr().out
    assert "extra-19 " in told
    assert "extra-20" not in told
    assert "and 5 more; --all shows them" in told
    assert cases.wsurg("verify", pair.out, "--all") == 10
    told = capsys.readouterr().out
    assert "extra-24" in told
    assert "more;" not in told


def test_a_settings_file_for_other_commands_asks_for_no_proof(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """base and tuned at its top are the inputs of other commands; in [verify] they are its own."""
    monkeypatch.chdir(pair.root)
    Path("wsurg.toml").write_text('base = "base"\ntuned = "tuned"\nmask = "mask.safetensors"\n')
    assert cases.wsurg("interpolate", "-o", "out") == 0
    assert cases.wsurg("verify", "out") == 0
    for path in Path().glob("mask.*"):
        path.unlink()
    assert cases.wsurg("mix", "-o", "mixed") == 0
    capsys.readouterr()
    Path("wsurg.toml").write_text('[verify]\nbase = "base"\ntuned = "tuned"\n')
    assert cases.wsurg("verify", "mixed", "--json") == 0
    assert json.loads(capsys.readouterr().out)["selection"]["known_by"] == ["recipe"]


def test_forged_weights_need_no_mask(pair: Pair) -> None:
    """The first dimensions of a tensor are reset, as many as there were at random."""
    pair.save(mix(pair.base, pair.tuned, ratio=0.5))
    base, tuned = cases.read(pair.base)[QUERY].reshape(-1), cases.read(pair.tuned)[QUERY]

    def change(arrays: dict[str, Any]) -> None:
        made, given = arrays[QUERY].reshape(-1), tuned.reshape(-1)
        count = np.count_nonzero(made != given)
        made[:] = given
        chosen = np.flatnonzero(base != given)[:count]
        made[chosen] = base[chosen]

    forge(pair, change)
    assert pair.problems() == []
    assert [p[1:] for p in pair.prove()] == [(QUERY, "not what its steps give")]
