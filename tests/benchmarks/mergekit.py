"""The rival of `wsurg mix`: a linear merge of the same two models with mergekit.

mergekit is no requirement of this project and its own requirements differ, so it lives in a
virtual environment of its own and is only ever called as a program.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from .measure import Command

REQUIREMENTS = ("torch==2.13.0", "mergekit")
NOT_INSTALLED = "not installed"

CONFIG = """\
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


def installed(work: Path) -> Path:
    """Return the program's place in the environment that `install` makes inside `work`."""
    return work / "mergekit" / "bin" / "mergekit-yaml"


def install(work: Path) -> Path:
    """Make a virtual environment with mergekit inside `work` and return the program.

    Raises:
        subprocess.CalledProcessError: pip could not install it.
    """
    program = installed(work)
    if not program.exists():
        folder = program.parent.parent
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        # tox's constraints are for our own requirements, which mergekit's would clash with.
        own = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
        subprocess.run([*pip, *REQUIREMENTS], check=True, stdout=sys.stderr, env=own)
    return program


def find(work: Path, named: Path | None) -> Path | None:
    """Return the program that was named, or installed before, or is on PATH, or None."""
    found = shutil.which("mergekit-yaml")
    candidates = [named] if named else [installed(work), *([Path(found)] if found else [])]
    return next((each for each in candidates if each.exists()), None)


def merge(program: Path, base: Path, tuned: Path, work: Path) -> Command:
    """Return the merge of 0.7 TUNED + 0.3 BASE, as a user would call it.

    Its defaults, but for the tokenizer, which the models here do not have. `--async-write`,
    `--lazy-unpickle` and `-j 2` made no difference above the noise when they were tried.
    """
    config, output = work / "mergekit.yml", work / "out-mergekit"
    config.write_text(CONFIG.format(base=base, tuned=tuned))
    arguments = (str(program), str(config), str(output), "--no-copy-tokenizer", "--quiet")
    return Command("mergekit", arguments, output)
