"""`replay`: the same bytes from the same inputs, or a reason why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import cases
from tests.test_verify import RECORD, Pair, counts
from weightsurgery import (
    Checkpoint,
    FormatError,
    GateError,
    MismatchError,
    NonFiniteError,
    PolicyError,
    SettingError,
    StorageError,
    apply_adapter,
    changed_mask,
    drift,
    extract_adapter,
    interpolate,
    mix,
    open_checkpoint,
    purify,
    replay,
    save,
    verify,
)
from weightsurgery.checkpoint import Step
from weightsurgery.formats.files import InputFile
from weightsurgery.proof.replay import check_replay
from weightsurgery.stream import Engine


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def adapter_of(pair: Pair) -> Checkpoint:
    arrays = cases.adapter(cases.read(pair.base))
    cases.write_adapter(pair.root / "adapter", arrays, cases.adapter_config())
    return open_checkpoint(pair.root / "adapter")


def masked(pair: Pair) -> Checkpoint:
    path = pair.root / "given-mask.safetensors"
    save(changed_mask(mix(pair.base, pair.tuned)), path)
    return purify(pair.base, pair.tuned, from_mask=open_checkpoint(path))


def fisher(pair: Pair) -> Checkpoint:
    arrays = {n: np.ones_like(a) for n, a in cases.read(pair.tuned).items() if a.dtype == "f4"}
    return open_checkpoint(cases.write_file(pair.root / "fisher.safetensors", arrays))


MADE: dict[str, Callable[[Pair], Checkpoint]] = {
    "mix": lambda p: mix(p.base, p.tuned, ratio=0.4, seed=3, ratio_for=(("*.bias", 0.9),)),
    "by drift": lambda p: mix(p.base, p.tuned, select="drift", include="*.weight"),
    "interpolate": lambda p: interpolate(p.base, p.tuned, weight=0.25),
    "purify": lambda p: purify(p.base, p.tuned, fisher=fisher(p), embeddings="reset"),
    "mask": masked,
    "nested": lambda p: interpolate(p.base, mix(p.base, p.tuned), weight=0.5),
    "renamed": lambda p: mix(p.base.renamed({"causal_mask": "other"}), p.tuned),
    "merged": lambda p: apply_adapter(p.base, adapter_of(p)),
    "two adapters": lambda p: apply_adapter(p.base, adapter_of(p), p_adapter(p), weight=(0.5, 2)),
    "extracted": lambda p: extract_adapter(p.base, p.tuned, rank=2),
    "copy": lambda p: p.tuned,
}


def p_adapter(pair: Pair) -> Checkpoint:
    arrays = cases.adapter(cases.read(pair.base), seed=9)
    cases.write_adapter(pair.root / "second", arrays, cases.adapter_config())
    return open_checkpoint(pair.root / "second")


@pytest.mark.parametrize("name", MADE)
def test_the_same_bytes_come_out(pair: Pair, name: str) -> None:
    """The whole folder, its record too."""
    pair.save(MADE[name](pair))
    report = replay(pair.out / RECORD, pair.root / "again")
    assert (report["identical"], report["differs"]) == (True, [])
    assert cases.digests(pair.root / "again") == cases.digests(pair.out)
    check_replay(report)


@pytest.mark.parametrize("size", [500, "1KB", None])
def test_whatever_the_shards_were(pair: Pair, size: Any) -> None:
    pair.save(max_shard_size=size)
    replay(pair.out, pair.root / "again", max_memory="4GB")
    assert cases.digests(pair.root / "again") == cases.digests(pair.out)


@pytest.mark.parametrize("made", [drift, lambda b, t: changed_mask(mix(b, t))])
def test_single_files_under_any_name(pair: Pair, made: Callable[..., Checkpoint]) -> None:
    pair.out = pair.root / "one.safetensors"
    pair.save(made(pair.base, pair.tuned))
    report = replay(f"{pair.out}.{RECORD}", pair.root / "two.safetensors")
    assert report["identical"]
    assert (pair.root / "two.safetensors").read_bytes() == pair.out.read_bytes()
    assert verify(pair.root / "two.safetensors")["proved"]


def test_inputs_may_have_moved(pair: Pair) -> None:
    """By name, by role, by number; what they are called now is nowhere in the output."""
    pair.save()
    for name in ("base", "tuned"):
        (pair.root / name).rename(pair.root / f"moved-{name}")
    moved = [pair.root / f"moved-{name}" for name in ("base", "tuned")]
    for number, keys in enumerate([("base", "tuned"), ("0", "1")]):
        out = pair.root / f"again{number}"
        replay(pair.out, out, inputs=dict(zip(keys, moved, strict=True)))
        assert cases.digests(out) == cases.digests(pair.out)


def test_inputs_of_one_name_are_told_by_role(tmp_path: Path) -> None:
    first = Pair(tmp_path)
    for name in ("base", "tuned"):
        (tmp_path / name).rename(tmp_path / f"{name}-folder")
        (tmp_path / f"{name}-parent").mkdir()
        (tmp_path / f"{name}-folder").rename(tmp_path / f"{name}-parent" / "model")
    places = {name: tmp_path / f"{name}-parent" / "model" for name in ("base", "tuned")}
    first.save(mix(*(open_checkpoint(places[name]) for name in ("base", "tuned"))))
    assert replay(first.out, tmp_path / "again", inputs=places)["identical"]
    with pytest.raises(SettingError, match=r"'model' fits several inputs .* 0: model, 1: model"):
        replay(first.out, tmp_path / "more", inputs={"model": places["base"]})


def test_token_counts_of_a_file(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    for name in ("base", "tuned"):
        (tmp_path / name / "vocab.txt").write_text("".join(f"{w}\n" for w in cases.WORDS))
    table = tmp_path / "counts.json"
    table.write_text(json.dumps(dict(counts().counts)))
    assert (
        cases.wsurg(
            *("epur", tmp_path / "base", tmp_path / "tuned", "--counts", table, "--top", 3),
            *("-o", pair.out),
        )
        == 0
    )
    assert replay(pair.out, tmp_path / "again")["identical"]
    moved = table.rename(tmp_path / "moved.json")
    assert replay(pair.out, tmp_path / "more", inputs={"counts.json": moved})["identical"]
    moved.write_text('{"the": 3}')
    with pytest.raises(MismatchError, match="not the token counts"):
        replay(pair.out, tmp_path / "none", inputs={"counts.json": moved})
    assert not (tmp_path / "none").exists()


def test_another_weights_file_is_chosen_again(pair: Pair) -> None:
    arrays = cases.read(pair.tuned)
    cases.write_file(pair.root / "tuned" / "model.safetensors", arrays)
    name = "model.safetensors.index.json"
    chosen = open_checkpoint(pair.root / "tuned", weights=name)
    pair.save(mix(pair.base, chosen))
    assert replay(pair.out, pair.root / "again")["identical"]


# --- what is refused --------------------------------------------------------------------------


def test_another_input_is_named(pair: Pair) -> None:
    pair.save()
    config = pair.root / "tuned" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(
        MismatchError,
        match=r"tuned, taken for input 1 'tuned', has config.json of 41 bytes, recorded 40",
    ):
        replay(pair.out, pair.root / "again")
    config.unlink()
    (pair.root / "base" / "merges.txt").write_text("x")
    with pytest.raises(MismatchError, match=r"has merges.txt, which .*lacks config.json"):
        replay(pair.out, pair.root / "again")
    swapped = {"base": pair.root / "tuned", "tuned": pair.root / "base"}
    with pytest.raises(MismatchError, match=r"not the recorded inputs: .* and 7 more;"):
        replay(pair.out, pair.root / "again", inputs=swapped)
    assert not (pair.root / "again").exists()
    assert cases.wsurg("replay", pair.out, "-o", pair.root / "again") == 4


@pytest.mark.parametrize("name", ["tuned/config.json", "base/model.safetensors"])
def test_another_input_of_the_same_size_is_named(pair: Pair, name: str) -> None:
    """By its hash, which is taken of the work's own reads; nothing has appeared then."""
    pair.save()
    data = (pair.root / name).read_bytes()
    at = data.index(b"vocab_size") + 3 if name.endswith("json") else len(data) - 1
    (pair.root / name).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    before = sorted(pair.root.rglob("*"))
    folder, _, file = name.partition("/")
    with pytest.raises(
        MismatchError, match=rf"not the recorded .*'{folder}', has {file} with SHA-256"
    ):
        replay(pair.out, pair.root / "again")
    assert sorted(pair.root.rglob("*")) == before


