"""The N-th output call of every command fails, for N = 1, 2, … until a run passes."""

from __future__ import annotations

import ast
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from tests import cases, hostile
from tests.faults.commands import READS, WRITERS, all_commands, prepare, remember
from tests.faults.door import FAULTS, SURVIVED, Door, standing
from weightsurgery.cli import Commands
from weightsurgery.errors import PolicyError, StorageError

PACKAGE = Path(__file__).parent.parent / "weightsurgery"
QUICK = {"mix": list(FAULTS), "mismatch": list(FAULTS)}  # the others fail once for want of room
LONG = (pytest.mark.slow, pytest.mark.long)
Contents = dict[str, "bytes | str | None"]


def test_every_command_is_known_to_write_or_not() -> None:
    assert {*WRITERS} | READS == {*all_commands()}
    assert not {*WRITERS} & READS


@pytest.mark.parametrize("name", sorted(READS))
def test_what_reads_has_nothing_to_write_to(name: str) -> None:
    group = Commands()
    command = group.get_command(click.Context(group), name)
    assert command is not None
    options = {p.name for p in command.params if isinstance(p, click.Option)}
    assert not {"out", "plot", "overwrite"} & options


def selection() -> list[object]:
    """(command, fault): a few at once, all of them with `-m long`."""
    return [
        pytest.param(name, fault, marks=[] if fault in quick else LONG)
        for name in WRITERS
        for quick in [QUICK.get(name, ["no room"])]
        for fault in FAULTS
    ]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def reset(root: Path) -> None:
    """An empty place."""
    shutil.rmtree(root / "place")
    (root / "place").mkdir()


def check_told(capsys: pytest.CaptureFixture[str], why: object) -> None:
    """One line says what went wrong."""
    said = capsys.readouterr().err
    assert "Traceback" not in said, said
    assert said.count("error[E-") == 1, (why, said)
    assert said.splitlines()[-1].startswith("error[E-"), (why, said)


def must_be_whole(now: Contents, before: Contents, expected: Contents, why: object) -> None:
    """Every file is as it was or as it should become, and inputs are as they were."""
    for path, content in now.items():
        if path in before and content == before[path]:
            continue
        assert path in expected, (why, path)
        assert content == expected[path], (why, path)
    outside = {path: c for path, c in before.items() if not path.startswith("place")}
    assert outside.items() <= now.items(), why
    for folder in {Path(path).parent for path in expected} - {Path("place")}:
        held = {path for path in now if Path(path).parent == folder}
        whole = {path for path in expected if Path(path).parent == folder}
        if str(folder).startswith("place"):
            assert held in (set(), whole), (why, folder)


@pytest.mark.parametrize(("name", "kind"), selection())
def test_every_call_may_fail(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    kind: str,
) -> None:
    prepare(here, name)
    remember(monkeypatch, name)
    fault, persistent = FAULTS[kind]
    command = WRITERS[name]
    before = hostile.contents(here)
    assert cases.wsurg(*command.words) == 0
    expected = hostile.contents(here)
    reset(here)
    number = failed = 0
    while True:
        number += 1
        capsys.readouterr()
        with standing(Door(number, fault, persistent=persistent)) as door:
            code = cases.wsurg(*command.words)
        why = (name, kind, number, door.calls[number - 1 : number])
        if not door.reached:
            assert code == 0
            break
        now = hostile.contents(here)
        left = {path for path in now if "/.wsurg-" in path}
        # Where nothing can be removed any more a temporary stays; the next run removes it.
        assert not left or kind in {"input/output errors from then on", "interrupted from then on"}
        rest = {path: content for path, content in now.items() if path not in left}
        if code == 0:
            assert rest == expected, why
        else:
            failed += 1
            assert code == StorageError.exit_code, why
            check_told(capsys, why)
            if command.piecewise:
                assert all(rest[p] in (before.get(p), expected.get(p)) for p in rest), why
            else:
                must_be_whole(rest, before, expected, why)
        if left and code:
            code = cases.wsurg(*command.words)
            if code == PolicyError.exit_code:  # whole, and not to be taken back; or one of two is
                assert any(path not in before for path in rest), why
                code = cases.wsurg(*command.words, "--overwrite")
            assert code == 0, why
            assert hostile.contents(here) == expected, why
        reset(here)
    assert hostile.contents(here) != before or name == "sweep"
    assert number > 5
    assert (failed == 0) == (kind in SURVIVED)


