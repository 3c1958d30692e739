"""What experiments have in common: one folder that holds settings, rows of results, and a table.

What is in the folder already is not done again, so a run that was stopped goes on.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from weightsurgery import SettingError

RESULTS = "results.csv"


def check_settings(path: Path, plan: Any) -> None:
    """Note what is done in a folder, or refuse to mix it with what was done there before.

    Args:
        path: The note.
        plan: A dataclass.

    Raises:
        SettingError: The folder holds an experiment of other settings.
    """
    settings = json.loads(json.dumps(asdict(plan)))
    if not path.exists():
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    elif json.loads(path.read_text(encoding="utf-8")) != settings:
        raise SettingError(
            "holds an experiment of other settings", file=path.parent, hint="give another --out"
        )


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a file of results; [] if there is none."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def append_row(path: Path, columns: Sequence[str], row: Mapping[str, Any]) -> None:
    """Add a row to a file of results."""
    is_new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def show_table(out: Path, make_table: Callable[[Sequence[Mapping[str, str]]], str]) -> None:
    """Write `table.md`, and print it.

    Args:
        out: Folder of the experiment.
        make_table: Markdown from the rows of `results.csv`.
    """
    table = make_table(read_rows(out / RESULTS))
    (out / "table.md").write_text(table, encoding="utf-8")
    print(f"\n{table}")
