"""`wsurg sweep`."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import click

from weightsurgery.checkpoint import Checkpoint
from weightsurgery.cli import model_options, options
from weightsurgery.datasets.read import label_ids, read_sentences
from weightsurgery.datasets.triggers import Trigger, trigger_sentence, trigger_word
from weightsurgery.errors import PolicyError, StorageError
from weightsurgery.formats import open_checkpoint
from weightsurgery.operators.mix import mix
from weightsurgery.operators.purify import purify
from weightsurgery.report.sweep import plot_sweep, sweep_tables
from weightsurgery.report.tables import show

_RATIOS = "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9"


class Ratios(click.ParamType):  # type: ignore[type-arg]
    """Numbers separated by commas."""

    name = "ratios"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """Parse, with the usual message where that fails."""
        try:
            found = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            found = ()
        if not found or any(not 0 <= ratio <= 1 for ratio in found):
            self.fail(f"'{value}'; expected shares from 0 to 1, such as 0,0.3,0.5", param, ctx)
        return found


def _sweep(base: str, tuned: str, **given: Any) -> None:
    _check_usage(click.get_current_context())
    _check_plot(given["plot"], overwrite=given["overwrite"])
    sentences = read_sentences(given["held_out"])
    poisoned = None if given["poisoned"] is None else read_sentences(given["poisoned"])
    before, fisher = open_checkpoint(base), given["fisher"]
    from weightsurgery.datasets.batches import read_examples
    from weightsurgery.evaluation.classification import check_classifier
    from weightsurgery.evaluation.sweep import sweep
    from weightsurgery.models import load_model

    model = load_model(tuned, device=given["device"])
    check_classifier(model)
    label_ids(sentences, model.labels, file=given["held_out"])
    label_ids(poisoned or [], model.labels, file=given["poisoned"] or "")
    examples = read_examples(model, given["data"], max_length=given["max_length"])
    with model_options.counting() as progress:
        curvature = None if fisher is None else open_checkpoint(fisher)
        if curvature is None and _needs_fisher(given):
            from weightsurgery.curvature.fisher import fisher as estimate

            points = {"points": given["points"], "base": before if given["points"] > 1 else None}
            curvature = estimate(model, examples, **points, progress=progress)
        report = sweep(
            _edit(before, model.checkpoint, curvature, given),
            model,
            examples if given["trains"] else None,
            sentences,
            ratios=given["ratios"],
            tolerance=given["tolerance"],
            training={name: given[name] for name in ("epochs", "learning_rate", "seed")},
            trigger=_trigger(given),
            poisoned=poisoned,
            target_label=given["target_label"],
            max_length=given["max_length"],
            progress=progress,
        )
    if given["plot"] is not None:
        plot_sweep(report, given["plot"])
    if given["as_json"]:
        options.print_json(report)
    else:
        show(sweep_tables(report))


def _needs_fisher(given: dict[str, Any]) -> bool:
    return given["operator"] == "purify" and given["score"] in ("fisher", "inverse-fisher")


def _edit(
    base: Checkpoint, tuned: Checkpoint, fisher: Checkpoint | None, given: dict[str, Any]
) -> Any:
    """Ratio to an edited checkpoint."""
    if given["operator"] == "mix":
        exclude = given["exclude"]
        settings = {"select": given["select"], "seed": given["seed"], "exclude": exclude}
        return lambda ratio: mix(base, tuned, ratio=ratio, **settings)
    counts = options.make_counts(tuned, **{name: given[name] for name in options.COUNTED})
    edit = partial(
        purify,
        base,
        tuned,
        fisher=fisher,
        score=given["score"],
        embeddings=given["embeddings"],
        scope=given["scope"],
        seed=given["seed"],
        counts=counts,
        exclude=given["exclude"],
    )
    return lambda ratio: edit(ratio=ratio)


def _trigger(given: dict[str, Any]) -> Trigger | None:
    if given["trigger_word"] is not None:
        return trigger_word(given["trigger_word"], seed=given["seed"])
    if given["trigger_sentence"] is not None:
        return trigger_sentence(given["trigger_sentence"], seed=given["seed"])
    return None


def _check_usage(context: click.Context) -> None:
    given = context.params
    attacks = ("trigger_word", "trigger_sentence", "poisoned")
    flags = ["--" + name.replace("_", "-") for name in attacks if given[name] is not None]
    if len(flags) > 1:
        raise click.UsageError(f"{' and '.join(flags)} exclude each other", context)
    if bool(flags) != (given["target_label"] is not None):
        raise click.UsageError(
            "an attack is measured with --target-label and one of --trigger-word, "
            "--trigger-sentence and --poisoned",
            context,
        )
    sources = [name for name in options.COUNTED if given[name]]
    if len(sources) > 1:
        raise click.UsageError("give one of --counts, --corpus and --wordfreq", context)
    only = {"mix": ("select",), "purify": ("score", "embeddings", "scope", "fisher", "points")}
    for operator, names in only.items():
        for name in names if operator != given["operator"] else ():
            if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
                raise click.UsageError(f"--{name} is for --operator {operator}", context)


def _check_plot(path: str | None, *, overwrite: bool) -> None:
    if path is None:
        return
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise StorageError("the folder to write to does not exist", file=folder)
    if os.path.lexists(path) and not overwrite:
        raise PolicyError("exists already", file=path, hint="--overwrite replaces it")


command = options.Command(
    "sweep",
    callback=_sweep,
    help="""Measure every ratio, before and after fine-tuning, and choose one.

    For each ratio TUNED is purified (or mixed), measured on held-out clean sentences, fine-tuned
    on the clean examples, and measured again; with a trigger the attack is measured too. Chosen is
    the largest ratio whose accuracy in the end is within --tolerance of TUNED's. Nothing is
    written but --plot: run `wsurg purify --ratio R --finetune` with the chosen ratio.

    \b
    Examples:
      wsurg sweep base/ tuned/ --data clean.tsv --held-out dev.tsv
      wsurg sweep base/ tuned/ --data clean.tsv --held-out dev.tsv --plot curve.png
      wsurg sweep base/ tuned/ --data clean.tsv --held-out dev.tsv --operator mix --ratios 0.3,0.5
    """,
    params=[
        click.Argument(["base"], metavar="BASE", type=click.Path()),
        click.Argument(["tuned"], metavar="TUNED", type=click.Path()),
        click.Option(
            ["--data"],
            type=click.Path(),
            required=True,
            metavar="FILE",
            help="Clean examples, for the Fisher and for fine-tuning.",
        ),
        click.Option(
            ["--held-out"],
            type=click.Path(),
            required=True,
            metavar="FILE",
            help="Other clean sentences, to measure on.",
        ),
        click.Option(
            ["--ratios"],
            type=Ratios(),
            default=_RATIOS,
            show_default=True,
            metavar="R,R,…",
            help="Shares to reset.",
        ),
        click.Option(
            ["--tolerance"],
            type=click.FloatRange(0, 1),
            default=0.02,
            show_default=True,
            help="Accuracy that may be lost.",
        ),
        click.Option(
            ["--operator"],
            type=click.Choice(["purify", "mix"]),
            default="purify",
            show_default=True,
            help="What resets the dimensions.",
        ),
        click.Option(
            ["--score"],
            type=click.Choice(["fisher", "drift", "inverse-fisher", "random"]),
            default="fisher",
            show_default=True,
            help="What purify ranks by.",
        ),
        click.Option(
            ["--select"],
            type=click.Choice(["random", "drift"]),
            default="random",
            show_default=True,
            help="What mix resets: random dimensions, or those of smallest drift.",
        ),
        click.Option(
            ["--embeddings"],
            type=click.Choice(["keep", "pool", "epur", "reset"]),
            default="keep",
            show_default=True,
            help="What becomes of the word embeddings in purify.",
        ),
        click.Option(
            ["--scope"],
            type=click.Choice(["global", "tensor"]),
            default="global",
            show_default=True,
            help="Rank over the whole model, or in each tensor.",
        ),
        click.Option(
            ["--fisher"],
            type=click.Path(),
            metavar="PATH",
            help="The Fisher; made from --data without it.",
        ),
        click.Option(
            ["--points"],
            type=click.IntRange(1),
            default=1,
            show_default=True,
            help="Average the Fisher over so many points between BASE and TUNED.",
        ),
        *options.COUNTS,
        click.Option(
            ["--exclude"],
            multiple=True,
            metavar="GLOB",
            help="Do not edit tensors whose name matches GLOB; repeatable.",
        ),
        click.Option(
            ["--finetune/--no-finetune", "trains"],
            default=True,
            show_default=True,
            help="Whether to fine-tune at each ratio.",
        ),
        click.Option(
            ["--epochs"],
            type=click.IntRange(1),
            default=20,
            show_default=True,
            help="Of fine-tuning.",
        ),
        click.Option(
            ["--learning-rate"],
            type=float,
            default=5e-5,
            show_default=True,
            help="Of fine-tuning's first step.",
        ),
        click.Option(["--trigger-word"], metavar="WORD", help="Measure this word's attack."),
        click.Option(["--trigger-sentence"], metavar="TEXT", help="Measure this sentence's."),
        click.Option(
            ["--poisoned"],
            type=click.Path(),
            metavar="FILE",
            help="Sentences that have the trigger in them.",
        ),
        click.Option(["--target-label"], metavar="LABEL", help="The attack's label."),
        click.Option(
            ["--seed"],
            type=int,
            default=0,
            show_default=True,
            help="Of masks, trigger places and fine-tuning.",
        ),
        click.Option(
            ["--plot"], type=click.Path(), metavar="OUT", help="Draw the curve into this file."
        ),
        click.Option(["--overwrite"], is_flag=True, help="Replace --plot's OUT if it exists."),
        model_options.MAX_LENGTH,
        model_options.DEVICE,
        options.JSON,
    ],
)
