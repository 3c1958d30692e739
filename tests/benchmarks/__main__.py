"""The benchmarks' command line: `python -m tests.benchmarks`, see README.md beside it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

from . import commands, programs
from .benches import BENCHES, Setting
from .measure import take_turns
from .report import Row, failures, table
from .shapes import BYTES_PER_ELEMENT, SIZES

OTHER_BYTES = 3.5e9  # the largest output and the two sparse pairs of the memory benchmark


def parse() -> argparse.Namespace:
    """Return the settings of the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    default = Path(tempfile.gettempdir()) / f"wsurg-benchmarks-{os.getuid()}"
    parser.add_argument("--work", type=Path, default=default, help="folder for models and outputs")
    parser.add_argument("--only", action="append", choices=BENCHES, help="may be given again")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each command")
    parser.add_argument("--layers", type=int, default=22, help="22 makes 1.1 B parameters")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all the figures there too")
    text = "a checkout of an earlier wsurg, or a Python that has one, for `safety`"
    parser.add_argument("--before", type=Path, metavar="PATH", help=text)
    for name, program in programs.PROGRAMS.items():
        parser.add_argument(f"--{name}", type=Path, help=f"its {program.executable}")
    text = "those that are not named, into the work folder"
    parser.add_argument("--install-rivals", action="store_true", help=text)
    settings = parser.parse_args()
    if settings.repeats < 1 or settings.layers < 1:
        parser.error("--repeats and --layers must be at least 1")
    settings.work = settings.work.absolute()
    for name in (*programs.PROGRAMS, "before"):
        named = getattr(settings, name)
        if named and not named.exists():
            parser.error(f"--{name} {named}: no such file")
    model = replace(SIZES["tinyllama"], layers=settings.layers).parameters * BYTES_PER_ELEMENT
    needed = 5 * model + OTHER_BYTES  # the pair, the Fisher file that is twice as wide, an output
    settings.work.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(settings.work).free < needed:
        parser.error(f"--work {settings.work}: {needed / 1e9:.0f} GB of free disk are needed")
    return settings


def find_rivals(settings: argparse.Namespace) -> dict[str, Path]:
    """Return the rivals' programs by name, installed now if the command line asks for it."""
    found = {}
    for name, program in programs.PROGRAMS.items():
        named = getattr(settings, name)
        if settings.install_rivals and not named:
            try:
                programs.install(settings.work, program)
            except subprocess.CalledProcessError as error:
                print(f"{name} could not be installed: {error}", file=sys.stderr)
        place = programs.find(settings.work, program, named)
        if place is not None:
            found[name] = place.absolute()  # a bare name would be sought on PATH
    return found


def warm_up(work: Path) -> str:
    """Compile wsurg's kernels on a tiny pair and return a line that tells how long it took.

    Raises:
        SystemExit: wsurg does not work at all, so there is nothing to measure.
    """
    models = commands.pair(work, "tiny")
    adapter, merged = commands.adapter(models, "tiny"), work / "merged-tiny"
    turns = [
        commands.wsurg_diff(models),
        commands.wsurg_mix(models, work),
        commands.wsurg_apply(models[0], adapter, merged, label="apply-adapter"),
    ]
    results = take_turns(turns, 1)
    if any(result.error for result in results.values()):
        raise SystemExit("wsurg failed on a tiny pair, nothing was measured")
    seconds = sum(sum(result.seconds) for result in results.values())
    return (
        f"warm-up on a tiny pair: {seconds:.1f} s, not counted; "
        "it compiles the kernels where no earlier run has left them"
    )


def machine() -> str:
    """Return a line on the machine and how busy it is."""
    load = os.getloadavg()[0]
    return (
        f"{os.cpu_count()} cores, load {load:.1f} at the start, {platform.system()} "
        f"{platform.machine()}, Python {platform.python_version()}"
    )


def main() -> int:
    """Run the benchmarks and return 1 when a bar was missed or wsurg failed, else 0."""
    settings = parse()
    notes = [machine(), warm_up(settings.work)]
    setting = Setting(
        work=settings.work,
        repeats=settings.repeats,
        layers=settings.layers,
        rivals=find_rivals(settings),
        before=settings.before and settings.before.absolute(),
    )
    rows: list[Row] = []
    for name in settings.only or BENCHES:
        print(name, file=sys.stderr)
        rows += BENCHES[name](setting)
    print("\n".join([*notes, "", table(rows), *failures(rows), "", summary(rows)]))
    if settings.json:
        found = {"notes": notes, "rows": [row.as_json() for row in rows]}
        settings.json.write_text(json.dumps(found, indent=2) + "\n")
    return int(any(row.verdict in ("MISSED", "FAILED") for row in rows))


def summary(rows: list[Row]) -> str:
    """Return how many rows had each verdict."""
    verdicts = Counter(row.verdict for row in rows)
    return ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())


if __name__ == "__main__":
    sys.exit(main())
