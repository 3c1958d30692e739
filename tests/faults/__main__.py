"""Kill runs at random and let runs race, and say how often: `python -m tests.faults --help`."""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path

from tests.faults import runs


def main() -> None:
    """Run all, and print counts; an exception is a broken promise."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="runs killed at a random moment")
    parser.add_argument("--races", type=int, default=20, help="rounds of four racing runs")
    parser.add_argument("--step", type=int, default=1, help="kill at every so many calls")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "place"
        root.mkdir()
        kinds = [(d, old) for d in (False, True) for old in (False, True)]
        kills = sum(
            runs.killed_at_every_call(root, is_directory=d, old=old, step=given.step)
            for d, old in kinds
        )
        print(f"killed at a call: {kills}, failures: 0")
        count = tried = 0
        while count < given.kills:
            count += runs.killed_at_random(root, given.seed + tried)
            tried += 1
        print(f"killed at random: {count} of {tried} runs, failures: 0")
        codes = Counter(c for i in range(given.races) for c in runs.race(root, given.seed + i))
        print(f"rounds of four racing runs: {given.races}, failures: 0, exit codes {dict(codes)}")


if __name__ == "__main__":
    main()
