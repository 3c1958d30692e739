"""What `wsurg purify` can do besides the operator: the Fisher before it, the fine-tuning after."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from weightsurgery.alignment import align_to_edit
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.cli import model_options, options
from weightsurgery.cli.companion import Companion, Given, Inputs
from weightsurgery.curvature.result import length_warnings
from weightsurgery.formats.record import changed_by
from weightsurgery.operators.purify import check as checked
from weightsurgery.report.outcome import outcome_tables
from weightsurgery.report.tables import Table
from weightsurgery.report.training import training_tables
from weightsurgery.training.settings import Hyperparameters

_PARAMETERS: tuple[click.Parameter, ...] = (
    click.Option(
        ["--data"],
        type=click.Path(),
        metavar="FILE",
        help="Clean examples: the Fisher is made from them here, without --fisher.",
    ),
    model_options.POINTS,
    click.Option(
        ["--finetune"],
        is_flag=True,
        help="Fine-tune the purified model on --data before it is written.",
    ),
    model_options.EPOCHS,
    model_options.LEARNING_RATE,
    model_options.MAX_LENGTH,
    *model_options.READING,
    model_options.DEVICE,
)


def _check(context: click.Context) -> dict[str, Any]:
    """Refuse what says nothing or twice the same; settle what wsurg.toml says beside the command.

    Args:
        context: Of the command.

    Returns:
        Parameters that do not count, as None.

    Raises:
        SettingError: A setting of the fine-tuning is out of range.
    """
    given = context.params
    ranked = given["from_mask"] is None and given["score"] in ("fisher", "inverse-fisher")
    idle: dict[str, Any] = {}
    if given["finetune"]:
        if given["data"] is None:
            raise click.UsageError("--finetune needs --data", context)
        if given["dry_run"]:
            raise click.UsageError("--dry-run does not train; leave out --finetune", context)
        _training(given)
    elif given["data"] is not None and not ranked:
        options.refuse_typed(context, ["data"], "is for the Fisher or for --finetune")
        idle["data"] = None
    elif given["data"] is not None and given["fisher"] is not None:
        typed = [options.is_typed(context, name) for name in ("data", "fisher")]
        if typed[0] == typed[1]:
            text = "--fisher and --data exclude each other without --finetune"
            raise click.UsageError(text, context)
        idle["fisher" if typed[0] else "data"] = None  # the other one is only in wsurg.toml
    given = {**given, **idle}
    if not (ranked and given["data"] is not None and given["fisher"] is None):
        options.refuse_typed(context, ["points"], "is for the Fisher that --data makes")
    if not given["finetune"]:
        options.refuse_typed(context, ["epochs", "learning_rate"], "is for --finetune")
    if given["data"] is None:
        reading = [option.name or "" for option in model_options.READING]
        options.refuse_typed(context, ["max_length", *reading, "device"], "is for --data")
    return idle


def _also_used(given: Given) -> tuple[str, ...]:
    """Settings of the operator that serve the fine-tuning too.

    Args:
        given: The command's parameters.
    """
    return ("seed",) if given["finetune"] else ()


def _before(inputs: Inputs, settings: Given, given: Given) -> dict[str, Checkpoint]:
    """The Fisher from --data, where it is needed and not given.

    What can be refused is refused first: settings, data, and a model that cannot be loaded.

    Args:
        inputs: BASE and TUNED.
        settings: The operator's.
        given: The command's parameters.
    """
    if given["data"] is None:
        return {}
    ranked = given["from_mask"] is None and settings["score"] in ("fisher", "inverse-fisher")
    if given["from_mask"] is None:
        chosen = {name: settings[name] for name in ("keep_mismatched", "allow_partial")}
        paired = align_to_edit(*inputs, **chosen)
        names = ("ratio", "epsilon", "embeddings", "embedding", "counts")
        looked_at: dict[str, Any] = {name: settings.get(name) for name in names}
        checked(paired.only(settings["include"], settings["exclude"]), **looked_at)
    model, examples = model_options.prepare(inputs[1], given)
    if given["fisher"] is not None or not ranked:
        return {}
    from weightsurgery.curvature.fisher import fisher

    with model_options.counting() as progress:
        points = {"points": given["points"], "base": inputs[0] if given["points"] > 1 else None}
        return {"fisher": fisher(model, examples, **points, progress=progress)}


def _after(inputs: Inputs, result: Checkpoint, given: Given) -> Checkpoint:
    """The result, fine-tuned if that is asked for.

    Args:
        inputs: BASE and TUNED.
        result: The purified model.
        given: The command's parameters.
    """
    if not given["finetune"]:
        return result
    from weightsurgery.models import with_weights
    from weightsurgery.training.finetune import finetune

    model, examples = model_options.prepare(inputs[1], given)
    reset = {"reset": changed_by(result)}  # the record's own counts will be of both steps
    with model_options.counting() as progress:
        trained = finetune(
            with_weights(model, result),
            examples,
            files=[given["data"]],
            progress=progress,
            **_training(given),
        )
    notes = {**result.notes, **trained.notes}
    if "purify" in notes:
        notes["purify"] = {**notes["purify"], **reset}
    fisher = None if given["fisher"] is None else options.open_one(given["fisher"])
    doubts = length_warnings(fisher, given["max_length"])
    warnings = dict.fromkeys((*result.warnings, *doubts, *trained.notes["training"]["warnings"]))
    return replace(trained, notes=notes, warnings=tuple(warnings))


def _tables(out: str, told: Given) -> list[Table]:
    """What was written, and how the fine-tuning went if there was one."""
    trained = "training" in told["report"]
    return training_tables(out, told) if trained else outcome_tables(out, told)


def _training(given: Given) -> dict[str, Any]:
    """The settings of the fine-tuning.

    Raises:
        SettingError: One is out of range.
    """
    chosen = {name: given[name] for name in ("epochs", "learning_rate", "seed")}
    Hyperparameters(**chosen)
    return chosen


COMPANION = Companion(
    parameters=_PARAMETERS,
    check=_check,
    also_used=_also_used,
    before=_before,
    after=_after,
    tables=_tables,
)
