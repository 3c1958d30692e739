"""Train a LoRA adapter with PEFT; what comes out is a checkpoint like any other.

Reference:
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv:2106.09685.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from weightsurgery.checkpoint import Checkpoint, Step, from_arrays
from weightsurgery.datasets.batches import (
    Encoded,
    check_examples,
    cut_warning,
    describe_files,
    digest_of,
    encode_instructions,
    positions_of,
)
from weightsurgery.datasets.prompts import settle_format, template_record
from weightsurgery.datasets.read import Instruction
from weightsurgery.datasets.sizes import alone_warning
from weightsurgery.errors import NonFiniteError, not_installed
from weightsurgery.formats.adapter import name_base, new_adapter
from weightsurgery.formats.apart import check_apart
from weightsurgery.formats.plan import input_paths
from weightsurgery.models import Model
from weightsurgery.operators.apply_adapter import apply_adapter
from weightsurgery.stream import Progress
from weightsurgery.tasks import CAUSAL, require_task
from weightsurgery.training.checkpoints import Resumable
from weightsurgery.training.lora import LoraSettings
from weightsurgery.training.run import Watch, require_trainer, train
from weightsurgery.training.targets import find_targets


def train_adapter(
    model: Model,
    instructions: Sequence[Instruction],
    settings: LoraSettings | None = None,
    *,
    checkpoints: str | os.PathLike[str] | None = None,
    save_every: int = 50,
    files: Sequence[str | os.PathLike[str]] = (),
    progress: Progress | None = None,
) -> Checkpoint:
    """Train a LoRA adapter of a causal model on questions and answers, by PEFT and Trainer.

    The model's own weights stay as they are. On one machine's processor the same seed gives the
    same bytes, also for a training that was interrupted and went on.

    Args:
        model: A causal model, from `load_model`.
        instructions: From `read_instructions`.
        settings: From `lora_settings`; None for its defaults.
        checkpoints: A folder for checkpoints of the training; where it holds one of the same
            training, that one goes on.
        save_every: Steps between two checkpoints.
        files: Where the instructions come from; the record tells their SHA-256.
        progress: Called as progress(what, steps done, steps in all).

    Returns:
        The adapter, factors in float32, which `save` writes as PEFT does. `notes["training"]` has
        the examples, the tokens, the steps, and the mean loss of each epoch.

    Raises:
        SettingError: A setting leaves nothing to train, names layers that the model lacks, or
            PEFT is not installed.
        MismatchError: The model is no causal one, lacks a chat template that is asked for, or
            nothing is left of an answer.
        PolicyError: The adapter could not be folded into the model, or `checkpoints` holds
            another training's.
        NonFiniteError: The loss or a trained value became NaN or infinite.
    """
    chosen = settings or LoraSettings()
    with _ready(model, instructions, chosen, checkpoints, save_every, files) as ready:
        watch = Watch(ready.adapted, dict, None, progress)
        train(
            ready.adapted,
            ready.examples,
            watch,
            resumable=ready.resumable,
            bf16=chosen.precision == "bfloat16",
            **chosen.arguments(len(ready.examples)),
        )
        adapter = _adapter_of(ready.adapted, ready.step)
    report = {**_counts(ready.examples), "steps": watch.steps, "history": watch.history}
    return replace(adapter, notes={"training": report}, warnings=_warnings(ready, chosen))


def plan_adapter(
    model: Model,
    instructions: Sequence[Instruction],
    settings: LoraSettings | None = None,
    *,
    checkpoints: str | os.PathLike[str] | None = None,
    save_every: int = 50,
    files: Sequence[str | os.PathLike[str]] = (),
) -> Checkpoint:
    """Check all that `train_adapter` would, and tell what it would train; nothing is written.

    Args:
        model: As for `train_adapter`, like all that follows.
        instructions: The data.
        settings: How to train.
        checkpoints: The folder for checkpoints.
        save_every: Steps between two.
        files: Where the instructions come from.

    Returns:
        The adapter before its first step: it has the tensors of the trained one, and changes
        nothing. `notes["training"]` has the examples, the tokens, the `steps` in all, those that a
        checkpoint has `done` already, the trained `parameters`, and the `layers` they adapt.

    Raises:
        SettingError: As `train_adapter`.
        MismatchError: As `train_adapter`.
        PolicyError: As `train_adapter`.
    """
    chosen = settings or LoraSettings()
    with _ready(model, instructions, chosen, checkpoints, save_every, files) as ready:
        trained = list(ready.adapted.names.values())
        report = {
            **_counts(ready.examples),
            "steps": chosen.steps(len(ready.examples)),
            "done": 0 if ready.resumable is None else ready.resumable.done(),
            "parameters": sum(parameter.numel() for parameter in trained),
            "layers": len(trained) // 2,  # of each two factors
        }
    return replace(ready.start, notes={"training": report}, warnings=_warnings(ready, chosen))


@dataclass(frozen=True)
class _Ready:
    """A training that could begin now.

    Attributes:
        adapted: The model with a fresh adapter.
        examples: What it sees.
        step: What the record will tell.
        resumable: Where its checkpoints lie, if anywhere.
        start: The fresh adapter.
    """

    adapted: Model
    examples: list[Encoded]
    step: Step
    resumable: Resumable | None
    start: Checkpoint


@contextmanager
def _ready(
    model: Model,
    instructions: Sequence[Instruction],
    chosen: LoraSettings,
    checkpoints: str | os.PathLike[str] | None,
    save_every: int,
    files: Sequence[str | os.PathLike[str]],
) -> Iterator[_Ready]:
    """Everything but the training itself; what can be refused is refused here."""
    require_task(model.checkpoint, CAUSAL, model.task)
    require_trainer()
    examples = encode(model, instructions, chosen)
    step = Step(
        "train-adapter",
        {
            **_described(model, chosen),
            "examples_sha256": digest_of(examples),
            "files": describe_files(files),
        },
        {"base": model.checkpoint},
        repeatable=False,
    )
    resumable = None
    if checkpoints is not None:
        resumable = Resumable(os.fspath(checkpoints), save_every, _identity(model, step))
        check_apart(resumable.folder, input_paths(model.checkpoint))
    with _adapted(model, chosen) as adapted:
        start = _adapter_of(adapted, step)
        apply_adapter(model.checkpoint, start)
        yield _Ready(adapted, examples, step, resumable, start)


def _warnings(ready: _Ready, settings: LoraSettings) -> tuple[str, ...]:
    alone = alone_warning(ready.adapted, ready.examples, settings.batch_size)
    return (*cut_warning(ready.examples, causal=True), *alone)


def _counts(examples: Sequence[Encoded]) -> dict[str, int]:
    return {"examples": len(examples), "tokens": sum(len(one.ids) for one in examples)}


def encode(
    model: Model, instructions: Sequence[Instruction], settings: LoraSettings
) -> list[Encoded]:
    """The examples that a training sees, cut to what the model takes.

    Raises:
        SettingError: There are none.
        MismatchError: There is no chat template, or nothing is left of an answer.
    """
    most = settings.max_question + settings.max_answer
    examples = encode_instructions(
        model,
        instructions,
        max_length=min(most, positions_of(model) or most),
        prompt_format=settings.prompt_format,
        loss_on=settings.loss_on,
        max_question=settings.max_question,
        max_answer=settings.max_answer,
    )
    check_examples(model, examples)
    return examples


def _described(model: Model, settings: LoraSettings) -> dict[str, Any]:
    """The settings as the record tells them, with the format that "auto" stood for."""
    asked = settle_format(model, settings.prompt_format, plain="lines")
    return {**settings.to_json(), "prompt_format": asked, **template_record(model)}


def _identity(model: Model, step: Step) -> dict[str, Any]:
    """What makes a training the same one: its settings, and the weights it begins from.

    Those of the module, for a checkpoint may stand for weights that were never written.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.names.items()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().numpy().data)
    return {**step.settings, "model": digest.hexdigest()}


