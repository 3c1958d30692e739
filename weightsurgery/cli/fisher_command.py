"""`wsurg fisher`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from weightsurgery.checkpoint import Checkpoint, Step
from weightsurgery.cli import model_options, options
from weightsurgery.dtypes import DTYPES
from weightsurgery.errors import shown
from weightsurgery.formats import save
from weightsurgery.formats.destination import check_outputs_apart
from weightsurgery.formats.plan import make_plan
from weightsurgery.report.curvature import curvature_tables
from weightsurgery.report.tables import show
from weightsurgery.stream import Engine

_ONLY_FOR = {
    "fisher": ("labels", "points", "base", "standard_error"),
    "hutchinson": ("samples", "negative"),
}


def _fisher(
    model: str,
    data: str,
    out: str,
    standard_error: str | None,
    overwrite: bool,
    max_length: int,
    weights: str | None,
    hashes: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    context = click.get_current_context()
    _check_usage(context)
    paths = [model] if settings["base"] is None else [model, settings["base"]]
    read, *others = options.open_all(paths, weights)
    base = others[0] if others else None
    outputs = [path for path in (out, standard_error) if path is not None]
    _check_outputs(read, base, outputs, overwrite=overwrite)
    from weightsurgery.curvature.result import summarise
    from weightsurgery.datasets.batches import read_examples

    opened = model_options.load(read, settings)
    told = model_options.reading(opened.task, settings)
    examples = read_examples(opened, data, max_length=max_length, **told)
    with model_options.counting() as progress:
        given = {**settings, "base": base, "progress": progress}
        made = _estimates(opened, examples, given, standard_error=standard_error is not None)
    for path, estimate in zip(outputs, made, strict=True):
        record = save(estimate, path, overwrite=overwrite, hashes=hashes)
        if path == out:
            first = record
    options.warn(list(made[0].warnings))
    summary = summarise(made[0])
    if as_json:
        document = {"schema": "wsurg.fisher/1", "out": out, "standard_error": standard_error}
        options.print_json({**document, **summary, "record": first})
        return
    show(curvature_tables(out, summary))
    if standard_error is not None:
        click.echo(f"the standard error is in {shown(standard_error)}", err=True)


def _estimates(
    model: Any, examples: Any, given: dict[str, Any], *, standard_error: bool
) -> tuple[Checkpoint, ...]:
    from weightsurgery.curvature.fisher import fisher, fisher_with_error
    from weightsurgery.curvature.hutchinson import hutchinson

    shared = {name: given[name] for name in ("batch_size", "seed", "progress")}
    if given["batch_size"] is None:
        del shared["batch_size"]  # each estimator has its own default
    if given["estimator"] == "hutchinson":
        own = {name: given[name] for name in ("samples", "negative")}
        return (hutchinson(model, examples, **own, **shared),)
    own = {name: given[name] for name in ("labels", "points", "base")}
    if standard_error:
        return fisher_with_error(model, examples, **own, **shared)
    return (fisher(model, examples, **own, **shared),)


def _check_usage(context: click.Context) -> None:
    """Refuse what belongs to the other estimator, or says nothing."""
    for other, names in _ONLY_FOR.items():
        if other != context.params["estimator"]:
            options.refuse_typed(context, names, f"is for --estimator {other}")
    if context.params["points"] == 1:
        options.refuse_typed(context, ["base"], "is for --points of 2 or more")
    if context.params["points"] > 1 and context.params["base"] is None:
        raise click.UsageError("--points of 2 or more needs --base", context)


def _check_outputs(
    checkpoint: Checkpoint, base: Checkpoint | None, outputs: list[str], *, overwrite: bool
) -> None:
    """Refuse a destination before work begins, by a plan for tensors of the right sizes."""
    views = {name: replace(view, dtype=DTYPES["F32"]) for name, view in checkpoint.items()}
    inputs = {"model": checkpoint} if base is None else {"base": base, "model": checkpoint}
    check_outputs_apart([(out, False) for out in outputs])
    expected = Checkpoint(views, step=Step("fisher", {}, inputs))
    for out in outputs:
        make_plan(expected, out, overwrite=overwrite, engine=Engine())


command = options.Command(
    "fisher",
    callback=_fisher,
    help="""Estimate how much the loss on clean data depends on each weight.

    Writes, in float32 under MODEL's names, the diagonal Fisher information: the mean over the
    examples of the squared gradient of each one's own loss. That is what `wsurg purify --fisher`
    weighs drift by. Data are sentences with labels for a classifier, questions with answers
    (.jsonl) for a causal model; there the loss is the mean over the answer's tokens.

    --estimator hutchinson writes the absolute values of the Hessian's diagonal instead, estimated
    from products with random vectors.

    \b
    Examples:
      wsurg fisher tuned/ --data clean.tsv -o fisher.safetensors
      wsurg fisher tuned/ --data clean.tsv --points 4 --base base/ \\
          -o fisher.safetensors
      wsurg fisher tuned/ --data clean.tsv --estimator hutchinson \\
          -o hessian.safetensors
    """,
    params=[
        model_options.MODEL,
        click.Option(["--data"], required=True, metavar="FILE", help="Clean examples."),
        click.Option(
            ["-o", "--out"], required=True, metavar="OUT", help="Where to write (.safetensors)."
        ),
        click.Option(
            ["--standard-error"],
            metavar="OUT",
            help="Also write the standard error of each number to this .safetensors file.",
        ),
        click.Option(["--overwrite"], is_flag=True, help="Replace outputs that exist."),
        click.Option(
            ["--estimator"],
            type=click.Choice(["fisher", "hutchinson"]),
            default="fisher",
            show_default=True,
            help="Squared gradients, or the Hessian.",
        ),
        click.Option(
            ["--labels"],
            type=click.Choice(["true", "sampled"]),
            default="true",
            show_default=True,
            help="The data's own labels, or labels drawn from the model's prediction.",
        ),
        click.Option(
            ["--points"],
            type=click.IntRange(1),
            default=1,
            show_default=True,
            help="Average over so many points between BASE and MODEL; 1 is MODEL itself.",
        ),
        click.Option(["--base"], metavar="BASE", help="Where the points begin."),
        click.Option(
            ["--samples"],
            type=click.IntRange(1),
            default=10,
            show_default=True,
            help="Random vectors of --estimator hutchinson.",
        ),
        click.Option(
            ["--negative"],
            type=click.Choice(["absolute", "keep"]),
            default="absolute",
            show_default=True,
            help="What to do with the Hessian's negative estimates.",
        ),
        click.Option(
            ["--seed"],
            type=int,
            default=0,
            show_default=True,
            help="Seed of sampled labels and random vectors.",
        ),
        model_options.batch_size(None, "32; 8 for hutchinson"),
        model_options.MAX_LENGTH,
        *model_options.READING,
        options.WEIGHTS,
        model_options.DEVICE,
        options.HASH,
        options.JSON,
    ],
)
command.own = ("base",)  # an input of other commands; here it needs --points
