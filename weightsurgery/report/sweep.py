"""What a sweep found: a table, and a picture of the curve."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

from weightsurgery.errors import SettingError, not_installed, shown
from weightsurgery.formats.output import write_file
from weightsurgery.report.tables import Table, number, share

_SIZE, _DPI = (7.0, 4.2), 150  # inches, dots in one
_CLEAN, _ATTACK = "#0b6e99", "#b5482a"
# What matplotlib would write of its own accord that changes from day to day or with its version.
_FORMATS: dict[str, dict[str, None]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}


def sweep_tables(report: Mapping[str, Any]) -> list[Table]:
    """A sweep as a table; the chosen ratio is marked.

    Args:
        report: From `sweep`.
    """
    reference, rows = report["reference"], report["rows"]
    trained = any(row["after"] for row in rows)
    shares = ["accuracy", *(key for key in ("asr", "bacc") if reference[key] is not None)]
    times = ["before", "after"] if trained else ["before"]

    def cells(row: Mapping[str, Any]) -> list[str]:
        found = [row[when] or {} for when in times]
        told = [share(one[key]["share"]) if one else "" for one in found for key in shares]
        return [*told, row.get("mark", ""), *(number(one["loss"]) if one else "" for one in found)]

    table = [["tuned", *cells({"before": reference, "after": None})]]
    for row in rows:
        mark = "chosen" if row["ratio"] == report["chosen"] else ""
        table.append([f"{row['ratio']:g}", *cells({**row, "mark": mark})])
    names = [_NAMES.get(key, key) for key in shares]
    heads = [f">{name}{_WHEN[when] if trained else ''}" for when in times for name in names]
    losses = [f">loss{_WHEN[when] if trained else ''}" for when in times]
    return [
        Table(
            f"Sweep of {shown(report['tuned'])}",
            (">ratio", *heads, "", *losses),
            table,
            _note(report),
            optional=len(losses),
        )
    ]


_NAMES = {"asr": "ASR", "bacc": "BACC"}
_WHEN = {"before": " before", "after": " after"}


def _note(report: Mapping[str, Any]) -> str:
    """What is chosen and why, and how sure tuned's accuracy is."""
    accuracy, floor = report["reference"]["accuracy"], report["reference"]["floor"]
    chosen = "none" if report["chosen"] is None else f"{report['chosen']:g}"
    least = share(accuracy["share"] - report["tolerance"])
    between = f"{share(accuracy['low'])} to {share(accuracy['high'])}"
    lines = [
        f"Chosen: {chosen}, the largest ratio with an accuracy of at least {least}.",
        f"On {accuracy['of']:,} held-out sentences the 95 % interval of tuned's is {between}.",
    ]
    if any(row["after"] for row in report["rows"]):
        lines.append("Before and after: fine-tuning on the clean examples.")
    if floor is not None:  # without held-out sentences of other labels there is none
        lines.append(f"Floor: tuned gives {share(floor['share'])} the target without the trigger.")
    return "\n".join(lines)


def check_plot_path(path: str | os.PathLike[str]) -> None:
    """Refuse a picture that cannot be drawn, before the work that is to be drawn.

    Args:
        path: Where it is to go; its ending says the format.

    Raises:
        SettingError: The ending is none of .png, .svg and .pdf, or matplotlib is not installed.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending not in _FORMATS:
        raise SettingError(
            f"'{shown(ending)}' is no kind of picture; expected {', '.join(_FORMATS)}",
            file=path,
            hint="give the file one of these endings",
            code="E-OUTPUT-NAME",
        )
    try:
        import matplotlib.figure  # noqa: F401  # what `plot_sweep` needs
    except ImportError:
        raise not_installed("matplotlib", "report") from None


def plot_sweep(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw accuracy, and ASR where it was measured, over the ratio, with 95 % intervals.

    The same report gives the same bytes, by one version of matplotlib.

    Args:
        report: From `sweep`.
        path: Ends in .png, .svg or .pdf.

    Raises:
        SettingError: It has another ending, or matplotlib is not installed.
        StorageError: It cannot be written.
    """
    check_plot_path(path)
    import matplotlib

    figure = _figure(report)
    ending = os.path.splitext(path)[1].lower()
    drawn = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "wsurg"}):  # else names in the file are random
        figure.savefig(drawn, format=ending[1:], dpi=_DPI, metadata=_FORMATS[ending])
    write_file(os.fspath(path), drawn.getvalue())


def _figure(report: Mapping[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    ratios = [row["ratio"] for row in report["rows"]]
    trained = any(row["after"] for row in report["rows"])
    for key, label, colour in (("accuracy", "accuracy", _CLEAN), ("asr", "ASR", _ATTACK)):
        if report["reference"][key] is None:
            continue
        for when, style in (("before", "--"), ("after", "-")):
            found = [row[when] and row[when][key] for row in report["rows"]]
            if all(found):
                name = f"{label} {when} fine-tuning" if trained else label
                _draw(axes, ratios, found, name, colour, style)
    least = report["reference"]["accuracy"]["share"] - report["tolerance"]
    axes.axhline(least, color=_CLEAN, linewidth=0.8, linestyle=":", label="least accuracy allowed")
    if report["chosen"] is not None:
        axes.axvline(report["chosen"], color="#777777", linewidth=0.8, label="chosen ratio")
    floor = report["reference"]["floor"]
    if floor is not None:
        name = "floor of the ASR, tuned"
        axes.axhline(floor["share"], color=_ATTACK, linewidth=0.8, linestyle=":", label=name)
    count = report["reference"]["accuracy"]["of"]
    axes.set_title(
        f"{shown(report['tuned'])}, {count:,} held-out sentences, 95 % intervals", fontsize=10
    )
    axes.set(xlabel="ratio reset to base", ylabel="share of sentences", ylim=(-0.02, 1.02))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right center", frameon=False, fontsize="small")
    return figure


def _draw(
    axes: Any,
    ratios: Sequence[float],
    found: Sequence[Mapping[str, float]],
    label: str,
    colour: str,
    style: str,
) -> None:
    axes.plot(ratios, [f["share"] for f in found], style, color=colour, marker=".", label=label)
    low, high = ([f[end] for f in found] for end in ("low", "high"))
    axes.fill_between(ratios, low, high, color=colour, alpha=0.12, linewidth=0)
