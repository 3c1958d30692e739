"""`wsurg replay`."""

from __future__ import annotations

from typing import Any

import click

from weightsurgery.cli import options
from weightsurgery.proof.replay import check_replay, replay
from weightsurgery.report.verification import replay_tables


def _replay(
    record: str, out: str, inputs: tuple[str, ...], workers: int, as_json: bool, **settings: Any
) -> None:
    found: dict[str, str] = {}
    for text in inputs:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            reason = f"--input is '{text}'; expected NAME=PATH"
            raise click.UsageError(reason, click.get_current_context())
        if name in found:
            reason = f"--input {name} is given twice"
            raise click.UsageError(reason, click.get_current_context())
        found[name] = path
    with options.running(workers, max_memory=settings["max_memory"]) as engine:
        follow = options.trusted()["follow_links"]
        report = replay(record, out, inputs=found, follow_links=follow, engine=engine, **settings)
    options.present(report, lambda: replay_tables(report), as_json=as_json)
    check_replay(report)


command = options.Command(
    "replay",
    callback=_replay,
    help="""Make an output again from its record.

    The inputs must have the recorded SHA-256; the recorded steps are done again with the recorded
    settings, and what comes out is compared with the record. The exit code is 0 if all bytes are
    the same and 10 if not. Trainings cannot be replayed.

    RECORD is a wsurg-record.json, or the directory that holds it. Inputs are looked for by their
    names beside the output and, where that is a folder, in it.

    \b
    Examples:
      wsurg replay purified/wsurg-record.json -o again/
      wsurg replay mixed/ --input base=models/bert --input 1=other/ -o again/
    """,
    params=[
        click.Argument(["record"], metavar="RECORD", type=click.Path()),
        click.Option(
            ["-o", "--out"], type=click.Path(), required=True, metavar="OUT", help="Where to write."
        ),
        click.Option(
            ["--input", "inputs"],
            multiple=True,
            metavar="NAME=PATH",
            help="Where an input is, by its recorded name, role or number; repeatable.",
        ),
        options.FOLLOW_LINKS,
        click.Option(["--overwrite"], is_flag=True, help="Replace OUT if it exists."),
        options.MEMORY,
        options.WORKERS,
        options.JSON,
    ],
)
