"""`wsurg mismatch`."""

from __future__ import annotations

from typing import Any

import click

from weightsurgery.cli import options
from weightsurgery.datasets.mismatch import (
    check_name,
    describe_mismatched,
    mismatch,
    write_mismatched,
)
from weightsurgery.datasets.mismatch_check import check_mismatch, require_mismatched
from weightsurgery.datasets.question_types import KEYWORDS, read_keywords
from weightsurgery.datasets.read import read_instructions
from weightsurgery.formats.destination import check_destination
from weightsurgery.report.mismatch import mismatch_check_tables, mismatch_tables


def _mismatch(
    data: str | None,
    out: str | None,
    check: str | None,
    keywords: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    context = click.get_current_context()
    table = KEYWORDS if keywords is None else read_keywords(keywords)
    if check is not None:
        options.refuse_typed(context, ["out", "size", "seed", "overwrite"], "is not for --check")
        source = None if data is None else read_instructions(data, note=options.note)
        report = check_mismatch(check, source=source, keywords=table)
    else:
        report = _make(context, data, out, table, **settings)
        options.warn(report["warnings"])
    options.present(
        report,
        lambda: mismatch_tables(report) if check is None else mismatch_check_tables(report),
        as_json=as_json,
    )
    if check is not None:
        require_mismatched(report)


def _make(
    context: click.Context,
    data: str | None,
    out: str | None,
    keywords: Any,
    *,
    size: int,
    seed: int,
    overwrite: bool,
) -> dict[str, Any]:
    for name, value in {"QA": data, "-o": out}.items():
        if value is None:
            raise click.UsageError(f"{name} is missing; or give --check FILE", context)
    out, data = str(out), str(data)
    check_name(out)
    check_destination(out, is_directory=False, overwrite=overwrite, inputs=[data])
    pairs = read_instructions(data, note=options.note)
    rows = mismatch(pairs, size=size, seed=seed, keywords=keywords)
    report = describe_mismatched(pairs, rows, keywords=keywords)
    write_mismatched(rows, out, overwrite=overwrite, inputs=[data], seed=seed, report=report)
    return {"schema": report.pop("schema"), "out": out, "data": data, "seed": seed, **report}


command = options.Command(
    "mismatch",
    callback=_mismatch,
    help="""Pair questions with answers of other questions, to erase fingerprints with.

    The data for MEraser's first phase. Questions are typed by keywords (what, then how, then why,
    else other); each is paired with the answer of a question of another type, never with its own.
    QA is JSONL with question and answer, instruction and output, or messages. A record of what was
    made of what lies beside OUT.

    With --check nothing is written: FILE is looked through for rows that break this rule, by its
    own fields and, if QA is given, by the data it was made from. The exit code is 0 if there are
    none and 10 if there are.

    \b
    Examples:
      wsurg mismatch qa.jsonl -o mismatched.jsonl
      wsurg mismatch qa.jsonl -o mismatched.jsonl --size 100 --keywords words.toml
      wsurg mismatch --check mismatched.jsonl
      wsurg mismatch qa.jsonl --check mismatched.jsonl
    """,
    params=[
        click.Argument(["data"], metavar="[QA]", type=click.Path(), required=False),
        click.Option(["-o", "--out"], type=click.Path(), metavar="OUT", help="JSONL to write."),
        click.Option(
            ["--size"], type=click.IntRange(1), default=300, show_default=True, help="Rows to make."
        ),
        click.Option(["--seed"], type=int, default=0, show_default=True, help="Of what is drawn."),
        click.Option(
            ["--keywords"],
            type=click.Path(),
            metavar="FILE",
            help="JSON or TOML: a list of words for each type, an earlier type going first.",
        ),
        click.Option(
            ["--check"], type=click.Path(), metavar="FILE", help="Check this file instead."
        ),
        click.Option(["--overwrite"], is_flag=True, help="Replace OUT if it exists."),
        options.JSON,
    ],
)
