"""What `wsurg` says after it wrote a checkpoint, or would write one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightsurgery.errors import counted, shown
from weightsurgery.report.comparison import alignment_tables, coverage_text
from weightsurgery.report.purification import purification_tables
from weightsurgery.report.tables import Table, number, share, size


def plan_tables(plan: Mapping[str, Any], alignment: Mapping[str, Any] | None) -> list[Table]:
    """A plan, as `--dry-run` shows it."""
    counts = ", ".join(f"{count} {status}" for status, count in plan["tensors"].items())
    files = {**plan["files"], **plan["side_files"]}
    known = {name: count for name, count in files.items() if count is not None}
    others = " and ".join(shown(name) for name in files if name not in known)
    rows = [
        ["output", f"{shown(plan['out'])}, {counted(len(files) - 1, 'file')} and the record"],
        *(["file", f"{shown(name)}, {size(count)}"] for name, count in known.items()),
        ["tensors", counts or "none"],
        ["disk", f"{size(sum(known.values()))}, and {others}, of {size(plan['bytes_free'])} free"],
        ["memory", f"about {size(plan['memory'])} at the peak (workers: {plan['workers']})"],
    ]
    return [
        *(alignment_tables(alignment) if alignment else []),
        Table("Plan; nothing was written", ("", ""), rows),
    ]


def outcome_tables(out: str, record: Mapping[str, Any]) -> list[Table]:
    """A record, as a person wants to read it right after the run."""
    settings = record["recipe"].get("settings", {})
    rows = [["output", written(out, record)]]
    asked = [text for name, value in settings.items() if (text := _setting(name, value))]
    if asked:
        rows.append(["asked", ", ".join(asked)])
    rows.append(["tensors", _statuses(record)])
    if record["alignment"] and "coverage" in record["alignment"]:
        rows.append(["coverage", coverage_text(record["alignment"]["coverage"])])
    if record["effective_share"] is not None:
        changed, eligible = record["changed_dimensions"], record["eligible_dimensions"]
        text = f"{number(changed)} of {number(eligible)} eligible dimensions"
        effective = share(record["effective_share"])
        rows.append(["changed", f"{text} (effective share {effective})"])
    before = record["report"].get("purify", {}).get("reset")
    if before:
        reset = counted(before["changed_dimensions"], "dimension")
        rows.append(["reset", f"{reset}, before training"])
    left_out = [[shown(e["file"]), e["reason"]] for e in record["left_out"]]
    warnings = [[shown(warning)] for warning in record["warnings"]]
    alignment = record["alignment"]
    return [
        *(alignment_tables(alignment) if alignment else []),
        *purification_tables(record),
        Table("Files not copied", ("file", "reason"), left_out),
        Table("Warnings", ("",), warnings),
        Table(f"wsurg {record['recipe'].get('operator', 'copy')}", ("", ""), rows),
    ]


def written(out: str, record: Mapping[str, Any]) -> str:
    """The output, how large it is, and in how many files, the record apart."""
    files = record["outputs"].values()
    total = size(sum(entry["size"] for entry in files))
    return f"{shown(out)}, {total} in {counted(len(files), 'file')}, and the record"


def _setting(name: str, value: Any) -> str:
    """A setting that is on, as words; "" for one that is off or empty."""
    words = name.replace("_", "-")
    if name == "ratio":
        return f"ratio {value:g} (reserve {1 - value:g})"
    if isinstance(value, dict):  # token counts
        return f"{words} {shown(value['source'])}"
    if value is None or value is False or value in ("", (), []):
        return ""
    if value is True:
        return words
    several = value if isinstance(value, (tuple, list)) else [value]
    texts = ("=".join(map(str, v)) if isinstance(v, (tuple, list)) else str(v) for v in several)
    return f"{words} {shown(' '.join(texts))}"


def _statuses(record: Mapping[str, Any]) -> str:
    found: dict[str, int] = {}
    for entry in record["tensors"].values():
        found[entry["status"]] = found.get(entry["status"], 0) + 1
    return ", ".join(f"{count} {status}" for status, count in sorted(found.items())) or "none"
