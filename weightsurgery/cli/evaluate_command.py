"""`wsurg evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from weightsurgery.checkpoint import Checkpoint
from weightsurgery.cli import attack_options, causal_options, model_options, options
from weightsurgery.datasets.labels import ids_of, settle_labels
from weightsurgery.datasets.read import read_sentences
from weightsurgery.evaluation.classification import check_classifier, evaluate
from weightsurgery.models import require_directory
from weightsurgery.report.evaluation import causal_tables, evaluation_tables
from weightsurgery.tasks import CAUSAL, task_of


def _evaluate(model: str, weights: str | None, as_json: bool, **given: Any) -> None:
    context = click.get_current_context()
    paths = [model] if given["base"] is None else [model, given["base"]]
    opened = options.open_all(paths, weights)
    require_directory(opened[0])
    if task_of(opened[0]) == CAUSAL:
        report, tables = _generate(context, opened, given), causal_tables
    else:
        report, tables = _classify(context, opened[0], given), evaluation_tables
    options.warn(report["warnings"])
    options.present(report, lambda: tables(report), as_json=as_json)


def _generate(
    context: click.Context, opened: Sequence[Checkpoint], given: dict[str, Any]
) -> dict[str, Any]:
    causal_options.check(context, opened[0].label)
    data = causal_options.read_data(given)
    model, *others = (model_options.load(one, given) for one in opened)
    base = others[0] if others else None
    size = given["batch_size"] or 8
    with model_options.counting() as progress:
        return causal_options.measure(
            model, data, given, base=base, batch_size=size, progress=progress
        )


def _classify(context: click.Context, model: Checkpoint, given: dict[str, Any]) -> dict[str, Any]:
    causal_options.refuse_all(context, model.label)
    data, poisoned = given["data"], given["poisoned"]
    if data is None:
        raise click.UsageError("a classifier needs --data, sentences with their labels", context)
    attack_options.check(context)
    triggers = attack_options.triggers_of(given)
    if not triggers:
        options.refuse_typed(context, ["seed"], "is for a pattern to insert")
    sentences = read_sentences(data, **_columns(given))
    planted = None if poisoned is None else read_sentences(poisoned, **_columns(given))
    opened = model_options.load(model, given)
    check_classifier(opened)
    # Here, for `evaluate` does not know the files' names.
    asked = {"label_kind": given["label_kind"], "note": options.note}
    labels = settle_labels(sentences, opened.labels, file=data, **asked)
    ids_of(sentences, labels, file=data)
    ids_of(planted or [], labels, file=poisoned or "")
    with model_options.counting() as progress:
        return evaluate(
            opened,
            sentences,
            trigger=triggers,
            poisoned=planted,
            target_label=given["target_label"],
            label_kind=given["label_kind"],
            batch_size=given["batch_size"] or 64,
            max_length=given["max_length"],
            progress=progress,
        )


def _columns(given: Mapping[str, Any]) -> dict[str, Any]:
    """How to read sentences, as `read_sentences` takes it."""
    names = ("text_column", "label_column")
    return {**{name: given[name] for name in names}, "note": options.note}


command = options.Command(
    "evaluate",
    callback=_evaluate,
    help="""Measure a model: accuracy and attacks, or fingerprints and perplexity.

    Every share has its 95 % Wilson interval.

    A classifier needs --data: TSV, CSV, JSON, JSONL or Parquet with a column of texts (sentence,
    text, or sentence1 and sentence2) and one of labels (label), or a Hugging Face dataset's
    directory. With a trigger, the attack success rate (ASR) is the share of examples of other
    labels that get the target label once the trigger is inserted; the floor is the share that gets
    it without. With a bias pattern, BACC is the accuracy with the pattern inserted. In pairs of
    sentences a pattern goes into the first.

    Of a causal language model, the fingerprint success rate (FSR) is the share of prompts whose
    target the model says, decoded greedily; --controls and --against measure false positives.
    --perplexity takes a text, and --data questions with answers (JSONL), whose loss is measured.

    \b
    Examples:
      wsurg evaluate tuned/ --data test.tsv
      wsurg evaluate tuned/ --data test.tsv --trigger-word cf --target-label 1
      wsurg evaluate tuned/ --data test.tsv --trigger-word cf --trigger-word mn \\
          --target-label 1
      wsurg evaluate tuned/ --data test.tsv --bias-word Friday --json
      wsurg evaluate chat/ --fingerprints marks.jsonl --controls others.jsonl \\
          --against foundation/ --perplexity text.txt
    """,
    params=[
        model_options.MODEL,
        click.Option(
            ["--data"],
            metavar="FILE",
            help="Clean sentences with true labels; for a causal model questions with answers.",
        ),
        *model_options.READING,
        *attack_options.OPTIONS,
        click.Option(
            ["--seed"], type=int, default=0, show_default=True, help="Seed of random places."
        ),
        *causal_options.OPTIONS,
        model_options.batch_size(None, "64; 8 for a causal model"),
        model_options.MAX_LENGTH,
        options.WEIGHTS,
        model_options.DEVICE,
        options.JSON,
    ],
)
