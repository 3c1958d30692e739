"""The benchmarks: which commands take turns, and the bars that their figures are held to."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import commands, programs
from .measure import Command, Result, run, take_turns
from .report import Bar, Row, faster, within

LEAST_HELP_REPEATS = 10
ABSENT = Result(error="not installed")

# Prints which of the modules on its command line `wsurg --help` has imported.
LIST_IMPORTED = """\
import contextlib, io, runpy, sys
heavy, sys.argv = sys.argv[1:], ["wsurg", "--help"]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    runpy.run_module("weightsurgery", run_name="__main__")
print(*[name for name in heavy if name in sys.modules])
"""
HEAVY = ("torch", "transformers", "numba", "numpy")


@dataclass(frozen=True)
class Setting:
    """Where to work, how often to run each command, how large the models are, the rivals.

    `before` is a checkout of an earlier wsurg, or a Python that has one installed.
    """

    work: Path
    repeats: int
    layers: int
    rivals: Mapping[str, Path]
    before: Path | None = None


def diff(setting: Setting) -> list[Row]:
    """`wsurg diff` against reading the bytes and against torch."""
    models = commands.pair(setting.work, "tinyllama", layers=setting.layers)
    floor, naive = commands.rival("pread_pass", models), commands.rival("naive_diff", models)
    turns = [floor, naive, commands.wsurg_diff(models)]
    results = take_turns(turns, setting.repeats, warm=floor)
    ours = results["diff"]
    return [
        within("diff", ours, "pread pass", results["pread_pass"], 5),
        faster("diff", ours, "naive diff (torch)", results["naive_diff"], 8),
        peak_memory("diff", ours),
    ]


def mix(setting: Setting) -> list[Row]:
    """`wsurg mix`, without and with hashes, against mergekit and against a plain copy."""
    work = setting.work
    models = commands.pair(work, "tinyllama", layers=setting.layers)
    turns = [
        commands.copy_and_sync(models[0], work),
        commands.wsurg_mix(models, work, "--no-hash", label="mix --no-hash"),
        commands.wsurg_mix(models, work),
    ]
    if "mergekit" in setting.rivals:
        turns.append(programs.linear_merge(setting.rivals["mergekit"], *models, work))
    floor = commands.rival("pread_pass", models)
    results = take_turns(turns, setting.repeats, warm=floor)
    merged, bare, hashed = results.get("mergekit", ABSENT), results["mix --no-hash"], results["mix"]
    return [
        faster("mix --no-hash", bare, "mergekit linear", merged, 6),
        within("mix --no-hash", bare, "cp + sync", results["cp + sync"], 2),
        faster("mix", hashed, "mergekit linear", merged, 3.5),
        peak_memory("mix", hashed),
    ]


def purify(setting: Setting) -> list[Row]:
    """`wsurg purify` with a float32 Fisher file against `wsurg mix` of the same pair."""
    work = setting.work
    models = commands.pair(work, "tinyllama", layers=setting.layers)
    fisher = commands.fisher(models, layers=setting.layers)
    turns = [
        command
        for name, flags in (("no-hash", ("--no-hash",)), ("hash", ()))
        for command in (
            commands.wsurg_mix(models, work, *flags, label=f"mix, {name}"),
            commands.wsurg_purify(models, work, fisher, *flags, label=f"purify, {name}"),
        )
    ]
    results = take_turns(turns, setting.repeats, warm=commands.rival("pread_pass", models))
    bare, hashed = results["purify, no-hash"], results["purify, hash"]
    return [
        within("purify --no-hash", bare, "mix --no-hash", results["mix, no-hash"], 4),
        within("purify", hashed, "mix", results["mix, hash"], 4),
        peak_memory("purify", hashed, 500),
    ]


def apply_adapter(setting: Setting) -> list[Row]:
    """`wsurg apply-adapter` against PEFT's merge and axolotl's, in time and in memory."""
    work = setting.work
    models = commands.pair(work, "tinyllama", layers=setting.layers)
    adapter = commands.adapter(models, layers=setting.layers)
    bare, out = ("--no-hash", "--no-prove"), work / "out-apply"
    turns = [
        commands.merge_script("peft_merge", sys.executable, models[0], adapter, work),
        commands.wsurg_apply(models[0], adapter, out, *bare, label="bare"),
        commands.wsurg_apply(models[0], adapter, out, label="apply-adapter"),
    ]
    if "axolotl" in setting.rivals:
        axolotl = setting.rivals["axolotl"]
        turns.append(commands.merge_script("axolotl_merge", axolotl, models[0], adapter, work))
    floor = commands.rival("pread_pass", (models[0], models[0]))
    results = take_turns(turns, setting.repeats, warm=floor)
    peft, sharded = results["peft_merge"], results.get("axolotl_merge", ABSENT)
    rows: list[Row] = []
    for label, name in (("bare", "apply-adapter --no-hash --no-prove"), ("apply-adapter",) * 2):
        ours = results[label]
        rows += [
            faster(name, ours, "PEFT merge_and_unload", peft, 6 if label == "bare" else 2),
            faster(name, ours, "axolotl's sharded merge", sharded, 1),
            smaller(name, ours, "PEFT merge_and_unload", peft, 1 / 3),
        ]
    return rows


def verify_adapter(setting: Setting) -> list[Row]:
    """`wsurg verify-adapter` against deltalint, on a merge by PEFT."""
    work = setting.work
    models = commands.pair(work, "tinyllama", layers=setting.layers)
    adapter = commands.adapter(models, layers=setting.layers)
    merge = commands.merge_script("peft_merge", sys.executable, models[0], adapter, work)
    merged, made = work / "out-peft_merge", Result()
    shutil.rmtree(merged, ignore_errors=True)
    run(merge, made)
    turns = [commands.wsurg_verify_adapter(models[0], adapter, merged)]
    if "deltalint" in setting.rivals:
        program = setting.rivals["deltalint"]
        turns.append(commands.deltalint(program, models[0], adapter, merged))
    floor = commands.rival("pread_pass", (models[0], merged))
    results = take_turns(turns, setting.repeats, warm=floor)
    shutil.rmtree(merged, ignore_errors=True)
    ours = made if made.error else results["verify-adapter"]
    lint = results.get("deltalint check", ABSENT)
    return [
        faster("verify-adapter", ours, "deltalint check", lint, 6),
        peak_memory("verify-adapter", ours),
    ]


def verify(setting: Setting) -> list[Row]:
    """`wsurg verify` against `sha256sum`, and its proof against the `mix` that it proves."""
    work = setting.work
    models = commands.pair(work, "tinyllama", layers=setting.layers)
    made, out = Result(), work / "out-verified"
    shutil.rmtree(out, ignore_errors=True)
    run(commands.wsurg_mix(models, work, output=out), made)
    both = ("--base", str(models[0]), "--tuned", str(models[1]))
    turns = [
        commands.sha256sum(out),
        commands.wsurg_verify(out, label="verify"),
        commands.wsurg_mix(models, work),
        commands.wsurg_verify(out, *both, label="verify, with the proof"),
    ]
    results = take_turns(turns, setting.repeats, warm=commands.rival("pread_pass", models))
    shutil.rmtree(out, ignore_errors=True)
    plain, proof = (
        made if made.error else results[name] for name in ("verify", "verify, with the proof")
    )
    return [
        within("verify", plain, "sha256sum", results["sha256sum"], 3),
        within("verify, with the proof", proof, "mix", results["mix"], 1.5),
        peak_memory("verify, with the proof", proof),
    ]


def smaller(name: str, ours: Result, rival: str, other: Result, at_most: float) -> Row:
    """Return the row that lets `ours` have so many times the peak memory of `rival`."""
    failed = ours.error or other.error
    value = None if failed else ours.peak_bytes / other.peak_bytes
    bar = Bar("at most", at_most, " of its memory")
    return Row(f"{name}, peak memory", ours, value, bar, rival, other)


def peak_memory(name: str, ours: Result, bar: float = 400) -> Row:
    """The row that holds a command's peak resident memory to a bar in MB."""
    peak = None if ours.error else ours.peak_bytes / 1e6
    return Row(f"{name}, peak memory", ours, peak, Bar("at most", bar, " MB"))


