"""The page on signing: its commands are run as they stand, and find what was changed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import hostile
from tests.docstring_lint import ROOT

PAGE = (ROOT / "docs" / "how-to" / "sign.md").read_text("utf-8")
TOOLS = ("ssh-keygen", "minisign", "jq", "sha256sum")
Run = Callable[[str], subprocess.CompletedProcess[str]]


def blocks() -> list[str]:
    """The page's console blocks whose tools this machine has."""
    found = re.findall(r"^```console\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return [one for one in found if all(shutil.which(tool) for tool in TOOLS if tool in one)]


def commands(block: str) -> list[str]:
    """What follows the prompts; keys are made without the passphrase that they would ask for."""
    lines = [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]
    lines = [re.sub(r"^ssh-keygen -t (.*)", r"ssh-keygen -q -N '' -t \1", line) for line in lines]
    return [re.sub(r"^minisign -G ", "minisign -G -W ", line) for line in lines]


def outputs(block: str) -> list[str]:
    """What a block says that its commands print, up to where it differs from run to run."""
    shown = [line.partition("…")[0] for line in block.splitlines() if not line.startswith("$ ")]
    return [line for line in shown if line]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs lines in bash, in a folder with base/ and tuned/; `wsurg` and `python3` are ours."""
    for name, seed in (("base", 0), ("tuned", 1)):
        model = {"config.json": {}, "model.safetensors": hostile.weights("a", "b", seed=seed)}
        hostile.folder(tmp_path / "work" / name, model)
    (tmp_path / "bin").mkdir()
    for name, arguments in (("wsurg", "-m weightsurgery"), ("python3", "")):
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n')
        program.chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}

    def bash(lines: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", lines],
            cwd=tmp_path / "work",
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    return bash


def checking() -> list[str]:
    """The commands by which somebody checks, each for itself, and the folder each is run in."""
    found, folder = [], ""
    for line in (line for block in blocks() for line in commands(block)):
        if line.startswith("cd "):
            folder = "" if line == "cd .." else f"{line}; "
        elif re.search(r" -Y verify | -V |--check|^wsurg verify", line):
            found.append(folder + line.replace('"$PUBLIC_KEY"', '"$(tail -n 1 minisign.pub)"'))
    return list(dict.fromkeys(found))


def test_the_page_is_followed_and_finds_what_was_changed(run: Run, tmp_path: Path) -> None:
    made = run("\n".join(line for block in blocks() for line in commands(block)))
    assert made.returncode == 0, made.stderr
    for line in (line for block in blocks() for line in outputs(block)):
        assert line in made.stdout + made.stderr

    work = tmp_path / "work"
    assert checking()
    for name in ("signed/model.safetensors", "signed-mask.safetensors"):
        assert _refusing(run, work / name) == _about(name, "wsurg verify", "--check")
    for name in ("signed/wsurg-record.json", "signed-mask.safetensors.wsurg-record.json"):
        assert _refusing(run, work / name) >= _about(name, "wsurg verify", "verify -f", "-V")
    assert [line for line in checking() if run(line).returncode] == []


def _refusing(run: Run, path: Path) -> set[str]:
    """The checks that fail once a file's last letter or bit is another."""
    before = path.read_bytes()
    path.write_bytes(before[:-3] + bytes([before[-3] ^ 1]) + before[-2:])
    found = {line for line in checking() if run(line).returncode}
    path.write_bytes(before)
    return found


def _about(name: str, *kinds: str) -> set[str]:
    """The checks of these kinds that look at a file's output."""
    out = "signed-mask" if "mask" in name else "signed"
    mine = re.compile(rf"(?<![\w-]){out}(?![\w-])")
    return {line for line in checking() if mine.search(line) and any(k in line for k in kinds)}
