"""All that is hostile, given to a command that writes: one line, and nothing written.

Every command line is run in one process that is asked for its memory before and after.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import cases
from tests.gallery import gallery

MOST = 200_000_000  # bytes beyond what the process has anyway
OPENED = {name: e for name, e in gallery().items() if not name.startswith(("record: ", "of "))}
SCRIPT = """
import contextlib, io, json, signal, sys
from weightsurgery.cli import main

def bytes_of(word):
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith(word))

def measured(arguments):
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the peak is the present size again
    before, said = bytes_of("VmHWM:"), io.StringIO()
    signal.alarm(60)  # a pipe that is opened would be waited for without end
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(arguments)
        except SystemExit as stopped:
            code = stopped.code
    signal.alarm(0)
    return code or 0, said.getvalue(), bytes_of("VmHWM:") - before

for line in sys.stdin:
    print(json.dumps(measured(json.loads(line))), flush=True)
"""


@dataclass(frozen=True)
class Told:
    """What a command line did.

    Attributes:
        code: Its exit code.
        said: On stderr.
        peak: Bytes of memory that the process took more than before.
        wrote: Whether there was an output.
        left: What else it left beside the output.
    """

    code: int
    said: str
    peak: int
    wrote: bool
    left: list[str]


def run(child: Any, out: Path, *words: object) -> Told:
    """Run a command that writes, and remove what it wrote."""
    arguments = [*map(str, words), "-o", str(out)]
    print(json.dumps(arguments), file=child.stdin, flush=True)
    code, said, peak = json.loads(child.stdout.readline())
    left = [path.name for path in out.parent.iterdir() if path != out]
    wrote = out.exists()
    shutil.rmtree(out.parent)
    out.parent.mkdir()
    return Told(code, said, peak, wrote, [name for name in left if not name.startswith("out.")])


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Told]]:
    """For each exhibit, and each command, what the command did."""
    root = tmp_path_factory.mktemp("hostile")
    (root / "place").mkdir()
    out, good = root / "place" / "out.safetensors", root / "good.safetensors"
    cases.write_file(good, cases.model("bert"))
    found: dict[str, dict[str, Told]] = {}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
    ) as child:
        # What is imported and compiled at first use.
        assert run(child, out, "convert", good).wrote
        assert run(child, out, "mix", good, good).wrote
        for number, (name, exhibit) in enumerate(OPENED.items()):
            (path,) = exhibit.make(root / str(number))
            to = out.with_suffix("") if path.is_dir() else out
            found[name] = {
                "convert": run(child, to, "convert", path),
                "mix": run(child, to, "mix", good, path),
            }
        assert child.stdin is not None
        child.stdin.close()
    assert child.returncode == 0
    return found


@pytest.mark.parametrize("name", [n for n, e in OPENED.items() if e.fate == "is refused"])
def test_refused_in_one_line_and_nothing_written(
    name: str, told: dict[str, dict[str, Told]]
) -> None:
    for command, run in told[name].items():
        assert run.code in (3, 5, 6), (command, run.said)
        (line,) = run.said.splitlines()
        assert line.startswith("error[E-")
        assert line.isprintable()
        assert not run.wrote
        assert not run.left
        assert run.peak < MOST


@pytest.mark.parametrize("name", [n for n, e in OPENED.items() if e.fate == "opens"])
def test_what_is_odd_and_valid_is_converted(name: str, told: dict[str, dict[str, Told]]) -> None:
    for command, run in told[name].items():
        assert run.code == 0 or (command == "mix" and run.code in (4, 5)), (command, run.said)
        assert run.wrote == (run.code == 0)
        assert "Traceback" not in run.said
        assert not run.left
        assert run.peak < MOST


def test_there_is_much_of_both() -> None:
    fates = [exhibit.fate for exhibit in OPENED.values()]
    assert fates.count("is refused") > 150
    assert fates.count("opens") > 40
    assert "either" not in fates
