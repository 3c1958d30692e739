"""What a sweep found: a table, and a picture of the curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weightsurgery.errors import SettingError, shown
from weightsurgery.report.tables import Table, number, share

_SIZE, _DPI = (7.0, 4.2), 150  # inches, dots in one
_CLEAN, _ATTACK = "#0b6e99", "#b5482a"


def sweep_tables(report: Mapping[str, Any]) -> list[Table]:
    """A sweep as a table; the chosen ratio is marked.

    Args:
        report: From `sweep`.
    """
    attacked = report["reference"]["asr"] is not None
    heads = [">accuracy", ">loss", *([">ASR"] if attacked else [])]
    rows = [["tuned", *_cells(report["reference"], attacked), *[""] * len(heads), ""]]
    for row in report["rows"]:
        mark = "chosen" if row["ratio"] == report["chosen"] else ""
        after = _cells(row["after"], attacked) if row["after"] else [""] * len(heads)
        rows.append([f"{row['ratio']:g}", *_cells(row["before"], attacked), *after, mark])
    trained = any(row["after"] for row in report["rows"])
    columns = (">ratio", *heads, *(f"{head}, tuned" for head in heads), "")
    if not trained:
        columns = (">ratio", *heads, "")
        rows = [[*row[: 1 + len(heads)], row[-1]] for row in rows]
    least = report["reference"]["accuracy"]["share"] - report["tolerance"]
    chosen = "none" if report["chosen"] is None else f"{report['chosen']:g}"
    note = f"Chosen: {chosen}, the largest ratio with an accuracy of at least {share(least)}."
    if attacked:
        floor = report["reference"]["floor"]["share"]
        note += f" The tuned model gives {share(floor)} of the untriggered ones the target label."
    title = f"Sweep of {shown(report['tuned'])}"
    return [Table(title, columns, rows, note)]


def _cells(found: Mapping[str, Any], attacked: bool) -> list[str]:
    cells = [share(found["accuracy"]["share"]), number(found["loss"])]
    return [*cells, share(found["asr"]["share"])] if attacked else cells


def plot_sweep(report: Mapping[str, Any], path: str) -> None:
    """Draw accuracy, and ASR where it was measured, over the ratio, with 95 % intervals.

    Args:
        report: From `sweep`.
        path: PNG or any format that matplotlib knows by its ending.

    Raises:
        SettingError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise SettingError(
            "matplotlib is not installed", hint="pip install weightsurgery[report]"
        ) from None
    figure = Figure(figsize=_SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ratios = [row["ratio"] for row in report["rows"]]
    for key, label, colour in (("accuracy", "accuracy", _CLEAN), ("asr", "ASR", _ATTACK)):
        if report["reference"][key] is None:
            continue
        for when, style in (("before", "--"), ("after", "-")):
            found = [row[when] and row[when][key] for row in report["rows"]]
            if all(found):
                name = f"{label}, {'edited' if when == 'before' else 'fine-tuned'}"
                _draw(axes, ratios, found, name, colour, style)
    least = report["reference"]["accuracy"]["share"] - report["tolerance"]
    axes.axhline(least, color=_CLEAN, linewidth=0.8, linestyle=":", label="least accuracy")
    if report["chosen"] is not None:
        axes.axvline(report["chosen"], color="#777777", linewidth=0.8, label="chosen ratio")
    axes.set(xlabel="ratio reset to base", ylabel="share of sentences", ylim=(-0.02, 1.02))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right center", frameon=False, fontsize="small")
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})


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
