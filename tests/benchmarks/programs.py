"""The rivals that are programs of their own: where they are found, how they are installed.

None is a requirement of this project and their own requirements differ, so each lives in a
virtual environment of its own and is only ever called as a program.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from .measure import Command

TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Program:
    """A rival: its name, the program in its environment, and what pip is asked to install there.

    `bare` is installed last and without what it requires.
    """

    name: str
    executable: str
    requirements: tuple[str, ...]
    bare: tuple[str, ...] = ()


PROGRAMS = {
    "mergekit": Program("mergekit", "mergekit-yaml", (TORCH, "mergekit")),
    "deltalint": Program("deltalint", "deltalint", (TORCH, "deltalint")),
    # Its merge is called from Python: the program asks for a whole training's configuration, and
    # its requirements for several gigabytes that a merge does not use.
    "axolotl": Program(
        "axolotl",
        "python",
        (TORCH, "transformers==5.16.1", "peft==0.20.0", "accelerate", "requests", "colorama"),
        ("axolotl==0.19.0",),
    ),
}

MERGEKIT = """\
merge_method: linear
dtype: bfloat16
models:
  - model: {tuned}
    parameters:
      weight: 0.7
  - model: {base}
    parameters:
      weight: 0.3
"""


def installed(work: Path, program: Program) -> Path:
    """Return the executable's place in the environment that `install` makes inside `work`."""
    return work / program.name / "bin" / program.executable


def install(work: Path, program: Program) -> Path:
    """Make a virtual environment with a rival inside `work` and return its executable.

    Raises:
        subprocess.CalledProcessError: pip could not install it.
    """
    executable, ready = installed(work, program), work / program.name / "ready"
    if not ready.exists():
        folder = executable.parent.parent
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        # tox's constraints are for our own requirements, which a rival's would clash with.
        own = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
        for packages in (program.requirements, ("--no-deps", *program.bare)):
            if packages != ("--no-deps",):
                subprocess.run([*pip, *packages], check=True, stdout=sys.stderr, env=own)
        ready.touch()
    return executable


def find(work: Path, program: Program, named: Path | None) -> Path | None:
    """Return the executable that was named, or installed before, or is on PATH, or None."""
    on_path = None if program.executable == "python" else shutil.which(program.executable)
    candidates = [named] if named else [installed(work, program)]
    candidates += [Path(on_path)] if on_path and not named else []
    return next((each for each in candidates if each.exists()), None)


def linear_merge(mergekit: Path, base: Path, tuned: Path, work: Path) -> Command:
    """Return mergekit's merge of 0.7 TUNED + 0.3 BASE, as a user would call it.

    Its defaults, but for the tokenizer, which the models here do not have. `--async-write`,
    `--lazy-unpickle` and `-j 2` made no difference above the noise when they were tried.
    """
    config, output = work / "mergekit.yml", work / "out-mergekit"
    config.write_text(MERGEKIT.format(base=base, tuned=tuned))
    arguments = (str(mergekit), str(config), str(output), "--no-copy-tokenizer", "--quiet")
    return Command("mergekit", arguments, output)