def memory(setting: Setting) -> list[Row]:
    """Peak memory of `wsurg diff` and `wsurg mix` on a model and on one eight times larger."""
    turns: list[Command] = []
    for size in ("small", "large"):
        models = commands.pair(setting.work, size, "sparse")
        turns.append(commands.wsurg_diff(models, f"diff {size}"))
        turns.append(commands.wsurg_mix(models, setting.work, label=f"mix {size}"))
    results = take_turns(turns, setting.repeats)
    return [
        growth(name, results[f"{name} small"], results[f"{name} large"]) for name in ("diff", "mix")
    ]


def growth(name: str, small: Result, large: Result) -> Row:
    """Return the row that keeps the peak on the large model near that on the small one."""
    value = None if small.error or large.error else 100 * (large.peak_bytes / small.peak_bytes - 1)
    rival = f"1/8 the bytes, {small.peak_bytes / 1e6:.0f} MB"
    return Row(f"{name}, peak growth", large, value, Bar("at most", 10, " %"), rival, small)


def safety(setting: Setting) -> list[Row]:
    """`wsurg diff`, `mix --no-hash` and `mix` against the same of an earlier version."""
    models = commands.pair(setting.work, "tinyllama", layers=setting.layers)
    found: dict[str, Result] = {}
    if setting.before is not None:
        tiny = commands.pair(setting.work, "tiny")
        take_turns(both_versions(setting.work, setting.before, tiny), 1)  # compiles the kernels
        turns = both_versions(setting.work, setting.before, models)
        found = take_turns(turns, setting.repeats, warm=commands.rival("pread_pass", models))
    rows = []
    for name in ("diff", "mix --no-hash", "mix"):
        before = f"{name} before"
        rows.append(within(name, found.get(name, Result()), before, found.get(before, ABSENT), 1.1))
    return rows


