"""Print which models the law holds for: `python -m tests.law_table [ARCHITECTURE ...]`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.architectures import ARCHITECTURES
from tests.law import CHECKS, Verdict, judge
from tests.stored import SAME_NAMES, WAYS, Unstorable, Zoo

CASES = ("saved/tuned", *(f"{way}/{side}" for way in WAYS[1:] for side in ("tuned", "base")))
_MARK = {"pass": "·", "fail": "X", "error": "E", "skip": "-"}


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.law_table", description=__doc__)
    parser.add_argument("architecture", nargs="*", help="Substrings of architecture names.")
    parser.add_argument("--exact", action="store_true", help="Match whole architecture names.")
    parser.add_argument("--way", action="append", help=f"Ways of storing, of {', '.join(CASES)}.")
    parser.add_argument("--json", type=Path, help="Write every verdict to this file.")
    parser.add_argument("--fast", action="store_true", help="Only a few cheap architectures.")
    parser.add_argument("--failures", type=int, default=40, help="Number of failures to describe.")
    return parser.parse_args(arguments)


def _selected(options: argparse.Namespace) -> list[str]:
    def wanted(name: str) -> bool:
        if options.fast and not ARCHITECTURES[name].fast:
            return False
        parts = options.architecture
        return not parts or any(p == name if options.exact else p in name for p in parts)

    return [name for name in ARCHITECTURES if wanted(name)]


def _judged(zoo: Zoo, name: str, case: str) -> dict[str, Any]:
    way, side = case.split("/")
    began = time.perf_counter()
    row: dict[str, Any] = {"architecture": name, "case": case, "status": "judged", "reason": ""}
    verdicts: list[Verdict] = []
    try:
        verdicts = list(judge(zoo, name, way, side))
    except Unstorable as error:
        row |= {"status": "not storable", "reason": " ".join(str(error).split())}
    except Exception as error:
        row |= {"status": "not built", "reason": f"{type(error).__name__}: {error}"}
    row["verdicts"] = [asdict(verdict) for verdict in verdicts]
    row["holds"] = bool(verdicts) and all(verdict.holds for verdict in verdicts)
    return {**row, "seconds": round(time.perf_counter() - began, 3)}


def _cell(row: dict[str, Any]) -> str:
    if row["status"] != "judged":
        return "none" if row["status"] == "not storable" else "ERROR"
    return "".join(_MARK[verdict["status"]] for verdict in row["verdicts"])


def _counts(rows: list[dict[str, Any]], case: str) -> str:
    mine = [row for row in rows if row["case"] == case and row["status"] == "judged"]
    parts = []
    for check in CHECKS:
        told = [v["status"] for row in mine for v in row["verdicts"] if v["check"] == check]
        judged = [status for status in told if status != "skip"]
        if judged:
            parts.append(f"{check} {judged.count('pass')}/{len(judged)}")
    whole = sum(row["holds"] for row in mine)
    return f"{case:15} all {whole}/{len(mine)}; " + ", ".join(parts)


def _summary(rows: list[dict[str, Any]]) -> str:
    ratio = [v for row in rows for v in row["verdicts"] if v["check"] == "ratio 1"]
    right = sum(verdict["status"] == "pass" for verdict in ratio)
    return f"{right} of {len(ratio)} loaded models are BASE"


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge, print, and return 0 if the law holds everywhere."""
    options = _options(arguments)
    names, cases = _selected(options), options.way or CASES
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    print(f"each cell: {', '.join(CHECKS)}; · pass, X wrong, E error, - does not apply")
    print(f"{'':24}" + " ".join(f"{case:>13}" for case in cases))
    root = Path(tempfile.mkdtemp(prefix="law-"))
    try:
        zoo = Zoo(root)
        for name in names:
            mine = [_judged(zoo, name, case) for case in cases]
            rows += mine
            print(f"{name:24}" + " ".join(f"{_cell(row):>13}" for row in mine), flush=True)
            zoo.forget(name)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    _report(rows, cases, options)
    return 0 if all(row["holds"] or row["status"] == "not storable" for row in rows) else 1


def _report(rows: list[dict[str, Any]], cases: Sequence[str], options: argparse.Namespace) -> None:
    print()
    for row in rows:
        if row["status"] == "not storable" and row["reason"] != SAME_NAMES:
            print(f"not stored: {row['architecture']} {row['case']}: {row['reason'][:200]}")
        if row["status"] == "not built":
            print(f"NOT BUILT: {row['architecture']} {row['case']}: {row['reason'][:200]}")
    print()
    wrong = [
        f"{row['architecture']} {row['case']} {verdict['check']}: {verdict['detail'][:300]}"
        for row in rows
        for verdict in row["verdicts"]
        if verdict["status"] in ("fail", "error")
    ]
    print("\n".join(wrong[: options.failures]))
    if len(wrong) > options.failures:
        print(f"and {len(wrong) - options.failures} more")
    print()
    for case in cases:
        print(_counts(rows, case))
    print(_summary(rows))
    if options.json:
        options.json.write_text(json.dumps({"summary": _summary(rows), "rows": rows}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
