"""An interrupted save goes on: the same bytes, without making again what is finished."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import cases, hostile
from tests.faults.door import Door, error, standing
from weightsurgery import Engine, SettingError, from_arrays, mix, open_checkpoint, save
from weightsurgery.checkpoint import Checkpoint, Step
from weightsurgery.errors import ChangedError, NonFiniteError, StorageError

SHARDS = 5
JOURNAL = ".journal"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """base/ and tuned/ in five shards, and whole/: what an uninterrupted run makes."""
    base = cases.model("bert")
    cases.write_directory(tmp_path / "base", base, shards=SHARDS, config={"model_type": "bert"})
    tuned = cases.finetuned(base)
    cases.write_directory(tmp_path / "tuned", tuned, shards=SHARDS, config={"model_type": "bert"})
    save(mixed(tmp_path), tmp_path / "whole")
    return tmp_path


def mixed(folder: Path, **settings: Any) -> Checkpoint:
    return mix(open_checkpoint(folder / "base"), open_checkpoint(folder / "tuned"), **settings)


def stopping(number: int, how: Callable[[], Any]) -> Engine:
    """An engine that stops the run at the N-th report of progress, when hashes are noted."""
    reports: list[int] = []

    def progress(what: str, _done: int, _total: int) -> None:
        reports.append(1)
        if what == "writing" and len(reports) == number:
            how()

    return Engine(workers=1, progress=progress)


def interrupt() -> None:
    raise KeyboardInterrupt


def cut_off(folder: Path, number: int = 9, **settings: Any) -> None:
    """A run with `resume` that is interrupted."""
    with pytest.raises(KeyboardInterrupt):
        save(mixed(folder), folder / "out", engine=stopping(number, interrupt), resume=True)


def left(folder: Path) -> list[Path]:
    return [path for place in folder.glob(".wsurg-*") for path in sorted(place.iterdir())]


def noted(folder: Path) -> list[str]:
    """The weights files that the journal tells of."""
    (journal,) = (path for path in left(folder) if path.name == JOURNAL)
    lines = journal.read_bytes().splitlines()[1:]
    return [json.loads(line.partition(b" ")[2])["file"] for line in lines]


def read_again(folder: Path, **settings: Any) -> set[str]:
    """Go on; the files of the output whose tensors were computed."""
    tuned, reads = cases.counted(open_checkpoint(folder / "tuned"))
    made = mix(open_checkpoint(folder / "base"), tuned)
    record = save(made, folder / "out", resume=True, **settings)
    return {record["tensors"][name]["file"] for name, _, _ in reads}


def must_be_the_same(folder: Path) -> None:
    assert hostile.contents(folder / "out") == hostile.contents(folder / "whole")
    assert not left(folder)
    assert not list(folder.glob(".wsurg-*"))


KILLED = """
import os, signal, sys
from weightsurgery import Engine, mix, open_checkpoint, save
calls = []
def progress(*_):
    calls.append(1)
    if len(calls) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