def both_versions(work: Path, before: Path, models: tuple[Path, Path]) -> list[Command]:
    """Return each of the commands by this version, and after it by the one before."""
    turns = []
    for flags in (None, ("--no-hash",), ()):
        for when, wsurg in (("", commands.WSURG), (" before", commands.other_wsurg(before))):
            if flags is None:
                turns.append(commands.wsurg_diff(models, f"diff{when}", wsurg))
            else:
                label = " ".join(("mix", *flags)) + when
                turns.append(commands.wsurg_mix(models, work, *flags, label=label, wsurg=wsurg))
    return turns


def help_text(setting: Setting) -> list[Row]:
    """`wsurg --help` against an empty Python and mergekit's --help, and what it imports."""
    turns = [
        Command("pass", (sys.executable, "-c", "pass")),
        Command("help", (*commands.WSURG, "--help")),
    ]
    results = take_turns(turns, max(setting.repeats, LEAST_HELP_REPEATS))
    if "mergekit" in setting.rivals:
        turns = [Command("mergekit", (str(setting.rivals["mergekit"]), "--help"))]
        results |= take_turns(turns, setting.repeats)
    ours, empty = results["help"], results["pass"]
    bar = Bar("at most", max(0.25, 8 * (empty.best or 0.0)), " s")
    ratio = faster("--help", ours, "mergekit --help", results.get("mergekit", ABSENT), 1)
    return [Row("--help", ours, ours.best, bar, "python -c pass", empty), ratio, imports()]


def imports() -> Row:
    """Return the row that allows `wsurg --help` none of the heavy modules."""
    bar = Bar("at most", 0, " modules")
    command = [sys.executable, "-c", LIST_IMPORTED, *HEAVY]
    listed = subprocess.run(command, check=False, capture_output=True, text=True)
    if listed.returncode:
        return Row("--help, imports", Result(error=listed.stderr), None, bar)
    found = listed.stdout.split()
    return Row(f"--help, imports {' '.join(found) or 'nothing heavy'}", Result(), len(found), bar)


BENCHES: dict[str, Callable[[Setting], list[Row]]] = {
    "help": help_text,
    "diff": diff,
    "mix": mix,
    "purify": purify,
    "apply-adapter": apply_adapter,
    "verify-adapter": verify_adapter,
    "verify": verify,
    "memory": memory,
    "safety": safety,
}
