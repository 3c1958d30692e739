"""`verify`: what was altered, is missing or extra is named; and where each bit is from."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import cases
from weightsurgery import (
    Checkpoint,
    FormatError,
    GateError,
    MismatchError,
    PolicyError,
    SettingError,
    StorageError,
    changed_mask,
    drift,
    epur,
    interpolate,
    mix,
    open_checkpoint,
    purify,
    save,
    verify,
)
from weightsurgery.formats.files import InputFile
from weightsurgery.formats.strict_json import dump
from weightsurgery.proof.verification import check_verification
from weightsurgery.stream import Engine
from weightsurgery.token_counts import TokenCounts

RECORD = "wsurg-record.json"
CONFIG = cases.CONFIGS["bert"]


class Pair:
    """Two models in two folders, and what is made of them."""

    def __init__(self, root: Path, family: str = "bert", shards: int = 2) -> None:
        base, tuned = cases.pair(family)
        self.root, self.out = root, root / "out"
        config = cases.CONFIGS[family]
        cases.write_directory(root / "base", base, config=config)
        cases.write_directory(root / "tuned", tuned, config=config, shards=shards)
        self.base, self.tuned = (open_checkpoint(root / n) for n in ("base", "tuned"))

    def save(self, made: Checkpoint | None = None, **settings: Any) -> dict[str, Any]:
        return save(mix(self.base, self.tuned) if made is None else made, self.out, **settings)

    def problems(self, **given: Any) -> list[tuple[str, str | None, str]]:
        report = verify(self.out, **given)
        assert report["proved"] == (not report["problems"])
        return [(p["file"], p["tensor"], p["problem"]) for p in report["problems"]]

    def prove(self, **given: Any) -> list[tuple[str, str | None, str]]:
        return self.problems(base=self.base, tuned=self.tuned, **given)

    def rewrite(self, change: Callable[[dict[str, Any]], Any], *, seal: bool = True) -> None:
        """Change the record as somebody would who knows how it is sealed."""
        path = self.out / RECORD
        record = json.loads(path.read_text())
        change(record)
        if seal:
            bare = {n: v for n, v in record.items() if n != "record_sha256"}
            record["record_sha256"] = hashlib.sha256(dump(bare)).hexdigest()
        path.write_bytes(dump(record))


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def counts() -> TokenCounts:
    return TokenCounts(dict.fromkeys(cases.WORDS, 5.0), "memory")


MADE: dict[str, Callable[[Pair], Checkpoint]] = {
    "mix": lambda p: mix(p.base, p.tuned, ratio=0.4, seed=3),
    "mix by drift": lambda p: mix(p.base, p.tuned, select="drift"),
    "purify": lambda p: purify(p.base, p.tuned, score="drift"),
    "twice": lambda p: mix(p.base, purify(p.base, p.tuned, score="drift"), ratio=0.2),
    "all of it": lambda p: mix(p.base, p.tuned, ratio=1),
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("workers", [1, 3])
def test_an_output_is_proved(pair: Pair, name: str, workers: int) -> None:
    made = MADE[name](pair)
    record = pair.save(made)
    save(changed_mask(made), pair.root / "mask.safetensors")
    reports: list[tuple[str, int, int]] = []
    engine = Engine(workers=workers, progress=lambda *told: reports.append(told))
    mask = open_checkpoint(pair.root / "mask.safetensors")
    report = verify(pair.out, base=pair.base, tuned=pair.tuned, mask=mask, engine=engine)
    assert (report["proved"], report["problems"]) == (True, [])
    assert report["selection"]["changed_dimensions"] == record["changed_dimensions"]
    assert [given["same"] for given in report["selection"]["inputs"]] == [True, True]
    assert (report["files"], report["tensors"]) == (len(record["outputs"]), len(record["tensors"]))
    assert reports[-1] == ("verifying", reports[-1][2], reports[-1][2])
    check_verification(report)


def test_small_blocks_change_nothing(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    made = MADE["mix"](pair)
    pair.save(made)
    save(changed_mask(made), pair.root / "mask.safetensors")
    cases.shrink_blocks(monkeypatch, 5)
    assert pair.prove(mask=open_checkpoint(pair.root / "mask.safetensors")) == []


def test_every_flipped_byte_is_found(pair: Pair) -> None:
    pair.save()
    files = sorted(pair.out.iterdir())
    assert len(files) == 6
    for path in files:
        data = path.read_bytes()
        for at in sorted({0, 9, len(data) // 5, len(data) // 2, len(data) - 30, len(data) - 1}):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            try:
                named = {file for file, _, _ in pair.problems()}
            except FormatError as error:
                named = {Path(str(error.file)).name}
            assert named == {path.name}, at
        path.write_bytes(data)
    assert pair.problems() == []


def test_any_byte_of_the_record_counts(pair: Pair) -> None:
    """Also where it stays a record: in a warning, or between two tokens."""
    pair.save()
    path = pair.out / RECORD
    text = path.read_text()
    for other in (text.replace('"seed": 0', '"seed": 1'), text.replace("{\n", "{ \n", 1)):
        assert other != text
        path.write_text(other)
        assert pair.problems() == [(RECORD, None, "altered")]


def test_what_was_altered_is_named(pair: Pair) -> None:
    name = "embeddings.LayerNorm.weight"
    shard = pair.save()["tensors"][name]["file"]
    arrays = cases.read(open_checkpoint(pair.out))
    other = {n: (a + 1 if n == name else a) for n, a in arrays.items()}
    where = json.loads((pair.out / "model.safetensors.index.json").read_text())["weight_map"]
    mine = {n: other[n] for n in other if where[n] == shard}
    cases.write_file(pair.out / shard, mine)
    assert (shard, name, "altered") in pair.problems()
    assert all(file == shard and tensor in (name, None) for file, tensor, _ in pair.problems())


def test_files_that_came_and_went(pair: Pair) -> None:
    pair.save()
    (pair.out / "config.json").unlink()
    (pair.out / "pickle.bin").write_bytes(b"x")
    (pair.out / "sub").mkdir()
    assert pair.problems() == [
        ("config.json", None, "missing"),
        ("pickle.bin", None, "extra"),
        ("sub", None, "extra"),
    ]
    with pytest.raises(
        GateError, match=r"3 things are not .*'?config.json \(missing\), pickle.bin"
    ):
        check_verification(verify(pair.out))


def test_a_link_or_a_pipe_is_no_file_of_an_output(pair: Pair) -> None:
    pair.save()
    (pair.out / "config.json").rename(pair.root / "config.json")
    (pair.out / "config.json").symlink_to(pair.root / "config.json")
    assert pair.problems() == [("config.json", None, "malformed")]


def test_an_output_may_be_given_by_its_record(pair: Pair) -> None:
    pair.save()
    assert verify(pair.out / RECORD)["proved"]
    (pair.out / RECORD).rename(pair.root / "elsewhere.json")
    (pair.out / RECORD).symlink_to(pair.root / "elsewhere.json")
    with pytest.raises(PolicyError, match="symbolic link"):
        verify(pair.out)


def test_tensors_that_the_record_does_not_tell(pair: Pair) -> None:
    pair.save()
    gone = "embeddings.LayerNorm.weight"
    pair.rewrite(lambda r: r["tensors"].update(made_up=r["tensors"].pop(gone)))
    assert [p[1:] for p in pair.problems()] == [(gone, "extra"), ("made_up", "missing")]
    pair.rewrite(lambda r: r["tensors"].update({gone: r["tensors"].pop("made_up")}))
    pair.rewrite(lambda r: r["tensors"][gone].update(shape=[2, 3]))
    assert [p[1:] for p in pair.problems()] == [(gone, "altered")]


def test_without_hashes_nothing_is_proved(pair: Pair) -> None:
    pair.save(hashes=False)
    assert {problem for _, _, problem in pair.problems()} == {"not hashed"}


def test_a_file_and_its_record(pair: Pair) -> None:
    for name, made in (("d", drift(pair.base, pair.tuned)), ("m", changed_mask(mix_of(pair)))):
        pair.out = pair.root / f"{name}.safetensors"
        pair.save(made)
        assert pair.problems() == []
        assert verify(f"{pair.out}.{RECORD}")["proved"]
        data = pair.out.read_bytes()
        pair.out.write_bytes(data[:-1] + bytes([data[-1] ^ 128]))
        assert (pair.out.name, None, "altered") in pair.problems()


def mix_of(pair: Pair) -> Checkpoint:
    return mix(pair.base, pair.tuned, ratio=0.5)


def test_an_adapter(tmp_path: Path) -> None:
    arrays = cases.adapter(cases.model("bert"))
    cases.write_adapter(tmp_path / "in", arrays, cases.adapter_config())
    save(open_checkpoint(tmp_path / "in"), tmp_path / "out")
    assert verify(tmp_path / "out")["proved"]
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    report = verify(tmp_path / "out")
    assert [p["file"] for p in report["problems"]] == ["adapter_config.json"]


def test_mismatched_data(tmp_path: Path) -> None:
    rows = [
        {"question": f"{w} is {i}?", "answer": f"{w} {i}"} for i in range(5) for w in ("why", "how")
    ]
    data = tmp_path / "qa.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    assert cases.wsurg("mismatch", data, "-o", out, "--size", 4) == 0
    assert cases.wsurg("verify", out) == 0
    out.write_text(out.read_text().replace("why", "who", 1))
    assert verify(out)["problems"][0]["problem"] == "altered"
    assert cases.wsurg("verify", out) == 10


# --- where the bits are from ------------------------------------------------------------------


def forge(pair: Pair, change: Callable[[dict[str, Any]], Any]) -> None:
    """Write other weights with a record that fits them: as a forger would."""
    arrays = {n: a.copy() for n, a in cases.read(open_checkpoint(pair.out)).items()}
    change(arrays)
    record = json.loads((pair.out / RECORD).read_text())
    for file in {entry["file"] for entry in record["tensors"].values()}:
        mine = {n: arrays[n] for n, e in record["tensors"].items() if e["file"] == file}
        data = bytearray((pair.out / file).read_bytes())  # the header stays: names and places
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        for name, array in mine.items():
            first, last = header[name]["data_offsets"]
            data[end + first : end + last] = array.tobytes()
        (pair.out / file).write_bytes(data)
        record["outputs"][file] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, array in mine.items():
            record["tensors"][name]["sha256"] = hashlib.sha256(array.tobytes()).hexdigest()
    pair.rewrite(lambda r: r.update({n: record[n] for n in ("outputs", "tensors")}))


QUERY = "encoder.layer.0.attention.self.query.weight"


def test_a_forged_record_does_not_help(pair: Pair) -> None:
    pair.save()
    forge(pair, lambda arrays: arrays[QUERY].reshape(-1).__setitem__(slice(0, 3), 9))
    assert pair.problems() == []
    assert [p[1:] for p in pair.prove()] == [(QUERY, "neither BASE's nor TUNED's")]


def test_a_reset_that_is_not_told_is_found(pair: Pair) -> None:
    pair.save(mix(pair.base, pair.tuned, ratio=0.1))
    base = cases.read(pair.base)
    forge(pair, lambda arrays: arrays.update({QUERY: base[QUERY]}))
    assert [p[1:] for p in pair.prove()] == [(QUERY, "other dimensions")]


def test_integers_must_be_tuneds(pair: Pair) -> None:
    pair.save()
    base = cases.read(pair.base)
    forge(pair, lambda arrays: arrays.update(position_ids=base["position_ids"]))
    assert [p[1:] for p in pair.prove()] == [("position_ids", "neither BASE's nor TUNED's")]


def test_a_mask_must_be_the_one(pair: Pair) -> None:
    pair.save(mix(pair.base, pair.tuned, ratio=0.3))
    other = changed_mask(mix(pair.base, pair.tuned, ratio=0.4))
    found = pair.prove(mask=other)
    assert found
    assert {problem for _, _, problem in found} == {"not as the mask says"}
    with pytest.raises(MismatchError, match="not a mask that wsurg wrote"):
        pair.prove(mask=pair.base)


@pytest.mark.parametrize("invert", [False, True])
def test_the_mask_that_purify_was_given(pair: Pair, invert: bool) -> None:
    path, unlike = pair.root / "mask.safetensors", pair.root / "unlike.safetensors"
    save(changed_mask(purify(pair.base, pair.tuned, score="drift")), path)
    save(changed_mask(mix(pair.base, pair.tuned)), unlike)
    mask = open_checkpoint(path)
    pair.save(purify(pair.base, pair.tuned, from_mask=mask, invert=invert))
    assert pair.prove(mask=mask) == []
    assert pair.prove(mask=open_checkpoint(unlike)) != []


def test_another_tuned_proves_nothing(pair: Pair) -> None:
    pair.save(mix(pair.base, pair.tuned, ratio=0.1))
    assert pair.problems(base=pair.base, tuned=pair.base) != []


def test_other_files_with_the_same_weights(pair: Pair) -> None:
    """The bits are proved; that the files are others is told."""
    pair.save()
    cases.write_directory(pair.root / "cut", cases.read(pair.base), config=CONFIG, shards=3)
    cut = open_checkpoint(pair.root / "cut")
    report = verify(pair.out, base=cut, tuned=pair.tuned)
    assert report["proved"]
    assert [given["same"] for given in report["selection"]["inputs"]] == [False, True]


def test_renamed_and_rounded_base(pair: Pair) -> None:
    arrays = {f"old.{n}": a for n, a in cases.read(pair.base).items()}
    single = {n: a.astype("f2") if a.dtype == "f4" else a for n, a in arrays.items()}
    cases.write_directory(pair.root / "half", single, config=CONFIG)
    half = open_checkpoint(pair.root / "half")
    back = {name: name.removeprefix("old.") for name in half}
    pair.save(mix(half.renamed(back), pair.tuned))
    assert pair.problems(base=half, tuned=pair.tuned) == []


def test_embeddings_of_epur(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    for name in ("base", "tuned"):
        (tmp_path / name / "vocab.txt").write_text("".join(f"{w}\n" for w in cases.WORDS))
    pair.base, pair.tuned = (open_checkpoint(tmp_path / n) for n in ("base", "tuned"))
    pair.save(epur(pair.base, pair.tuned, counts=counts(), top=3))
    assert pair.prove() == []


# --- refusals ---------------------------------------------------------------------------------


def test_what_was_computed_is_not_selected(pair: Pair) -> None:
    pair.save(interpolate(pair.base, pair.tuned))
    with pytest.raises(SettingError, match="this output was made by 'interpolate'"):
        pair.prove()
    assert pair.problems() == []


def test_recipes_without_one_base(pair: Pair) -> None:
    other = interpolate(pair.base, pair.tuned)
    for number, (made, reason) in enumerate(
        [
            (mix(other, pair.tuned), "its base was itself made, by 'interpolate'"),
            (mix(pair.tuned, mix(pair.base, pair.tuned)), "more than one base"),
            (pair.tuned, "this output is a copy"),
        ]
    ):
        pair.out = pair.root / f"out{number}"
        pair.save(made)
        with pytest.raises(SettingError, match=reason):
            pair.prove()


def test_base_and_tuned_go_together(pair: Pair) -> None:
    pair.save()
    with pytest.raises(SettingError, match="go together"):
        verify(pair.out, base=pair.base)
    with pytest.raises(SettingError, match="go together"):
        verify(pair.out, mask=pair.base)
    assert cases.wsurg("verify", pair.out, "--base", pair.root / "base") == 2
    assert cases.wsurg("verify", pair.out, "--mask", pair.root / "mask") == 2


def test_no_output_or_no_record(pair: Pair) -> None:
    with pytest.raises(StorageError, match="no such file or directory"):
        verify(pair.out)
    with pytest.raises(StorageError, match=r"no record: .* every output of wsurg has one"):
        verify(pair.root / "base")


BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "schema": (lambda r: r.update(schema="other/1"), "schema is other/1; expected wsurg.record/1"),
    "tool": (lambda r: r.update(tool="x"), "tool.version is missing"),
    "seal": (lambda r: r.update(record_sha256="x"), "record_sha256 is no SHA-256"),
    "outputs": (lambda r: r.update(outputs=[]), "no outputs"),
    "path": (lambda r: r["outputs"].update({"../x": None}), "outputs names '../x'"),
    "itself": (lambda r: r["outputs"].update({RECORD: None}), f"outputs names '{RECORD}'"),
    "size": (lambda r: r["outputs"]["config.json"].update(size=True), "is no size and SHA-256"),
    "hash": (lambda r: r["outputs"]["config.json"].update(sha256="g" * 64), "no size and SHA-256"),
    "inputs": (lambda r: r.update(inputs={}), "no inputs"),
    "input": (lambda r: r["inputs"][0].pop("name"), r"inputs\[0\] is no name and files"),
    "file": (lambda r: r["inputs"][1]["files"].append({}), r"a file of inputs\[1\] is no name"),
    "tensors": (lambda r: r.update(tensors=1), "no tensors"),
    "tensor": (lambda r: r["tensors"].update(x=[]), r"tensors\['x'\] is no object"),
    "shape": (lambda r: r["tensors"][QUERY].update(shape=[-1]), "lacks something"),
    "changed": (lambda r: r["tensors"][QUERY].update(changed=99), "lacks something"),
    "dtype": (lambda r: r["tensors"][QUERY].update(dtype=[]), "lacks something"),
    "recipe": (lambda r: r.update(recipe=3), "a recipe is no object"),
    "leaf": (lambda r: r.update(recipe={"input": 2}), "the recipe names input 2 of 2"),
    "keys": (lambda r: r["recipe"].pop("settings"), "expected operator, settings and inputs"),
    "operator": (lambda r: r["recipe"].update(operator=1), "an operator of the recipe is no name"),
    "huge": (lambda r: r["recipe"]["settings"].update(seed=10**399), "one of them is too large"),
    "no inputs": (lambda r: r["recipe"].update(inputs=[]), "a recipe is no object"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_record_is_one_error(pair: Pair, name: str) -> None:
    pair.save()
    change, reason = BAD[name]
    pair.rewrite(change, seal=name != "seal")
    with pytest.raises(FormatError, match=reason):
        verify(pair.out)


def test_the_command(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    pair.save()
    both = ("--base", pair.root / "base", "--tuned", pair.root / "tuned")
    assert cases.wsurg("verify", pair.out, *both) == 0
    told = capsys.readouterr().out
    assert "The output is what its record, BASE and TUNED give" in told
    assert "the recorded files" in told
    assert cases.wsurg("verify", pair.out) == 0
    assert "The output is as recorded" in capsys.readouterr().out
    (pair.out / "config.json").write_text("{}")
    assert cases.wsurg("verify", pair.out, "--json") == 10
    printed = capsys.readouterr()
    assert json.loads(printed.out)["problems"][0]["file"] == "config.json"
    expected = r"error\[E-VERIFY\]: .*: 1 thing is not as the record says: .*\n"
    assert re.fullmatch(expected, printed.err)


def test_a_signed_record_covers_every_file(pair: Pair) -> None:
    """`outputs` is what `sha256sum --check` takes; the seal leaves out its own line."""
    pair.save()
    record = json.loads((pair.out / RECORD).read_text())
    names = [path.name for path in sorted(pair.out.iterdir()) if path.name != RECORD]
    assert list(record["outputs"]) == names
    lines = "".join(f"{e['sha256']}  {name}\n" for name, e in record["outputs"].items())
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict"], input=lines, cwd=pair.out, text=True, check=False
    )
    assert checked.returncode == 0
    told = (pair.out / RECORD).read_text().splitlines(True)
    rest = "".join(line for line in told if '"record_sha256"' not in line).encode()
    assert hashlib.sha256(rest).hexdigest() == record["record_sha256"]


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_both_models_are_read_once(tmp_path: Path, ratio: float) -> None:
    wide = {f"w{i}": np.full((256, 1024), i, np.float32) for i in range(4)}
    given = []
    for name in ("base", "tuned"):
        cases.write_directory(tmp_path / name, wide, config=CONFIG)
        wide = {n: a + 1 for n, a in wide.items()}
        given.append(open_checkpoint(tmp_path / name))
    save(mix(*given, ratio=ratio), tmp_path / "out")
    (base, of_base), (tuned, of_tuned) = map(cases.counted, given)
    assert verify(tmp_path / "out", base=base, tuned=tuned)["proved"]
    assert sorted(name for name, _, _ in of_base) == sorted(wide)
    assert sorted(name for name, _, _ in of_tuned) == sorted(wide)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_byte_is_read_once(pair: Pair, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files' hashes too are taken of these reads; headers alone are read for themselves."""
    cases.shrink_blocks(monkeypatch, 8)
    pair.save()
    read: list[tuple[str, int]] = []
    fill = InputFile._fill

    def counted(file: InputFile, buffer: Any, offset: int) -> None:
        read.append((file.path, memoryview(buffer).nbytes))
        fill(file, buffer, offset)

    with monkeypatch.context() as patched:
        patched.setattr(InputFile, "_fill", counted)
        assert verify(pair.out, engine=Engine(workers=workers))["proved"]
    shards = sorted(pair.out.glob("*.safetensors"))
    assert len(shards) == 2
    for shard in shards:
        kind, length = 32, 8  # bytes looked at to tell what the file is, and how long its header
        header = int.from_bytes(shard.read_bytes()[:length], "little")
        count = sum(count for path, count in read if path == str(shard))
        # The strict reader comes twice: for each file, and for the directory as a whole.
        assert count == shard.stat().st_size + 2 * (kind + length + header)