def test_what_fails_for_other_inputs_is_told_of_them(pair: Pair) -> None:
    pair.save(interpolate(pair.base, pair.tuned))
    arrays, _ = cases.pair()
    arrays["embeddings.LayerNorm.weight"][0] = np.nan
    cases.write_file(pair.root / "base" / "model.safetensors", arrays)
    with pytest.raises(MismatchError, match=r"'base', has model.safetensors with SHA-256") as told:
        replay(pair.out, pair.root / "again")
    assert isinstance(told.value.__context__, NonFiniteError)


def test_what_fails_for_other_reasons_is_told_as_it_is(pair: Pair) -> None:
    pair.save(interpolate(pair.base, pair.tuned))
    pair.rewrite(lambda r: settings(r).update(weight=3))
    with pytest.raises(SettingError, match="weight is 3"):
        replay(pair.out, pair.root / "again")


def test_the_inputs_are_read_as_in_the_first_run(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[str, int] = {}
    fill = InputFile._fill

    def counted(file: InputFile, buffer: Any, offset: int) -> None:
        read[file.path] = read.get(file.path, 0) + memoryview(buffer).nbytes
        fill(file, buffer, offset)

    monkeypatch.setattr(InputFile, "_fill", counted)
    engine = Engine(workers=1)  # with more, reads that come too early may be done again
    models = (open_checkpoint(pair.root / name) for name in ("base", "tuned"))
    pair.save(mix(*models), engine=engine)
    first = dict(read)
    read.clear()
    replay(pair.out, pair.root / "again", engine=engine)
    del read[str(pair.out / RECORD)]
    assert read == first


def test_inputs_that_are_nowhere(pair: Pair) -> None:
    pair.save()
    with pytest.raises(SettingError, match="'other' is no input of this record; they are 0: base"):
        replay(pair.out, pair.root / "again", inputs={"other": "x"})
    with pytest.raises(SettingError, match="input 0 is given twice"):
        replay(pair.out, pair.root / "again", inputs={"base": "x", "0": "y"})
    shutil.rmtree(pair.root / "base")
    with pytest.raises(SettingError, match=r"'base' is not beside the output; .* --input 0=PATH"):
        replay(pair.out, pair.root / "again")


STEPS = [
    ("finetune", {}, "a training on data which the record tells of"),
    ("fisher", {}, "computed from data which"),
    ("mismatch", {}, "it makes data, no checkpoint"),
    ("extract-adapter", {"device": "cuda"}, "computed on a device"),
    ("merge-all", {}, "no operator here has this name"),
]


@pytest.mark.parametrize(("name", "settings", "reason"), STEPS, ids=[s[0] for s in STEPS])
def test_steps_that_cannot_be_replayed(
    pair: Pair, name: str, settings: dict[str, Any], reason: str
) -> None:
    """Also below other steps."""
    inner = pair.tuned.made_by(Step(name, settings, {"tuned": pair.tuned}))
    pair.save(mix(pair.base, inner))
    with pytest.raises(PolicyError, match=f"the step '{name}' cannot be replayed: .*{reason}"):
        replay(pair.out, pair.root / "again")


def test_other_versions_and_no_hashes(pair: Pair) -> None:
    pair.save()
    pair.rewrite(lambda r: r["tool"].update(version="0.0.1"))
    with pytest.raises(PolicyError, match=r"made by weightsurgery 0\.0\.1; this is"):
        replay(pair.out, pair.root / "again")
    pair.save(overwrite=True, hashes=False)
    with pytest.raises(PolicyError, match="made with --no-hash"):
        replay(pair.out, pair.root / "again")


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = {
    "unsealed": (lambda r: r["warnings"].append("x"), FormatError, "altered since it was written"),
    "unknown setting": (lambda r: settings(r).update(x=1), FormatError, "no setting is called x"),
    "kind": (lambda r: settings(r).update(ratio="much"), SettingError, "ratio is 'much'"),
    "list": (lambda r: settings(r).update(select=[{}]), SettingError, "select is"),
    "no tuned": (lambda r: r["recipe"]["inputs"].pop("tuned"), FormatError, "step 'mix': 'tuned'"),
    "too many": (
        lambda r: r["recipe"]["inputs"].update(fisher={"input": 0}),
        FormatError,
        "an input too many",
    ),
    "rename": (
        lambda r: r.update(recipe={"operator": "rename", "settings": {}, "inputs": {}}),
        FormatError,
        "step 'rename': 'checkpoint'",
    ),
    "extract": (
        lambda r: r["recipe"].update(operator="extract-adapter", settings={"rank": "x"}),
        FormatError,
        "rank is 'x'",
    ),
    "workers": (
        lambda r: r["recipe"].update(operator="extract-adapter", settings={"engine": None}),
        FormatError,
        "engine is None",
    ),
}


def settings(record: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = record["recipe"]["settings"]
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_recipes(pair: Pair, name: str) -> None:
    pair.save()
    change, kind, reason = HOSTILE[name]
    pair.rewrite(change, seal=name != "unsealed")
    with pytest.raises(kind, match=reason):
        replay(pair.out, pair.root / "again")
    assert not (pair.root / "again").exists()


def test_counts_that_are_none(pair: Pair) -> None:
    pair.save()
    recipe = {"operator": "epur", "settings": {"counts": 3}}
    pair.rewrite(lambda r: r["recipe"].update(recipe))
    with pytest.raises(FormatError, match="the record's token counts are 3"):
        replay(pair.out, pair.root / "again")


def test_other_bytes_are_told(pair: Pair) -> None:
    """A record that tells of other outputs than its recipe gives."""
    pair.save(mix(pair.base, pair.tuned, ratio=0.4))
    pair.rewrite(lambda r: settings(r).update(ratio=0.5))
    report = replay(pair.out, pair.root / "again")
    assert not report["identical"]
    names = [one["file"] for one in report["differs"]]
    assert names[0] == "README.md"
    assert "config.json" not in names
    with pytest.raises(GateError, match=r"3 files have other bytes than recorded: README.md"):
        check_replay(report)


def test_a_file_may_be_called_otherwise_now(pair: Pair) -> None:
    """Its bytes are the same; and what else lies in an input's folder is no matter."""
    fisher(pair)
    taken = open_checkpoint(pair.root / "fisher.safetensors")
    pair.save(purify(pair.base, pair.tuned, fisher=taken, embeddings="reset"))
    (pair.root / "fisher.safetensors").rename(pair.root / "curvature.safetensors")
    (pair.root / "tuned" / "later.txt").write_text("x")
    moved = {"fisher": pair.root / "curvature.safetensors"}
    report = replay(pair.out, pair.root / "again", inputs=moved)
    assert (report["identical"], report["told_otherwise"]) == (True, [])


TOLD_OTHERWISE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "warning gone": (lambda r: r["warnings"].append("x"), "warnings"),
    "number": (lambda r: r.update(changed_dimensions=1), "changed_dimensions"),
    "key gone": (lambda r: r.pop("changed_by"), "changed_by"),
    "key more": (lambda r: r.update({"x\n": None}), "x\\n"),
    "tensor": (lambda r: next(iter(r["tensors"].values())).update(status="edited"), "tensors"),
    "size": (lambda r: r["outputs"]["config.json"].update(size=1), "outputs"),
    "file of an input": (lambda r: r["inputs"][0]["files"].reverse(), "inputs"),
}


@pytest.mark.parametrize("name", TOLD_OTHERWISE)
def test_a_record_that_tells_otherwise_is_named(pair: Pair, name: str) -> None:
    """The files are as recorded; what else the record says of them is not."""
    pair.save(mix(pair.base, pair.tuned, ratio=0))
    change, key = TOLD_OTHERWISE[name]
    pair.rewrite(change)
    report = replay(pair.out, pair.root / "again")
    assert (report["identical"], report["differs"], report["told_otherwise"]) == (False, [], [key])
    with pytest.raises(GateError, match="the record tells otherwise of") as raised:
        check_replay(report)
    assert raised.value.code == "E-REPLAY"
    assert "numpy" not in raised.value.hint


@pytest.mark.parametrize("name", ["mix", "extracted"])
def test_a_setting_that_is_left_out_is_not_guessed(pair: Pair, name: str) -> None:
    pair.save(MADE[name](pair))
    gone = "ratio" if name == "mix" else "rank"
    pair.rewrite(lambda r: settings(r).pop(gone))
    with pytest.raises(FormatError, match=r"settings are .*; expected") as raised:
        replay(pair.out, pair.root / "again")
    assert raised.value.code == "E-RECORD"


def test_the_output_is_guarded(pair: Pair) -> None:
    pair.save()
    with pytest.raises(PolicyError, match="exists already"):
        replay(pair.out, pair.out)
    with pytest.raises(PolicyError):
        replay(pair.out, pair.root / "base" / "inside")
    assert replay(pair.out, pair.out, overwrite=True)["identical"]


def test_a_file_of_a_folder_is_not_its_output(pair: Pair) -> None:
    """The folder is, and has the record: that is what to give."""
    pair.save(max_shard_size="1GB")
    for run in (verify, lambda path: replay(path, pair.root / "again")):
        with pytest.raises(StorageError, match=r"no record: .*; the folder has one: give .*out$"):
            run(pair.out / "model.safetensors")
    for run in (verify, lambda path: replay(path, pair.root / "again")):
        with pytest.raises(StorageError, match="no such file or directory") as raised:
            run(pair.root / "outt")
        assert raised.value.code == "E-FILE-MISSING"


def test_an_input_is_given_once(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    pair.save()
    given = ("--input", "0=base", "--input", "0=tuned")
    assert cases.wsurg("replay", pair.out, "-o", pair.root / "again", *given) == 2
    assert "--input 0 is given twice" in capsys.readouterr().err


def test_all_inputs_that_are_nowhere_are_told_at_once(pair: Pair) -> None:
    pair.save()
    (pair.root / "base").rename(pair.root / "base-now")
    (pair.root / "tuned").rename(pair.root / "tuned-now")
    expected = (
        r"the inputs 'base', 'tuned' are not beside the output; "
        r"say where: --input 0=PATH --input 1=PATH"
    )
    with pytest.raises(SettingError, match=expected):
        replay(pair.out, pair.root / "again")


def test_the_command(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    pair.save()
    out, base = pair.root / "again", pair.root / "base"
    assert cases.wsurg("replay", pair.out / RECORD, "--input", f"base={base}", "-o", out) == 0
    assert "The same bytes as recorded" in capsys.readouterr().out
    assert cases.wsurg("replay", pair.out, "--input", "base", "-o", out) == 2
    assert "expected NAME=PATH" in capsys.readouterr().err
    pair.rewrite(lambda r: settings(r).update(seed=9))
    assert cases.wsurg("replay", pair.out, "-o", out, "--overwrite", "--json") == 10
    assert json.loads(capsys.readouterr().out)["identical"] is False
