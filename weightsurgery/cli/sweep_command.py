"""`wsurg sweep`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

import weightsurgery.operators
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.cli import attack_options, model_options, options
from weightsurgery.cli.companion import companion_of
from weightsurgery.cli.operator_command import (
    check_usage,
    make_options,
    make_path_option,
    read_settings,
)
from weightsurgery.datasets.labels import ids_of, settle_labels
from weightsurgery.datasets.read import read_sentences
from weightsurgery.errors import PolicyError, StorageError
from weightsurgery.registry import OPERATORS, Operator
from weightsurgery.report.sweep import check_plot_path, plot_sweep, sweep_tables
from weightsurgery.stream import Engine
from weightsurgery.training.settings import Hyperparameters

_RATIOS = "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9"
_SWEPT = {name: one for name, one in OPERATORS.items() if "ratio" in one.settings}
_MASKED = ("ratio", "from_mask", "invert")  # a mask has one ratio, its own


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
    context = click.get_current_context()
    operator = _SWEPT[given["operator"]]
    given = {
        **given,
        "tuned": tuned,
        "from_mask": None,
        "invert": False,
        "ratio": given["ratios"][0],
    }
    _check_usage(context, operator, given)
    _check_plot(given["plot"], overwrite=given["overwrite"])
    training = {name: given[name] for name in ("epochs", "learning_rate", "seed")}
    Hyperparameters(**training)
    columns = {name: given[name] for name in ("text_column", "label_column")}
    sentences = read_sentences(given["held_out"], **columns, note=options.note)
    poisoned = given["poisoned"]
    if poisoned is not None:
        poisoned = read_sentences(poisoned, **columns, note=options.note)
    inputs = options.open_all((base, tuned), given["weights"])
    settings = read_settings(context, operator, given, inputs[1])
    from weightsurgery.evaluation.classification import check_classifier, target_of
    from weightsurgery.evaluation.sweep import overlap_warning, sweep

    model, examples = model_options.prepare(inputs[1], given)
    check_classifier(model)
    kind = given["label_kind"]
    labels = settle_labels(
        sentences, model.labels, file=given["held_out"], label_kind=kind, note=options.note
    )
    ids_of(sentences, labels, file=given["held_out"])
    ids_of(poisoned or [], labels, file=given["poisoned"] or "")
    if given["target_label"] is not None:
        target_of(labels, given["target_label"])
    edit = _edit(operator, inputs, settings, given)
    with model_options.counting("steps") as progress:
        report = sweep(
            edit,
            model,
            examples if given["trains"] else None,
            sentences,
            ratios=given["ratios"],
            tolerance=given["tolerance"],
            training=training,
            trigger=attack_options.triggers_of(given),
            poisoned=poisoned,
            target_label=given["target_label"],
            label_kind=kind,
            max_length=given["max_length"],
            progress=progress,
        )
    if not given["trains"]:  # `sweep` saw no examples, but the Fisher is made from them
        overlap = overlap_warning(model, examples, sentences, given["max_length"])
        report["warnings"] = [*overlap, *report["warnings"]]
    options.warn(report["warnings"])
    options.present(report, lambda: sweep_tables(report), as_json=given["as_json"])
    if given["plot"] is not None:
        plot_sweep(report, given["plot"])


def _edit(
    operator: Operator,
    inputs: Sequence[Checkpoint],
    settings: dict[str, Any],
    given: Mapping[str, Any],
) -> Callable[[float], Checkpoint]:
    """Ratio to an edited checkpoint; what does not depend on the ratio is computed once."""
    companion = companion_of(operator.name)
    further: dict[str, Any] = {
        n: options.open_one(given[n]) for n in operator.optional if given.get(n) is not None
    }
    further |= companion.before(inputs, settings, given)
    if "engine" in inspect.signature(operator.function).parameters:
        further["engine"] = Engine(kept={})
    fixed = {n: value for n, value in settings.items() if n != "ratio"}
    operator.function(*inputs, ratio=given["ratio"], **fixed, **further)  # refuses before any work
    return lambda ratio: operator.function(*inputs, ratio=ratio, **fixed, **further)


def _check_usage(context: click.Context, operator: Operator, given: dict[str, Any]) -> None:
    """Refuse what does not go together, and what was typed and would do nothing."""
    attack_options.check(context)
    for other in _SWEPT.values():
        for name in {**other.optional, **other.settings}:
            if name not in {**operator.optional, **operator.settings}:
                names = options.COUNTED if name == "counts" else [name]
                typable = [n for n in names if n in context.params]
                options.refuse_typed(context, typable, f"is for --operator {other.name}")
    used = ("seed",) if given["trains"] or attack_options.triggers_of(given) else ()
    check_usage(context, operator, given, used)
    if given["plot"] is None:
        options.refuse_typed(context, ["overwrite"], "is for --plot")
    if not given["trains"]:
        options.refuse_typed(context, ["epochs", "learning_rate"], "is for --finetune")
    if "fisher" not in operator.optional or given["fisher"] or operator.idle("fisher", given):
        options.refuse_typed(context, ["points"], "is for the Fisher that --data makes")


def _check_plot(path: str | None, *, overwrite: bool) -> None:
    if path is None:
        return
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        reason = "the folder to write to does not exist"
        raise StorageError(reason, file=folder, code="E-OUTPUT-FOLDER")
    if os.path.lexists(path) and not overwrite:
        hint = "--overwrite replaces it"
        raise PolicyError("exists already", file=path, hint=hint, code="E-OUTPUT-EXISTS")
    check_plot_path(path)  # last: it imports matplotlib


def _operator_options() -> list[click.Parameter]:
    """The options of all operators that have a ratio, each once."""
    found: dict[str, list[click.Parameter]] = {}
    for one in _SWEPT.values():
        for name, declaration in one.optional.items():
            found.setdefault(name, [make_path_option(name, declaration)])
        for name, (kind, declaration, default) in one.settings.items():
            found.setdefault(name, make_options(name, kind, declaration, default))
    del found["seed"]  # told below: it serves the fine-tuning too
    return [option for name, made in found.items() if name not in _MASKED for option in made]


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
      wsurg sweep base/ tuned/ --data clean.tsv --held-out dev.tsv \\
          --plot curve.png
      wsurg sweep base/ tuned/ --data clean.tsv --held-out dev.tsv \\
          --operator mix --ratios 0.3,0.5
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
            type=click.Choice(list(_SWEPT)),
            default="purify",
            show_default=True,
            help="What resets the dimensions; its options are here too.",
        ),
        *_operator_options(),
        model_options.POINTS,
        click.Option(
            ["--finetune/--no-finetune", "trains"],
            default=True,
            show_default=True,
            help="Whether to fine-tune at each ratio.",
        ),
        model_options.EPOCHS,
        model_options.LEARNING_RATE,
        *(option for option in model_options.READING if option is not model_options.TEMPLATE_ARGS),
        *attack_options.OPTIONS,
        click.Option(
            ["--seed"],
            type=int,
            default=0,
            show_default=True,
            help="Of masks, trigger places and fine-tuning.",
        ),
        click.Option(
            ["--plot"],
            type=click.Path(),
            metavar="OUT",
            help="Draw the curve into this file (.png, .svg, .pdf).",
        ),
        click.Option(["--overwrite"], is_flag=True, help="Replace --plot's OUT if it exists."),
        model_options.MAX_LENGTH,
        options.WEIGHTS,
        model_options.DEVICE,
        options.JSON,
    ],
)

assert weightsurgery.operators  # noqa: S101  imported for what it registers
