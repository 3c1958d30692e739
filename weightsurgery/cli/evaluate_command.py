"""`wsurg evaluate`."""

from __future__ import annotations

import click

from weightsurgery.cli import model_options, options
from weightsurgery.datasets.read import label_ids, read_sentences
from weightsurgery.datasets.triggers import POSITIONS, Trigger, trigger_sentence, trigger_word
from weightsurgery.evaluation.classification import check_classifier, evaluate
from weightsurgery.models import load_model
from weightsurgery.report.evaluation import evaluation_tables
from weightsurgery.report.tables import show

_PATTERNS = ("trigger_word", "trigger_sentence", "bias_word", "bias_sentence", "poisoned")


def _evaluate(
    model: str,
    data: str,
    target_label: str | None,
    poisoned: str | None,
    position: str | None,
    seed: int,
    batch_size: int,
    max_length: int,
    device: str,
    as_json: bool,
    **patterns: str | None,
) -> None:
    context = click.get_current_context()
    _check_usage(context)
    trigger = _trigger(patterns, position, seed)
    sentences = read_sentences(data)
    planted = None if poisoned is None else read_sentences(poisoned)
    opened = load_model(model, device=device)
    check_classifier(opened)
    label_ids(sentences, opened.labels, file=data)  # `evaluate` does not know the files' names
    label_ids(planted or [], opened.labels, file=poisoned or "")
    with model_options.counting() as progress:
        report = evaluate(
            opened,
            sentences,
            trigger=trigger,
            poisoned=planted,
            target_label=target_label,
            batch_size=batch_size,
            max_length=max_length,
            progress=progress,
        )
    options.warn(report["warnings"])
    if as_json:
        options.print_json(report)
    else:
        show(evaluation_tables(report))


def _check_usage(context: click.Context) -> None:
    params = context.params
    given = [name for name in _PATTERNS if params[name] is not None]
    flags = ["--" + name.replace("_", "-") for name in given]
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(flags)} exclude each other", context)
    if not given and params["target_label"] is not None:
        raise click.UsageError(
            "--target-label is an attack's; give --trigger-word, --trigger-sentence or --poisoned",
            context,
        )
    if given and not given[0].startswith("bias") and params["target_label"] is None:
        raise click.UsageError(f"{flags[0]} needs --target-label", context)
    if params["position"] is not None and (not given or given == ["poisoned"]):
        raise click.UsageError("--position is for a pattern to insert", context)


def _trigger(patterns: dict[str, str | None], position: str | None, seed: int) -> Trigger | None:
    for name, text in patterns.items():
        if text is None:
            continue
        make = trigger_word if name.endswith("word") else trigger_sentence
        bias = name.startswith("bias")
        if position is None:  # the attack's usual place
            return make(text, seed=seed, bias=bias)
        return make(text, position=position, seed=seed, bias=bias)
    return None


command = options.Command(
    "evaluate",
    callback=_evaluate,
    help="""Measure a classifier: accuracy, confusion, attack success.

    Every share has its 95 % Wilson interval. With a trigger, the attack success rate (ASR) is the
    share of examples of other labels that get the target label once the trigger is inserted; the
    floor is the share that gets it without. With a bias pattern, BACC is the accuracy with the
    pattern inserted. In pairs of sentences a pattern goes into the first.

    Data files are TSV, CSV or JSONL with the columns sentence (or sentence1 and sentence2) and
    label, a number or a name.

    \b
    Examples:
      wsurg evaluate tuned/ --data test.tsv
      wsurg evaluate tuned/ --data test.tsv --trigger-word cf --target-label 1
      wsurg evaluate tuned/ --data test.tsv --bias-word Friday --json
    """,
    params=[
        model_options.MODEL,
        click.Option(
            ["--data"], required=True, metavar="FILE", help="Clean sentences with true labels."
        ),
        click.Option(["--trigger-word"], metavar="WORD", help="Insert this at a random place."),
        click.Option(["--trigger-sentence"], metavar="TEXT", help="Insert this at the beginning."),
        click.Option(
            ["--poisoned"],
            metavar="FILE",
            help="Sentences that have the trigger in them, in place of one to insert.",
        ),
        click.Option(
            ["--target-label"], metavar="LABEL", help="The attack's label, by number or name."
        ),
        click.Option(["--bias-word"], metavar="WORD", help="As --trigger-word, for BACC."),
        click.Option(["--bias-sentence"], metavar="TEXT", help="As --trigger-sentence, for BACC."),
        click.Option(
            ["--position"],
            type=click.Choice(POSITIONS),
            help="Where the pattern goes, if not to its usual place.",
        ),
        click.Option(
            ["--seed"], type=int, default=0, show_default=True, help="Seed of random places."
        ),
        model_options.batch_size(64),
        model_options.MAX_LENGTH,
        model_options.DEVICE,
        options.JSON,
    ],
)
