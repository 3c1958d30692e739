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

from . import commands, mergekit
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
    parser.add_argument("--mergekit", type=Path, help="the mergekit-yaml program")
    parser.add_argument("--install-mergekit", action="store_true", help="into the work folder")
    settings = parser.parse_args()
    if settings.repeats < 1 or settings.layers < 1:
        parser.error("--repeats and --layers must be at least 1")
    settings.work = settings.work.absolute()
    if settings.mergekit:
        settings.mergekit = settings.mergekit.absolute()  # a bare name would be sought on PATH
        if not settings.mergekit.exists():
            parser.error(f"--mergekit {settings.mergekit}: no such file")
    model = replace(SIZES["tinyllama"], layers=settings.layers).parameters * BYTES_PER_ELEMENT
    needed = 5 * model + OTHER_BYTES  # the pair, the Fisher file that is twice as wide, an output
    settings.work.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(settings.work).free < needed:
        parser.error(f"--work {settings.work}: {needed / 1e9:.0f} GB of free disk are needed")
    return settings


def find_mergekit(settings: argparse.Namespace) -> Path | None:
    """Return the mergekit program, installed now if the command line asks for it, or None."""
    if settings.install_mergekit and not settings.mergekit:
        try:
            return mergekit.install(settings.work)
        except subprocess.CalledProcessError as error:
            print(f"mergekit could not be installed: {error}", file=sys.stderr)
    return mergekit.find(settings.work, settings.mergekit)


def warm_up(work: Path) -> str:
    """Compile wsurg's kernels on a tiny pair and return a line that tells how long it took.

    Raises:
        SystemExit: wsurg does not work at all, so there is nothing to measure.
    """
    models = commands.pair(work, "tiny")
    turns = [commands.wsurg_diff(models), commands.wsurg_mix(models, work)]
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
        mergekit=find_mergekit(settings),
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