made = mix(open_checkpoint("base"), open_checkpoint("tuned"))
save(made, "out", engine=Engine(workers=1, progress=progress))
"""


def kill(folder: Path, number: int = 9) -> None:
    """A run without `resume` that is killed."""
    command = [sys.executable, "-c", KILLED, str(number)]
    assert subprocess.run(command, cwd=folder, check=False).returncode == -9


@pytest.mark.parametrize("number", [2, 7, 13])
def test_a_killed_run_is_gone_on_with(folder: Path, number: int) -> None:
    kill(folder, number)
    finished = noted(folder)
    assert len(finished) < SHARDS
    again = read_again(folder)
    assert again == {path.name for path in (folder / "out").glob("*.safetensors")} - {*finished}
    must_be_the_same(folder)


def test_without_resume_the_next_run_starts_clean(folder: Path) -> None:
    kill(folder)
    assert noted(folder)
    tuned, reads = cases.counted(open_checkpoint(folder / "tuned"))
    save(mix(open_checkpoint(folder / "base"), tuned), folder / "out")
    assert {name for name, _, _ in reads} == {*tuned}
    must_be_the_same(folder)


@pytest.mark.parametrize("number", range(1, 14))
def test_wherever_it_is_interrupted(folder: Path, number: int) -> None:
    cut_off(folder, number)
    cut = {path.name for path in left(folder)}
    assert cut in (set(), {JOURNAL, *noted(folder)} if cut else set())
    read_again(folder)
    must_be_the_same(folder)


def test_what_is_left_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    cut_off(folder)
    assert "nothing is left of a run before; starting anew" in caplog.text
    count = len(noted(folder))
    assert 0 < count < SHARDS
    read_again(folder)
    assert f"going on: {count} of {SHARDS} weight files are there" in caplog.text


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a bit": flip,
    "the end": lambda path: os.truncate(path, 10),
    "gone": Path.unlink,
    "a link": lambda path: (path.rename(path.with_name("x")), path.symlink_to("x")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_finished_file_that_changed_is_made_again(folder: Path, damage: Any) -> None:
    cut_off(folder)
    first = noted(folder)[0]
    (path,) = (path for path in left(folder) if path.name == first)
    damage(path)
    assert first in read_again(folder)
    must_be_the_same(folder)


TORN: dict[str, Callable[[bytes], bytes]] = {
    "half a line": lambda lines: lines[:-20],
    "no JSON": lambda lines: lines + b"{nothing}\n",
    "another file": lambda lines: lines + b'{"file": "../../tuned/config.json"}\n',
    "no entries": lambda lines: lines.replace(b'"tensors"', b'"sensors"'),
    "other entries": lambda lines: lines.replace(b'"edited"', b'"copied"'),
    "no texts": lambda lines: lines.replace(b'"size":', b'"size":"x","other":'),
    "not ours": lambda lines: b"\xff\n" + lines,
    "empty": lambda lines: b"",
}


@pytest.mark.parametrize("tear", TORN.values(), ids=TORN.keys())
def test_a_torn_journal_is_used_as_far_as_it_goes(folder: Path, tear: Any) -> None:
    cut_off(folder)
    (journal,) = (path for path in left(folder) if path.name == JOURNAL)
    journal.write_bytes(tear(journal.read_bytes()))
    read_again(folder)
    must_be_the_same(folder)


def change_input(folder: Path) -> None:
    path = folder / "base" / "config.json"
    path.write_text(json.dumps({"model_type": "bert", "hidden_size": 1}))


OTHERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "settings": lambda folder: {"made": mixed(folder, ratio=0.25)},
    "seed": lambda folder: {"made": mixed(folder, seed=3)},
    "shards": lambda folder: {"made": mixed(folder), "max_shard_size": 300},
    "an input": lambda folder: change_input(folder) or {"made": mixed(folder)},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_a_journal_of_another_output_is_not_used(
    folder: Path, other: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    cut_off(folder)
    options = other(folder)
    made = options.pop("made")
    save(made, folder / "out", resume=True, **options)
    assert "is of other inputs or settings; starting anew" in caplog.text
    save(made, folder / "again", **options)
    assert hostile.contents(folder / "out") == hostile.contents(folder / "again")
    assert not left(folder)


@pytest.mark.parametrize("resume", [False, True])
def test_a_full_disk_leaves_what_is_finished_if_asked(folder: Path, resume: bool) -> None:
    full = Door(28, error(28, lasting=True), persistent=True)  # the 28th call, ENOSPC
    with standing(full), pytest.raises(StorageError, match="No space left"):
        save(mixed(folder), folder / "out", resume=resume)
    if not resume:
        assert not list(folder.glob(".wsurg-*"))
        return
    assert {path.name for path in left(folder)} == {JOURNAL, *noted(folder)}
    read_again(folder)
    must_be_the_same(folder)


def test_what_cannot_be_met_again_leaves_nothing(folder: Path) -> None:
    def change() -> None:
        (folder / "tuned" / "config.json").write_text("{}")

    with pytest.raises(ChangedError):
        save(mixed(folder), folder / "out", engine=stopping(9, change), resume=True)
    assert not list(folder.glob(".wsurg-*"))

    def refuse() -> None:
        raise NonFiniteError("NaN")

    with pytest.raises(NonFiniteError):
        save(mixed(folder), folder / "out", engine=stopping(9, refuse), resume=True)
    assert not list(folder.glob(".wsurg-*"))


def test_one_weights_file_starts_anew(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    save(mixed(folder), folder / "one", resume=True, max_shard_size="1GB")
    assert "one weights file is not gone on with" in caplog.text


def test_what_is_finished_counts_as_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off(folder)
    there = sum(path.stat().st_size for path in left(folder))
    whole = sum(path.stat().st_size for path in (folder / "whole").glob("*.safetensors"))
    free = type("Free", (), {"f_bavail": (16 << 20) + whole - there + 200, "f_frsize": 1})
    monkeypatch.setattr(os, "statvfs", lambda _path: free)
    read_again(folder)
    must_be_the_same(folder)


def test_must_refuse_what_cannot_be_known_to_fit(folder: Path) -> None:
    with pytest.raises(SettingError, match="resuming needs the hashes"):
        save(mixed(folder), folder / "out", resume=True, hashes=False)
    memory = from_arrays({"w": np.zeros(3, np.float32)}, is_directory=True)
    with pytest.raises(SettingError, match="some of its numbers are in memory alone"):
        save(memory, folder / "out", resume=True)
    trained = mixed(folder).made_by(Step("finetune", {}, {"tuned": mixed(folder)}, False))
    with pytest.raises(SettingError, match="save what was computed to a file first"):
        save(mix(mixed(folder), trained), folder / "out", resume=True)


COMMAND = ["mix", "base", "tuned", "-o", "out", "--resume"]


def test_the_command_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    shutil.rmtree("whole")
    assert cases.wsurg("mix", "base", "tuned", "-o", "whole") == 0
    kill(folder)
    count = len(noted(folder))
    command = [sys.executable, "-m", "weightsurgery", *COMMAND]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"going on: {count} of {SHARDS} weight files are there" in done.stderr
    must_be_the_same(folder)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--dry-run"], "--resume is for writing"),
        (["--no-hash"], "--resume needs --hash"),
    ],
)
def test_the_command_must_refuse(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    reason: str,
) -> None:
    monkeypatch.chdir(folder)
    assert cases.wsurg(*COMMAND, *more) == 2
    assert reason in capsys.readouterr().err


def test_purify_must_refuse_a_fisher_that_is_made_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    command = ["purify", "base", "tuned", "--data", "clean.tsv", "-o", "out", "--resume"]
    assert cases.wsurg(*command) == 2
    assert "--resume cannot go on with numbers that --data makes" in capsys.readouterr().err
