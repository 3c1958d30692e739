"""A record that was written anew, seal and all: what BASE and TUNED still prove against it."""

from __future__ import annotations

import hashlib
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import cases, hostile
from tests.test_verify import QUERY, RECORD, Pair, counts, forge
from weightsurgery import (
    Checkpoint,
    FormatError,
    GateError,
    MismatchError,
    SettingError,
    StorageError,
    changed_mask,
    epur,
    mix,
    open_checkpoint,
    purify,
    save,
    verify,
)
from weightsurgery.formats.layout import INDEX
from weightsurgery.formats.record import sealed
from weightsurgery.formats.strict_json import dump
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
    "card": ("README.md", b"# by another", "not TUNED's", False),
    "card gone": ("README.md", None, "missing", True),
    "another index": ("x.safetensors.index.json", b"{}", "extra", True),
    "more weights": ("x.safetensors", b"\x02\0\0\0\0\0\0\0{}", "extra", True),
    "an index too many": ("model.safetensors.index.json", b"{}", "not TUNED's", False),
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


def test_without_a_card_a_folder_is_none_of_ours(pair: Pair) -> None:
    """Nor is it looked at less closely then."""
    pair.save()
    put(pair, "README.md", None)
    put(pair, "vocab.txt", b"evil\n")
    put(pair, "modeling.py", b"import os")
    assert pair.prove() == [
        ("README.md", None, "missing"),
        ("modeling.py", None, "extra"),
        ("vocab.txt", None, "not TUNED's"),
    ]


def test_the_index_and_the_headers_are_those_of_the_steps(pair: Pair) -> None:
    pair.save(max_shard_size=500)
    assert pair.prove() == []
    index = json.loads((pair.out / INDEX).read_text())
    put(pair, INDEX, dump({**index, "metadata": {"total_size": 1}}))
    assert (INDEX, None, "not TUNED's") in pair.prove()
    pair.save(max_shard_size=500, overwrite=True)
    shard = sorted(pair.out.glob("*.safetensors"))[0]
    data = shard.read_bytes()
    put(pair, shard.name, data.replace(b'"format":"pt"', b'"format":"mx"'))
    assert (pair.out / shard.name).read_bytes() != data
    found = pair.prove()
    assert (shard.name, None, "not TUNED's") in found


def test_a_folder_of_what_was_one_file(tmp_path: Path) -> None:
    """What is made from single files is one; a folder around it was made by somebody."""
    base, tuned = (
        open_checkpoint(cases.write_file(tmp_path / f"{name}.safetensors", arrays))
        for name, arrays in zip(("base", "tuned"), cases.pair("bert"), strict=True)
    )
    out = tmp_path / "out.safetensors"
    save(mix(base, tuned), out)
    folder = tmp_path / "out"
    folder.mkdir()
    out.rename(folder / "model.safetensors")
    record = json.loads(Path(f"{out}.{RECORD}").read_text())
    record["outputs"] = {"model.safetensors": record["outputs"]["out.safetensors"]}
    for entry in record["tensors"].values():
        entry["file"] = "model.safetensors"
    for name in ("config.json", "README.md"):
        (folder / name).write_text("{}")
        digest = hashlib.sha256(b"{}").hexdigest()
        record["outputs"][name] = {"size": 2, "sha256": digest}
    (folder / RECORD).write_bytes(dump(sealed(record)))
    assert verify(folder)["proved"]
    report = verify(folder, base=base, tuned=tuned)
    assert [p["problem"] for p in report["problems"]] == ["not TUNED's"]