# --- interrupts -------------------------------------------------------------------------------


@pytest.mark.parametrize("number_of_signal", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", ["mix", "mismatch"])
def test_a_signal_at_every_call_leaves_nothing_or_all(
    here: Path, capsys: pytest.CaptureFixture[str], name: str, number_of_signal: signal.Signals
) -> None:
    prepare(here, name)
    before = hostile.contents(here)
    words = WRITERS[name].words
    assert cases.wsurg(*words) == 0
    expected = hostile.contents(here)
    reset(here)
    number, codes = 0, set()
    interrupted = {signal.SIGINT: 130, signal.SIGTERM: 143}[number_of_signal]

    def fault(call: object, arguments: object) -> object:
        os.kill(os.getpid(), number_of_signal)
        return call(*arguments)  # type: ignore[operator, misc]

    while True:
        number += 1
        with standing(Door(number, fault)) as door:
            code = cases.wsurg(*words)
        if not door.reached:
            break
        codes.add(code)
        assert code in (0, interrupted), number
        # At the last moment, when all is in place, it may come too late.
        assert hostile.contents(here) in (before, expected), (number, door.calls[number - 1])
        assert "Traceback" not in capsys.readouterr().err
        reset(here)
    assert interrupted in codes
    assert number > 10


# --- the door ---------------------------------------------------------------------------------

WRITING = {
    *("open", "write", "replace", "remove", "mkdir", "makedirs", "unlink", "rmdir", "link"),
    *("rename", "renames", "symlink", "truncate", "ftruncate", "pwrite", "writev", "fsync"),
    *("copyfile", "copy", "copytree", "move", "rmtree", "removedirs", "chmod", "fdopen"),
}
OWNERS = {"os", "shutil"}
METHODS = {
    *("write_text", "write_bytes", "mkdir", "unlink", "rmdir", "touch", "tofile", "savefig"),
    *("save_pretrained", "save_file", "savez"),
}
ALONE = {
    "formats/disk.py": "the door itself",
    "demo/classifier.py": "transformers writes there, into a folder that is then renamed",
}


def writes(path: Path) -> list[str]:
    """Calls in a module that put something on the disk."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Attribute):
            owner, method = ast.unparse(node.value).rpartition(".")[2], node.attr
            if method in METHODS or (owner in OWNERS and method in WRITING):
                found.append(f"{owner}.{method}")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("open"):
            modes = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant)]
            if set("".join(map(str, modes))) & set("wax+"):
                found.append(f"open {modes}")
    return found


def test_nothing_else_writes_files() -> None:
    modules = {str(path.relative_to(PACKAGE)): writes(path) for path in PACKAGE.rglob("*.py")}
    found = {name: calls for name, calls in modules.items() if calls and name not in ALONE}
    assert found == {
        "architecture/generate.py": ["FACTS.write_text"],  # run by hand, by developers
        "cli/__init__.py": ["os.open"],  # /dev/null, when the reader of stdout has gone
        "formats/files.py": ["os.open"],  # inputs, to read
        "report/sweep.py": ["figure.savefig"],  # into memory
    }
    assert {"os.write", "os.fsync", "os.unlink", "os.rename"} <= {*modules["formats/disk.py"]}


# --- kills and races --------------------------------------------------------------------------


def run_faults(*options: str) -> str:
    """The script, in a process of its own: it forks, which one with threads must not."""
    command = [sys.executable, "-m", "tests.faults", *options]
    done = subprocess.run(
        command, cwd=PACKAGE.parent, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kills_and_races_break_nothing() -> None:
    said = run_faults("--kills", "5", "--races", "3", "--step", "7")
    assert said.count("failures: 0") == 3


@pytest.mark.slow
@pytest.mark.long
def test_many_kills_and_races_break_nothing() -> None:
    said = run_faults()
    assert "killed at random: 200 of" in said
    assert "rounds of four racing runs: 20, failures: 0" in said
