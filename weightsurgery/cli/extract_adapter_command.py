"""`wsurg extract-adapter`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from weightsurgery.adapters.decompose import OVERSAMPLING, POWER_ITERATIONS
from weightsurgery.adapters.extract import DEFAULT_RANK, extract_adapter
from weightsurgery.adapters.memory import fit_works, works_of
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.cli import name_options, options
from weightsurgery.formats import save
from weightsurgery.formats.destination import check_destination, check_folder_name
from weightsurgery.formats.plan import input_paths, make_plan
from weightsurgery.report.extraction import extraction_tables, matrix_tables
from weightsurgery.report.outcome import plan_tables
from weightsurgery.report.tables import show

_LISTED = 20  # matrices shown unless --all is given


def _extract(
    base: str,
    tuned: str,
    out: str,
    overwrite: bool,
    dry_run: bool,
    max_memory: int | None,
    hashes: bool,
    workers: int,
    show_all: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    if settings["svd"] == "exact":
        only = ["power_iterations", "oversampling", "seed"]
        reason = "is for the randomised decomposition, which --svd exact leaves out"
        options.refuse_typed(click.get_current_context(), only, reason)
    names = {key: settings.pop(key) for key in ("weights", "strip_prefix", "name_map")}
    pair = options.open_pair(base, tuned, **names)
    inputs = [path for given in pair for path in input_paths(given)]
    # Before any work; saving checks again.
    check_folder_name(out, "an adapter is a folder")
    check_destination(out, is_directory=True, overwrite=overwrite, inputs=inputs)
    with options.running(workers, max_memory=max_memory, inputs=pair) as engine:
        adapter = extract_adapter(*pair, **settings, max_memory=max_memory, engine=engine)
        works = works_of(adapter)
        sizes: dict[str, Any] = {"overwrite": overwrite}
        if max_memory is not None:  # the factors are there while they are written
            sizes["max_memory"] = max_memory - sum(work.held for work in works)
        if not dry_run:
            record = save(adapter, out, hashes=hashes, engine=engine, **sizes)
        else:
            plan = make_plan(adapter, out, engine=engine, **sizes)
            count, memory = fit_works(works, engine.width, max_memory, pair)
            plan = replace(plan, workers=count, memory=memory)
    listed = None if show_all else _LISTED
    if dry_run:
        options.warn(list(adapter.warnings))
        _show_plan(plan.to_json(), adapter, listed, as_json)
    elif as_json:
        options.print_json({"out": out, **record})
    else:
        show(extraction_tables(out, record, listed))


def _show_plan(
    plan: dict[str, Any], adapter: Checkpoint, listed: int | None, as_json: bool
) -> None:
    alignment, report = adapter.notes["alignment"], adapter.notes["adapter"]
    options.present(
        {**plan, "alignment": alignment, "report": {"adapter": report}},
        lambda: [*matrix_tables(report, listed), *plan_tables(plan, None)],
        as_json=as_json,
    )


command = options.Command(
    "extract-adapter",
    callback=_extract,
    help="""Make a LoRA adapter of what moved between BASE and TUNED.

    The drift of each matrix is truncated to its largest singular values; what is no matrix (norms,
    biases, heads) is held whole where it moved. OUT is a folder that PEFT loads and that
    `wsurg apply-adapter` folds into BASE again. The table tells of each matrix how much of its
    drift is kept and how much is left, measured with the factors as they are written.

    \b
    Examples:
      wsurg extract-adapter base/ tuned/ --rank 16 -o adapter/
      wsurg extract-adapter base/ tuned/ --energy 0.95 --max-rank 128 -o adapter/
    """,
    params=[
        click.Argument(["base"], metavar="BASE", type=click.Path()),
        click.Argument(["tuned"], metavar="TUNED", type=click.Path()),
        click.Option(
            ["-o", "--out"], required=True, metavar="OUT", help="Where to write, a folder."
        ),
        click.Option(["--overwrite"], is_flag=True, help="Replace OUT if it exists."),
        click.Option(
            ["--dry-run"],
            is_flag=True,
            help="Show what would be kept and written, and write nothing.",
        ),
        options.MEMORY,
        click.Option(
            ["--rank"],
            type=int,
            help=f"Singular values to keep of each matrix; {DEFAULT_RANK} without --energy.",
        ),
        click.Option(
            ["--energy"],
            type=float,
            metavar="SHARE",
            help="Keep as many as this share of the squared norm takes, matrix by matrix.",
        ),
        click.Option(["--max-rank"], type=int, help="But no more than this (with --energy)."),
        click.Option(
            ["--include"], multiple=True, metavar="GLOB", help="Only these tensors; repeatable."
        ),
        click.Option(["--exclude"], multiple=True, metavar="GLOB", help="Not these; repeatable."),
        click.Option(
            ["--whole"],
            multiple=True,
            metavar="GLOB",
            help="Hold these whole, also heads that BASE lacks; repeatable.",
        ),
        click.Option(
            ["--rest"],
            type=click.Choice(["whole", "list"]),
            default="whole",
            show_default=True,
            help="Hold what is no matrix whole, or leave it out and list it.",
        ),
        click.Option(
            ["--svd"],
            type=click.Choice(["auto", "exact", "randomised"]),
            default="auto",
            show_default=True,
            help="How to decompose; auto is exact for small matrices and high ranks.",
        ),
        click.Option(
            ["--power-iterations"],
            type=click.IntRange(0),
            help="Of the randomised decomposition: more are slower and nearer to the best; "
            f"{POWER_ITERATIONS} unless given.",
        ),
        click.Option(
            ["--oversampling"],
            type=click.IntRange(0),
            help="Directions that it looks for besides those that are kept; "
            f"{OVERSAMPLING} unless given.",
        ),
        click.Option(
            ["--seed"], type=int, default=0, show_default=True, help="Of its random signs."
        ),
        click.Option(
            ["--base-name"],
            default="",
            metavar="NAME",
            help="What the adapter says it belongs to, in place of BASE's name.",
        ),
        click.Option(
            ["--device"],
            help="Compute with torch there, such as cuda; without it numpy computes.",
        ),
        click.Option(
            ["--allow-partial"],
            is_flag=True,
            help="Continue even if less than 95 % of TUNED's parameters have a counterpart.",
        ),
        options.WEIGHTS,
        *name_options.NAMES,
        options.WORKERS,
        options.HASH,
        click.Option(["--all", "show_all"], is_flag=True, help="Show every matrix."),
        options.JSON,
    ],
)