def test_one_model_in_both_places_is_no_proof(pair: Pair) -> None:
    """A copy of TUNED, and a record in which BASE is TUNED: nothing is reset, and nothing wrong."""
    pair.save(mix(pair.tuned, pair.tuned, ratio=0.9))
    entry = json.loads((pair.out / RECORD).read_text())["inputs"][0]
    with pytest.raises(SettingError, match="from one model, which was base and tuned"):
        pair.prove()
    save(mix(pair.base, pair.tuned), pair.root / "true")
    files = json.loads((pair.root / "true" / RECORD).read_text())["inputs"][0]["files"]
    pair.rewrite(lambda r: r["inputs"].append({**entry, "files": [*entry["files"], *files]}))
    pair.rewrite(lambda r: r["recipe"]["inputs"].update(base={"input": 1}))
    report = verify(pair.out, base=pair.base, tuned=pair.tuned)
    assert [given["same"] for given in report["selection"]["inputs"]] == [False, True]
    assert not report["proved"]


def test_a_tuned_of_one_file_has_no_side_files(pair: Pair) -> None:
    """Of a folder it proves the weights alone; and what is made from one file is one file."""
    arrays = cases.read(pair.tuned)
    alone = open_checkpoint(cases.write_file(pair.root / "alone.safetensors", arrays))
    pair.save()
    assert pair.problems(base=pair.base, tuned=alone) == [("README.md", None, "not TUNED's")]


STATEMENTS: dict[str, Callable[[Record], Any]] = {
    "changed_dimensions": lambda r: r.update(changed_dimensions=1),
    "changed_by": lambda r: r["changed_by"]["layer"].clear(),
    "alignment": lambda r: r["alignment"]["kept_from_tuned"].clear(),
    "effective_share": lambda r: r.pop("effective_share"),
    "eligible_dimensions": lambda r: r.update(eligible_dimensions=2.5),
    "dropped": lambda r: r["dropped"].append("x"),
    "report": lambda r: r["report"].update(x=1),
    "recipe": settings(include="*"),
    "tool": lambda r: r["tool"].update(name="another"),
    "note": lambda r: r.update(note="audited"),
    "outputs": lambda r: r["outputs"]["config.json"].update(note="audited"),
    "tensors": lambda r: r["tensors"]["position_ids"].update(status="added"),
    "inputs": lambda r: r["inputs"].append({"name": "org/model", "files": []}),
}


@pytest.mark.parametrize("key", STATEMENTS)
def test_what_the_record_tells_of_the_whole_is_checked(pair: Pair, key: str) -> None:
    pair.save()
    pair.rewrite(STATEMENTS[key])
    assert pair.problems() == []
    report = verify(pair.out, base=pair.base, tuned=pair.tuned)
    *card, last = report["problems"]
    assert (last["file"], last["problem"]) == (RECORD, "tells otherwise")
    assert f"'{key}'" in last["detail"]
    assert [p["file"] for p in card] == (["README.md"] if key == "recipe" else [])


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


def with_head(pair: Pair) -> Checkpoint:
    """TUNED with a head that BASE lacks."""
    arrays = {**cases.read(pair.tuned), "classifier.weight": np.ones((2, 6), "f4")}
    cases.write_directory(pair.root / "head", arrays, config=cases.CONFIGS["bert"])
    pair.tuned = open_checkpoint(pair.root / "head")
    return pair.tuned


WRONG: dict[str, tuple[Callable[[Pair], Checkpoint], str]] = {
    "mix": (lambda p: mix(p.base, p.tuned, ratio=0.1), "the other way round"),
    "a head": (lambda p: mix(p.base, with_head(p), exclude="classifier*"), "the other way round"),
    "drift": (lambda p: purify(p.base, p.tuned, score="drift"), "the other way round"),
}


@pytest.mark.parametrize("name", WRONG)
def test_models_the_other_way_round_are_told(pair: Pair, name: str) -> None:
    """Whether the steps can be done with them or not: nothing is wrong with the output."""
    made, reason = WRONG[name]
    pair.save(made(pair))
    with pytest.raises(MismatchError, match=reason) as raised:
        verify(pair.out, base=pair.tuned, tuned=pair.base)
    assert raised.value.code == "E-VERIFY-INPUTS"
    right = verify(pair.out, base=pair.base, tuned=pair.tuned)
    assert [given["swapped"] for given in right["selection"]["inputs"]] == [False, False]


