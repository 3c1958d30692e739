"""What a fine-tuning did, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightsurgery.report.outcome import outcome_tables
from weightsurgery.report.tables import Table, number, share

_PARTS = {"train": "training", "held_out": "held-out"}
_DATA = ("train_examples", "train_sha256", "held_out_examples", "held_out_sha256", "files")


def training_tables(out: str, record: Mapping[str, Any]) -> list[Table]:
    """Losses and accuracies before and after, and what was written."""
    report = record["report"]["training"]
    recipe = record["recipe"]
    settings = {n: value for n, value in recipe["settings"].items() if n not in _DATA}
    note = f"{report['epochs']} of {settings['epochs']} epochs, {report['steps']} steps"
    if report["best_epoch"] != report["epochs"]:
        note += f"; the weights are those of epoch {report['best_epoch']}, the best held-out loss"
    return [
        *outcome_tables(out, {**record, "recipe": {**recipe, "settings": settings}}),
        Table("Training", ("", ">examples", ">before", ">after"), _rows(report), note=note),
    ]


def planned_tables(examples: Mapping[str, int], steps: int) -> list[Table]:
    """What `--dry-run` shows beside the plan of the files."""
    rows = [[f"{_PARTS[part]} examples", number(count)] for part, count in examples.items()]
    return [Table("Training", ("", ">"), [*rows, ["steps", number(steps)]])]


def planned_adapter_tables(trainings: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """What `--dry-run` shows of trainings of adapters, each under its name.

    Args:
        trainings: Name, "" for the only one, to what `plan_adapter` tells.
    """
    tables = []
    for name, plan in trainings.items():
        steps = number(plan["steps"])
        if plan["done"]:
            steps += f", of which a checkpoint has {number(plan['done'])}"
        rows = [
            ["examples", f"{number(plan['examples'])}, {number(plan['tokens'])} tokens"],
            ["steps", steps],
            ["trained", f"{number(plan['parameters'])} parameters, in {plan['layers']:,} layers"],
        ]
        tables.append(Table(f"Training: {name}" if name else "Training", ("", ""), rows))
    return tables


def _rows(report: Mapping[str, Any]) -> list[list[str]]:
    before, after = report["before"], report["after"]
    rows = []
    for part, count in report["examples"].items():
        losses = [number(found[part]["loss"]) for found in (before, after)]
        measured = before[part]["examples"]
        cell = number(count) if measured == count else f"{number(measured)} of {number(count)}"
        rows.append([f"{_PARTS[part]} loss", cell, *losses])
        if before[part]["accuracy"] is not None:
            shares = [share(found[part]["accuracy"]["share"]) for found in (before, after)]
            rows.append([f"{_PARTS[part]} accuracy", cell, *shares])
    return rows


def adapter_tables(out: str, record: Mapping[str, Any]) -> list[Table]:
    """What was trained, and what was written."""
    recipe, report = record["recipe"], record["report"]["training"]
    settings = {n: v for n, v in recipe["settings"].items() if n not in _DATA}
    settings.pop("examples_sha256")
    counts = f"{number(report['examples'])} examples, {number(report['tokens'])} tokens"
    return [
        *outcome_tables(out, {**record, "recipe": {**recipe, "settings": settings}}),
        Table(
            "Training",
            (">epoch", ">mean loss"),
            _epochs(report),
            note=f"{counts}, {number(report['steps'])} steps",
        ),
    ]


def _epochs(report: Mapping[str, Any]) -> list[list[str]]:
    return [[number(entry["epoch"]), number(entry["train_loss"])] for entry in report["history"]]


def meraser_tables(out: str, record: Mapping[str, Any]) -> list[Table]:
    """What was trained and measured, and what was written."""
    report = record["report"]["meraser"]
    trainings = [
        [
            phase,
            number(found["examples"]),
            number(found["tokens"]),
            number(found["steps"]),
            *(number(found["history"][place]["train_loss"]) for place in (0, -1)),
        ]
        for phase, found in report["trainings"].items()
    ]
    asked = record["recipe"]["settings"]
    settings = {name: asked[name] for name in ("scale", "scales", "transfer_from")}
    recipe = {**record["recipe"], "operator": "meraser", "settings": settings}
    return [
        *outcome_tables(out, {**record, "recipe": recipe}),
        Table(
            "Trainings",
            ("", ">examples", ">tokens", ">steps", ">first epoch's loss", ">last epoch's"),
            trainings,
        ),
        Table(
            "Measured",
            ("stage", ">scale", ">fingerprints said", ">95 % interval", ">perplexity"),
            [_stage(entry) for entry in report["stages"]],
            note=f"the erasing adapter was folded in at scale {report['scale']:g}",
        ),
    ]


def _stage(entry: Mapping[str, Any]) -> list[str]:
    said, text = entry.get("fsr"), entry.get("perplexity")
    shares = ["-", "-"]
    if said is not None:
        shares = [share(said["share"]), f"{100 * said['low']:.2f} to {100 * said['high']:.2f}"]
    scale = entry.get("scale")
    return [
        entry["stage"],
        "-" if scale is None else f"{scale:g}",
        *shares,
        "-" if text is None else number(text["perplexity"]),
    ]
