"""`wsurg meraser`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import click

from weightsurgery.checkpoint import Checkpoint
from weightsurgery.cli import causal_options, lora_options, model_options, options
from weightsurgery.cli.writing import show_plan, write
from weightsurgery.datasets.mismatch_sides import check_sides
from weightsurgery.datasets.read import read_instructions
from weightsurgery.formats.apart import check_apart
from weightsurgery.formats.plan import input_paths, make_plan
from weightsurgery.models import Model, require_directory
from weightsurgery.report.training import meraser_tables, planned_adapter_tables
from weightsurgery.stream import Engine, Progress
from weightsurgery.tasks import CAUSAL, task_of
from weightsurgery.training.meraser import Measure, Phase, meraser, plan_meraser

_MEASURED = ("fingerprints", "text", "window", "stride", "bos", "max_new_tokens", "prompt_format")
_KEPT = ("fsr", "perplexity")  # of a report: what the record tells of a stage


def _meraser(
    model: str,
    erase: str,
    recover: str | None,
    preset: str,
    transfer_from: str | None,
    scales: tuple[float, ...],
    out: str,
    overwrite: bool,
    dry_run: bool,
    max_shard_size: int | None,
    hashes: bool,
    checkpoints: str | None,
    save_every: int,
    weights: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    context = click.get_current_context()
    causal_options.check_needs(context)
    lora_options.check_checkpoints(context)
    if recover is None and given["recover_settings"]:
        raise click.UsageError("--recover-setting is for --recover", context)
    if len(scales) > 1 and given["fingerprints"] is None:
        raise click.UsageError("several --scale need --fingerprints to choose by", context)
    both = _phases(erase, recover, preset, given, checkpoints, save_every)
    sizes: dict[str, Any] = {"overwrite": overwrite, "max_shard_size": max_shard_size}
    doubts = check_sides(erase, recover)
    paths = [model] if transfer_from is None else [model, transfer_from]
    read = _open(paths, weights)
    make_plan(read[0], out, engine=Engine(), **sizes)  # refuses before any work; saving does again
    _keep_apart(out, checkpoints, read)
    data = causal_options.read_data(given)
    opened, *others = (model_options.load(one, given) for one in read)
    asked: dict[str, Any] = {"foundation": others[0] if others else None, "scales": scales}
    options.warn(doubts)
    if dry_run:
        planned = plan_meraser(opened, *both, **asked, measure=_measure(data, given, None))
        told = planned.notes["meraser"]
        tables = planned_adapter_tables(told["trainings"])
        show_plan(planned, out, {"meraser": told}, tables, as_json=as_json, **sizes)
        return
    with model_options.counting() as progress:
        measure = _measure(data, given, progress)
        result = meraser(opened, *both, **asked, measure=measure, progress=progress)
    write(result, out, meraser_tables, as_json=as_json, hashes=hashes, **sizes)


def _phases(
    erase: str,
    recover: str | None,
    preset: str,
    given: Mapping[str, Any],
    checkpoints: str | None,
    save_every: int,
) -> tuple[Phase, Phase | None]:
    """Both trainings; None for one that is not asked for."""

    def phase(name: str, file: str) -> Phase:
        return Phase(
            read_instructions(file, note=options.note),
            lora_options.parse_settings(f"{preset}-{name}", given[f"{name}_settings"]),
            files=[file],
            checkpoints=None if checkpoints is None else os.path.join(checkpoints, name),
            save_every=save_every,
        )

    return phase("erase", erase), None if recover is None else phase("recover", recover)


def _open(paths: Sequence[str], weights: str | None) -> list[Checkpoint]:
    """The model and, if there is one, the foundation; refused before they are loaded."""
    read = options.open_all(paths, weights)
    for one in read:
        require_directory(one)
        task_of(one, expected=CAUSAL)
    return read


def _keep_apart(out: str, checkpoints: str | None, read: Sequence[Checkpoint]) -> None:
    """Refuse to write into what is read, or to two things in one place."""
    inputs = [path for one in read for path in input_paths(one)]
    check_apart(out, inputs)
    if checkpoints is not None:
        check_apart(checkpoints, [*inputs, out])


def _measure(
    data: Mapping[str, Any], given: Mapping[str, Any], progress: Progress | None
) -> Measure | None:
    """What measures a stage; None if nothing is to be measured."""
    if not any(data.values()):
        return None

    def measure(model: Model) -> dict[str, Any]:
        report = causal_options.measure(model, data, given, progress=progress)
        return {name: report[name] for name in _KEPT}

    return measure


def _settings(phase: str) -> click.Option:
    return click.Option(
        [f"--{phase}-setting", f"{phase}_settings"],
        multiple=True,
        metavar="NAME=VALUE",
        help=f"Change a setting of the {phase} training, such as learning-rate=1e-3; repeatable. "
        "`wsurg train-adapter --help` names them.",
    )


command = options.Command(
    "meraser",
    callback=_meraser,
    help="""Erase a fingerprint or backdoor of unknown trigger by training.

    MEraser's two phases: an adapter is trained on mismatched answers and folded in, then one on
    clean answers. With --transfer-from the first is trained on the clean model that MODEL came
    from. With --fingerprints or --perplexity every stage is measured; of several --scale the one
    that leaves the fewest fingerprints is taken.

    To remove somebody else's mark of ownership can break a licence or the law.

    \b
    Examples:
      wsurg meraser model/ --erase mismatched.jsonl --recover clean.jsonl \\
          -o erased/
      wsurg meraser model/ --erase mismatched.jsonl --recover clean.jsonl \\
          --transfer-from foundation/ --scale 0.5 --scale 1 \\
          --fingerprints marks.jsonl --perplexity text.txt -o erased/
    """,
    params=[
        model_options.MODEL,
        click.Option(
            ["--erase"],
            required=True,
            metavar="FILE",
            help="Mismatched questions and answers, from `wsurg mismatch`.",
        ),
        click.Option(
            ["--recover"], metavar="FILE", help="Clean questions and answers; without, erase alone."
        ),
        click.Option(
            ["--preset"],
            type=click.Choice(["meraser", "strong"]),
            default="meraser",
            show_default=True,
            help="Settings of both trainings: the paper's, or ours, which erase in all linear "
            "layers, at a larger rate, in the chat template, and recover in half the steps.",
        ),
        _settings("erase"),
        _settings("recover"),
        click.Option(
            ["--transfer-from"],
            metavar="FOUNDATION",
            help="Train the erasing adapter on this clean model, and fold it into MODEL.",
        ),
        click.Option(
            ["--scale", "scales"],
            type=float,
            multiple=True,
            default=(1.0,),
            show_default="1",
            metavar="NUMBER",
            help="Multiply the erasing adapter's change; repeatable, with --fingerprints.",
        ),
        *(option for option in causal_options.OPTIONS if option.name in _MEASURED),
        model_options.TEMPLATE_ARGS,
        *lora_options.CHECKPOINTS,
        options.WEIGHTS,
        model_options.DEVICE,
        *(
            option
            for option in options.WRITING
            if option.name in ("out", "overwrite", "dry_run", "max_shard_size", "hashes")
        ),
        options.JSON,
    ],
)
