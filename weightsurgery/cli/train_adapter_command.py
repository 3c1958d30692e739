"""`wsurg train-adapter`."""

from __future__ import annotations

from typing import Any

import click

from weightsurgery.cli import causal_options, lora_options, model_options, options
from weightsurgery.cli.writing import show_plan, write
from weightsurgery.datasets.read import read_instructions
from weightsurgery.formats.apart import check_apart
from weightsurgery.formats.destination import check_destination, check_folder_name
from weightsurgery.formats.plan import input_paths
from weightsurgery.models import require_directory
from weightsurgery.report.training import adapter_tables, planned_adapter_tables
from weightsurgery.tasks import CAUSAL, task_of
from weightsurgery.training.adapter import plan_adapter, train_adapter

_WRITING = ("out", "overwrite", "dry_run", "hashes")


def _train_adapter(
    model: str,
    data: str,
    preset: str | None,
    out: str,
    overwrite: bool,
    dry_run: bool,
    checkpoints: str | None,
    save_every: int,
    hashes: bool,
    weights: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    lora_options.check_checkpoints(click.get_current_context())
    settings = lora_options.settings_of(preset, given)
    read = options.open_all([model], weights)[0]
    require_directory(read)
    task_of(read, expected=CAUSAL)
    inputs = input_paths(read)
    # Before any work; saving checks again.
    check_folder_name(out, "an adapter is a folder")
    check_destination(out, is_directory=True, overwrite=overwrite, inputs=inputs)
    if checkpoints is not None:
        check_apart(checkpoints, [*inputs, out])
    columns = causal_options.question_columns(given)
    instructions = read_instructions(data, **columns, note=options.note)
    opened = model_options.load(read, given)
    kept: dict[str, Any] = {"checkpoints": checkpoints, "save_every": save_every, "files": [data]}
    if dry_run:
        planned = plan_adapter(opened, instructions, settings, **kept)
        training = planned.notes["training"]
        tables = planned_adapter_tables({"": training})
        told = {"training": training}
        show_plan(planned, out, told, tables, as_json=as_json, overwrite=overwrite)
        return
    with model_options.counting() as progress:
        adapter = train_adapter(opened, instructions, settings, **kept, progress=progress)
    write(adapter, out, adapter_tables, as_json=as_json, overwrite=overwrite, hashes=hashes)


command = options.Command(
    "train-adapter",
    callback=_train_adapter,
    help="""Train a LoRA adapter on questions and answers.

    By PEFT and transformers' Trainer, on a processor or an accelerator. MODEL is a causal language
    model and stays as it is; OUT is a folder that PEFT loads and `wsurg apply-adapter` folds in.
    On one machine's processor the same seed gives the same bytes, also where --checkpoints let an
    interrupted training go on.

    The presets are MEraser's two trainings: meraser-erase for mismatched answers, as `wsurg
    mismatch` makes them, and meraser-recover for clean ones. strong-erase and strong-recover are
    ours: the first with all linear layers, a larger learning rate and the chat template, the second
    with half of the steps.

    Data are JSON, JSONL or Parquet with question and answer, instruction and output, messages or
    conversations.

    \b
    Examples:
      wsurg train-adapter model/ --data clean.jsonl -o adapter/
      wsurg train-adapter model/ --data mismatched.jsonl \\
          --preset meraser-erase --epochs 3 -o erase/
    """,
    params=[
        model_options.MODEL,
        click.Option(["--data"], required=True, metavar="FILE", help="Questions and answers."),
        *(option for option in model_options.READING if option is not model_options.LABEL_KIND),
        lora_options.PRESET,
        *lora_options.OPTIONS,
        *lora_options.CHECKPOINTS,
        options.WEIGHTS,
        model_options.DEVICE,
        *(option for option in options.WRITING if option.name in _WRITING),
        options.JSON,
    ],
)