def test_another_model_that_does_not_do_is_told(pair: Pair) -> None:
    """NaN in it, another shape: the record is not to blame."""
    pair.save(purify(pair.base, pair.tuned, score="drift"))
    arrays = cases.read(pair.tuned)
    arrays[QUERY].reshape(-1)[0] = np.nan
    config = cases.CONFIGS["bert"]
    cases.write_directory(pair.root / "other", arrays, config=config)
    other = open_checkpoint(pair.root / "other")
    with pytest.raises(MismatchError, match=r"not the recorded TUNED, 'tuned': .*NaN") as raised:
        verify(pair.out, base=pair.base, tuned=other)
    assert raised.value.code == "E-VERIFY-INPUTS"


def test_another_model_that_does_is_named(pair: Pair) -> None:
    pair.save(mix(pair.base, pair.tuned, ratio=0.1))
    report = verify(pair.out, base=pair.base, tuned=pair.base)
    with pytest.raises(GateError) as raised:
        check_verification(report)
    assert raised.value.hint == "TUNED may be the wrong one: not the recorded file"


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


LARGE: dict[str, tuple[Callable[[Record], Any], str]] = {
    "globs": (settings(exclude=["x*"] * 300_000), "are more than 10,000"),
    "rules": (settings(ratio_for=[["x*", 0.5]] * 100_000), "are more than 10,000"),
    "a text": (settings(exclude=["x" * 3_000_000]), "one of them is too large"),
    "steps": (lambda r: r.update(recipe=nested(r["recipe"], 1001)), "more than 1,000 steps"),
}


def nested(recipe: Record, depth: int) -> Record:
    """A recipe so often around its BASE, which the limit of nesting does not see."""
    inputs = {f"x{number}": recipe for number in range(depth)}
    return {"operator": "mix", "settings": {}, "inputs": inputs}


@pytest.mark.parametrize("name", LARGE)
def test_what_would_take_long_is_refused(pair: Pair, name: str) -> None:
    pair.save()
    change, reason = LARGE[name]
    pair.rewrite(change)
    with hostile.deadline(5), pytest.raises(FormatError, match=reason):
        pair.prove()


def test_a_chain_of_steps_is_not_done_again_for_ever(pair: Pair) -> None:
    made = pair.tuned
    for seed in range(17):
        made = mix(pair.base, made, ratio=0.01, seed=seed)
    pair.save(made)
    report = verify(pair.out, base=pair.base, tuned=pair.tuned)
    assert (report["proved"], report["selection"]["known_by"]) == (True, [])
    assert report["selection"]["not_by_recipe"] == "it has more than 16 steps"


def test_more_files_than_may_be_open(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.save()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (203, 203))
    with pytest.raises(StorageError, match="it has 6 files; this process may hold 203 open"):
        verify(pair.out)


def test_a_folder_that_is_called_as_a_record(pair: Pair) -> None:
    pair.save()
    other = pair.root / f"out.{RECORD}"
    other.mkdir()
    with pytest.raises(StorageError, match="no record"):
        verify(other)


def test_without_hashes_there_is_one_problem(
    pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    pair.save(hashes=False)
    report = verify(pair.out, base=pair.base, tuned=pair.tuned)
    assert [(p["file"], p["problem"]) for p in report["problems"]] == [(RECORD, "not hashed")]
    assert [given["same"] for given in report["selection"]["inputs"]] == [None, None]
    both = ("--base", pair.root / "base", "--tuned", pair.root / "tuned")
    assert cases.wsurg("verify", pair.out, *both) == 10
    assert "base: recorded without a hash" in capsys.readouterr().out


def test_what_is_not_proved_is_said_though_nothing_is_wrong(
    pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    pair.save(epur(pair.base, pair.tuned, counts=counts(), top=3))
    both = ("--base", pair.root / "base", "--tuned", pair.root / "tuned")
    assert cases.wsurg("verify", pair.out, *both) == 0
    expected = "which dimensions were to be reset is not proved: its steps took token counts too"
    assert expected in capsys.readouterr().err
