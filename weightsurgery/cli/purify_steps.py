"""What `wsurg purify` can do besides the operator: the Fisher before it, the fine-tuning after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from weightsurgery.checkpoint import Checkpoint
from weightsurgery.cli import model_options

if TYPE_CHECKING:
    from weightsurgery.models import Model

PARAMETERS: tuple[click.Parameter, ...] = (
    click.Option(
        ["--data"],
        type=click.Path(),
        metavar="FILE",
        help="Clean examples: the Fisher is made from them here, without --fisher.",
    ),
    click.Option(
        ["--points"],
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="For --data: average the Fisher over so many points between BASE and TUNED.",
    ),
    click.Option(
        ["--finetune"],
        is_flag=True,
        help="Fine-tune the purified model on --data before it is written.",
    ),
    click.Option(
        ["--epochs"],
        type=click.IntRange(1),
        default=20,
        show_default=True,
        help="For --finetune: passes over the examples.",
    ),
    click.Option(
        ["--learning-rate"],
        type=float,
        default=5e-5,
        show_default=True,
        help="For --finetune: of the first step.",
    ),
    model_options.MAX_LENGTH,
    model_options.DEVICE,
)


def check(context: click.Context) -> None:
    """Refuse what says nothing or twice the same.

    Args:
        context: Of the command.
    """
    given = context.params
    wants_fisher = given["score"] in ("fisher", "inverse-fisher") and given["from_mask"] is None
    if given["finetune"] and given["data"] is None:
        raise click.UsageError("--finetune needs --data", context)
    if given["finetune"] and given["dry_run"]:
        raise click.UsageError("--dry-run does not train; leave out --finetune", context)
    if given["data"] is None or given["finetune"]:
        return
    if given["fisher"] is not None:
        raise click.UsageError("--fisher and --data exclude each other without --finetune", context)
    if not wants_fisher:
        raise click.UsageError("--data is for the Fisher or for --finetune", context)


def before(inputs: Sequence[Checkpoint], given: Mapping[str, Any]) -> dict[str, Checkpoint]:
    """The Fisher from --data, where it is needed and not given.

    Args:
        inputs: BASE and TUNED.
        given: The command's parameters.
    """
    ranked = given["from_mask"] is None and given["score"] in ("fisher", "inverse-fisher")
    if given["data"] is None or given["fisher"] is not None or not ranked:
        return {}
    from weightsurgery.curvature.fisher import fisher
    from weightsurgery.datasets.batches import read_examples

    model = _model(given["tuned"], given["device"])
    examples = read_examples(model, given["data"], max_length=given["max_length"])
    with model_options.counting() as progress:
        points = {"points": given["points"], "base": inputs[0] if given["points"] > 1 else None}
        return {"fisher": fisher(model, examples, **points, progress=progress)}


def after(result: Checkpoint, given: Mapping[str, Any]) -> Checkpoint:
    """The result, fine-tuned if that is asked for.

    Args:
        result: The purified model.
        given: The command's parameters.
    """
    if not given["finetune"]:
        return result
    from weightsurgery.datasets.batches import read_examples
    from weightsurgery.models import with_weights
    from weightsurgery.training.finetune import finetune

    model = with_weights(_model(given["tuned"], given["device"]), result)
    examples = read_examples(model, given["data"], max_length=given["max_length"])
    settings = {name: given[name] for name in ("epochs", "learning_rate", "seed")}
    with model_options.counting() as progress:
        trained = finetune(model, examples, files=[given["data"]], progress=progress, **settings)
    return replace(trained, notes={**result.notes, **trained.notes})


def _model(path: str, device: str) -> Model:
    """TUNED as a model, loaded once in a run."""
    from weightsurgery.models import load_model

    loaded = click.get_current_context().meta
    if __name__ not in loaded:
        loaded[__name__] = load_model(path, device=device)
    model: Model = loaded[__name__]
    return model
