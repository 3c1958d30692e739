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


def other_wsurg(place: Path) -> tuple[str, ...]:
    """Return how to run another version: a checkout of it, or a Python that has it installed.

    In a folder of its own, for `python -m` takes the package of the folder that it stands in.
    """
    python, folder = (sys.executable, place) if place.is_dir() else (str(place), Path("/"))
    return ("env", "--unset=PYTHONPATH", "-C", str(folder), python, "-m", "weightsurgery")


def wsurg_diff(
    models: tuple[Path, Path], label: str = "diff", wsurg: tuple[str, ...] = WSURG
) -> Command:
    """Return `wsurg diff` with all its defaults."""
    return Command(label, (*wsurg, "diff", *map(str, models), "--json"))


def wsurg_mix(
    models: tuple[Path, Path],
    work: Path,
    *flags: str,
    label: str = "mix",
    wsurg: tuple[str, ...] = WSURG,
    output: Path | None = None,
) -> Command:
    """Return `wsurg mix` of the two models."""
    output = output or work / "out-wsurg"
    settings = ("--ratio", "0.3", "-o", str(output), *flags)
    return Command(label, (*wsurg, "mix", *map(str, models), *settings), output)


def fisher(models: tuple[Path, Path], size: str = "tinyllama", layers: int = 0) -> Path:
    """Return a float32 Fisher file of the pair, made if need be."""
    return _made_beside("fishers", models, size, layers)


def adapter(models: tuple[Path, Path], size: str = "tinyllama", layers: int = 0) -> Path:
    """Return a LoRA adapter of the pair's base, made if need be."""
    return _made_beside("adapters", models, size, layers)


def _made_beside(module: str, models: tuple[Path, Path], size: str, layers: int) -> Path:
    """Return what a module's own process makes in the pair's folder.

    Raises:
        subprocess.CalledProcessError: It could not be made.
    """
    command = [sys.executable, "-m", f"tests.benchmarks.{module}", str(models[0].parent)]
    command += ["--size", size, "--layers", str(layers)]
    made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Path(made.stdout.strip())


def wsurg_apply(base: Path, adapter: Path, output: Path, *flags: str, label: str) -> Command:
    """Return `wsurg apply-adapter` of one adapter."""
    arguments = (*WSURG, "apply-adapter", str(base), str(adapter), "-o", str(output), *flags)
    return Command(label, arguments, output)


def wsurg_verify(out: Path, *flags: str, label: str) -> Command:
    """Return `wsurg verify` of an output."""
    return Command(label, (*WSURG, "verify", str(out), *flags, "--json"))


def sha256sum(folder: Path) -> Command:
    """Return `sha256sum` of all files of a folder."""
    return Command("sha256sum", ("sh", "-c", 'sha256sum "$1"/*', "sh", str(folder)))


def wsurg_verify_adapter(base: Path, adapter: Path, merged: Path) -> Command:
    """Return `wsurg verify-adapter` of a merge."""
    given = map(str, (base, adapter, merged))
    return Command("verify-adapter", (*WSURG, "verify-adapter", *given, "--json"))


def merge_script(script: str, python: Path | str, base: Path, adapter: Path, work: Path) -> Command:
    """Return one of the merging scripts in rivals/, run by a Python that has what it needs."""
    output = work / f"out-{script}"
    given = map(str, (base, adapter, output))
    return Command(script, (str(python), str(RIVALS / f"{script}.py"), *given), output)


def deltalint(program: Path, base: Path, adapter: Path, merged: Path) -> Command:
    """Return deltalint's check of a merge."""
    named = {"base": base, "adapter": adapter, "merged": merged}
    given = (word for name, path in named.items() for word in (f"--{name}", str(path)))
    return Command("deltalint check", (str(program), "check", *given, "--json"))


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
