"""Fine-tune a real model, look at what moved, and put a share of it back.

Builds the pair of `minilm_pair.py`, runs the `wsurg` commands on it that a first user would run,
and compares the fine-tuned model with the mixed one: how far each is from the base model, and how
many held-out sentences each gets right.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
from minilm_pair import (
    PairError,
    accuracy,
    build_pair,
    read_examples,
    read_record,
    silence_transformers,
)
from rich.console import Console
from rich.table import Table

RATIO = 0.3
QUICK_STEPS = 15
FULL_STEPS = 120


class DemoError(Exception):
    """A command of the demo failed."""


def _run(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    words = [str(argument) for argument in arguments]
    # Without the flush, our lines would come after the command's when stdout is a pipe.
    print(f"\n$ {shlex.join(['wsurg', *words])}", flush=True)
    command = [sys.executable, "-m", "weightsurgery", *words]
    finished = subprocess.run(command, text=True, check=False, **options)
    if finished.returncode != 0:
        raise DemoError(f"wsurg {words[0]} ended with exit code {finished.returncode}")
    return finished


def run_shown(*arguments: str | Path) -> None:
    """Run a `wsurg` command, its command line printed first.

    Args:
        arguments: What follows `wsurg`.

    Raises:
        DemoError: The command failed.
    """
    _run(*arguments)


def run_json(*arguments: str | Path) -> dict[str, Any]:
    """Run a `wsurg` command with `--json` and give back its report instead of showing it.

    Args:
        arguments: What follows `wsurg`, without `--json`.

    Returns:
        The report.

    Raises:
        DemoError: The command failed, or printed something that is not JSON.
    """
    printed = _run(*arguments, "--json", stdout=subprocess.PIPE).stdout
    try:
        report: dict[str, Any] = json.loads(printed)
    except json.JSONDecodeError as error:
        raise DemoError(f"wsurg {arguments[0]} --json printed no JSON: {error}") from error
    return report


def run_demo(out: Path, *, steps: int) -> Table:
    """Build the pair, run the commands on it, and compare tuned with mixed.

    Args:
        out: Folder for everything: `base`, `tuned`, `mixed`.
        steps: Optimiser steps of the fine-tuning.

    Returns:
        The comparison.

    Raises:
        DemoError: A command failed.
        PairError: The pair cannot be built, or a classifier lacks weights.
    """
    print(f"Fine-tuning MiniLM on movie reviews ({steps} steps), unless it is done", flush=True)
    base, tuned = build_pair(out, steps=steps)
    mixed = out / "mixed"

    run_shown("inspect", tuned)
    run_shown("diff", base, tuned)
    run_shown("mix", base, tuned, "--ratio", str(RATIO), "-o", mixed, "--overwrite")
    run_shown("diff", base, mixed)

    print("\nThe comparisons again, for the numbers of the table")
    drift = {folder: run_json("diff", base, folder)["model"] for folder in (tuned, mixed)}
    mixing = json.loads((mixed / "wsurg-record.json").read_text(encoding="utf-8"))

    held_out = read_examples(out / "heldout.tsv")
    shares = {tuned: "-", mixed: f"{mixing['effective_share']:.2%}"}
    table = Table("model", title=f"Before and after resetting {RATIO:.0%} of the dimensions")
    for heading in ("relative L2 drift", "changed from base", "effective share", "accuracy"):
        table.add_column(heading, justify="right")
    for folder in (tuned, mixed):
        table.add_row(
            folder.name,
            f"{drift[folder]['relative_l2']:.5f}",
            f"{drift[folder]['changed_share']:.2%}",
            shares[folder],
            f"{accuracy(folder, held_out):.3f}",
        )
    return table


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="wsurg-demo",
    show_default=True,
    help="Folder for everything the demo makes.",
)
@click.option("--quick", is_flag=True, help=f"Fine-tune for {QUICK_STEPS} steps only.")
def main(out: Path, quick: bool) -> None:
    """Run inspect, diff and mix on MiniLM and a classifier fine-tuned from it."""
    silence_transformers()
    try:
        table = run_demo(out, steps=QUICK_STEPS if quick else FULL_STEPS)
    except (DemoError, PairError) as error:
        raise click.ClickException(str(error)) from error
    print()
    Console().print(table)
    record = read_record(out)
    print(
        f"Accuracy is on {record['held_out_sentences']} held-out sentences; always guessing the "
        f"more frequent label gives {record['held_out_majority_share']:.3f}."
    )
    if quick:
        print(f"{QUICK_STEPS} steps teach the model little; without --quick it learns the task.")
    print(f"The models are in {out / 'base'}, {out / 'tuned'} and {out / 'mixed'}.")


if __name__ == "__main__":
    main()
