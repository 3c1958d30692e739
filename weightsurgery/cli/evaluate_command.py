"""`wsurg evaluate`."""

from __future__ import annotations

from typing import Any

import click

from weightsurgery.cli import attack_options, model_options, options
from weightsurgery.datasets.read import label_ids, read_sentences
from weightsurgery.evaluation.classification import check_classifier, evaluate
from weightsurgery.models import load_model
from weightsurgery.report.evaluation import evaluation_tables
from weightsurgery.report.tables import show


def _evaluate(
    model: str,
    data: str,
    target_label: str | None,
    poisoned: str | None,
    batch_size: int,
    max_length: int,
    device: str,
    as_json: bool,
    **pattern: Any,
) -> None:
    context = click.get_current_context()
    attack_options.check(context)
    trigger = attack_options.trigger_of({**pattern, "poisoned": poisoned})
    if trigger is None:
        options.refuse_typed(context, ["seed"], "is for a pattern to insert")
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
        *attack_options.OPTIONS,
        click.Option(
            ["--seed"], type=int, default=0, show_default=True, help="Seed of random places."
        ),
        model_options.batch_size(64),
        model_options.MAX_LENGTH,
        model_options.DEVICE,
        options.JSON,
    ],
)