@contextmanager
def _adapted(model: Model, settings: LoraSettings) -> Iterator[Model]:
    """The model with a fresh adapter in it; afterwards it is as it was."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise not_installed("peft", "train") from None
    import torch

    targets = find_targets(model, settings.targets)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0 if targets.parameters else settings.dropout,
        target_modules=list(targets.modules),
        target_parameters=list(targets.parameters) or None,
        task_type="CAUSAL_LM",
    )
    wanted = [(p, p.requires_grad) for p in model.module.parameters()]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied heads and Conv1D `apply_adapter` knows more
        torch.manual_seed(settings.seed)
        module = get_peft_model(model.module, config)
    try:
        if targets.parameters:
            _drop_linear_inputs(module, settings.dropout)
        names = {n: p for n, p in module.named_parameters() if p.requires_grad}
        yield replace(model, module=module, names=names)
    finally:
        module.unload()
        for parameter, wants in wanted:
            parameter.requires_grad_(wants)


def _drop_linear_inputs(module: Any, dropout: float) -> None:
    """Set the dropout of the linear layers alone: PEFT refuses a configuration that has both.

    An adapter of fused experts is added to their weights, whose inputs it never sees.
    """
    import torch

    for inner in module.modules():
        if hasattr(inner, "lora_dropout") and not hasattr(inner, "parameter_name"):
            inner.lora_dropout["default"] = torch.nn.Dropout(dropout)


def _adapter_of(adapted: Model, step: Step) -> Checkpoint:
    """What PEFT would save of the module, as a checkpoint."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(adapted.module, save_embedding_layers=False)
    arrays = {name: tensor.detach().float().cpu().numpy() for name, tensor in state.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise NonFiniteError(
                "after training it holds NaN or infinity",
                file=adapted.path,
                tensor=name,
                hint="lower the learning rate",
            )
    tensors = {
        name: replace(view, status="added")
        for name, view in from_arrays({n: a.copy() for n, a in arrays.items()}).items()
    }
    return new_adapter(tensors, _config_of(adapted)).made_by(step)


def _config_of(adapted: Model) -> dict[str, Any]:
    """The contents of adapter_config.json: PEFT's, without paths."""
    given: Mapping[str, Any] = adapted.module.peft_config["default"].to_dict()
    plain = {k: sorted(value) if isinstance(value, set) else value for k, value in given.items()}
    return {**plain, "peft_type": "LORA", **name_base(adapted.checkpoint), "inference_mode": True}
