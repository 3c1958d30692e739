"""The command lines that are measured, and the models they are given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .measure import Command

RIVALS = Path(__file__).with_name("rivals")
WSURG = (sys.executable, "-m", "weightsurgery")


def pair(work: Path, size: str, fill: str = "random", layers: int = 0) -> tuple[Path, Path]:
    """Return the base and the tuned model of a size, made by a process of its own if need be.

    Raises:
        subprocess.CalledProcessError: The models could not be made.
    """
    command = [sys.executable, "-m", "tests.benchmarks.pairs", str(work)]
    command += ["--size", size, "--fill", fill, "--layers", str(layers)]
    made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    folder = Path(made.stdout.strip())
    return folder / "base", folder / "tuned"


def wsurg_diff(models: tuple[Path, Path], label: str = "diff") -> Command:
    """Return `wsurg diff` with all its defaults."""
    return Command(label, (*WSURG, "diff", *map(str, models), "--json"))


def wsurg_mix(models: tuple[Path, Path], work: Path, *flags: str, label: str = "mix") -> Command:
    """Return `wsurg mix` of the two models."""
    output = work / "out-wsurg"
    settings = ("--ratio", "0.3", "-o", str(output), *flags)
    return Command(label, (*WSURG, "mix", *map(str, models), *settings), output)


def fisher(models: tuple[Path, Path], layers: int = 0) -> Path:
    """Return a float32 Fisher file of the pair, made by a process of its own if need be.

    Raises:
        subprocess.CalledProcessError: The file could not be made.
    """
    command = [sys.executable, "-m", "tests.benchmarks.fishers", str(models[0].parent)]
    command += ["--layers", str(layers)]
    made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Path(made.stdout.strip())


def wsurg_purify(
    models: tuple[Path, Path], work: Path, fisher: Path, *flags: str, label: str
) -> Command:
    """Return `wsurg purify` of the two models with a Fisher file."""
    output = work / "out-purify"
    settings = ("--fisher", str(fisher), "--ratio", "0.3", "-o", str(output), *flags)
    return Command(label, (*WSURG, "purify", *map(str, models), *settings), output)


def rival(script: str, models: tuple[Path, Path]) -> Command:
    """Return one of the scripts in rivals/, given the two models."""
    return Command(script, (sys.executable, str(RIVALS / f"{script}.py"), *map(str, models)))


def copy_and_sync(model: Path, work: Path) -> Command:
    """Return the copy of a model that ends when the bytes are on the disk."""
    output = work / "out-copy"
    shell = ("sh", "-c", 'cp -r "$1" "$2" && sync', "sh")
    return Command("cp + sync", (*shell, str(model), str(output)), output)
