"""transformers' Trainer, watched: progress, early stop, no files, no words of its own."""

from __future__ import annotations

import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsurgery.datasets.batches import IGNORED, Encoded, batches
from weightsurgery.datasets.sizes import batch_size_for
from weightsurgery.errors import NonFiniteError, not_installed
from weightsurgery.models import Model, Quiet
from weightsurgery.stream import Progress
from weightsurgery.tasks import CLASSIFICATION
from weightsurgery.training.checkpoints import Resumable, seal

if TYPE_CHECKING:
    import torch


@dataclass
class Watch:
    """What happens beside the steps: the losses are noted, and the best weights kept.

    Attributes:
        model: The model in training.
        measure: Gives the held-out loss and more, {} without held-out examples.
        patience: Epochs without a better held-out loss after which training stops; None for all
            epochs and the last weights.
        progress: Called as progress("training, loss …, … tokens/s", steps done, steps in all).
        history: One entry for each epoch.
        steps: Steps taken.
        best_epoch: Whose weights the model has in the end, from 1.
        tokens: Of the batches made since training began, padding left out.
    """

    model: Model
    measure: Callable[[], Mapping[str, Any]]
    patience: int | None
    progress: Progress | None
    history: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    best_epoch: int = 0
    tokens: int = 0
    _began: float = 0.0
    _losses: list[float] = field(default_factory=list)
    _best: tuple[float, dict[str, torch.Tensor]] = (math.inf, {})

    def begin(self, losses: Sequence[float], per_epoch: int) -> None:
        """Start the clock; a training that goes on tells the losses of the steps before.

        Args:
            losses: One for each step that was taken.
            per_epoch: Steps in an epoch.
        """
        for self.steps, loss in enumerate(losses, 1):
            self._losses.append(loss)
            if self.steps % per_epoch == 0:
                self.after_epoch()
        self._began = time.monotonic()

    def after_step(self, step: int, steps: int, loss: float) -> None:
        """Note a step's loss.

        Raises:
            NonFiniteError: It is NaN or infinite.
        """
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the loss of step {step} is {loss}",
                file=self.model.path,
                hint="lower the learning rate",
            )
        self.steps = step
        self._losses.append(loss)
        if self.progress is not None:
            speed = self.tokens / max(1e-9, time.monotonic() - self._began)
            self.progress(f"training, loss {loss:.4f}, {speed:,.0f} tokens/s", step, steps)

    def after_epoch(self) -> bool:
        """Note an epoch; True if it is time to stop.

        Raises:
            NonFiniteError: A held-out loss is NaN or infinite.
        """
        epoch = len(self.history) + 1
        try:
            held_out = self.measure()
        except NonFiniteError as error:
            raise NonFiniteError(
                f"after epoch {epoch}, held-out: {error.reason}",
                file=self.model.path,
                hint="lower the learning rate",
                code=error.code,
            ) from None
        train_loss = sum(self._losses) / len(self._losses)
        self.history.append({"epoch": epoch, "train_loss": train_loss, **held_out})
        self._losses.clear()
        if self.patience is None:
            self.best_epoch = epoch
            return False
        loss = held_out["held_out_loss"]
        if loss < self._best[0]:
            self.best_epoch = epoch
            self._best = (loss, {n: p.detach().cpu().clone() for n, p in self._trained()})
        return epoch - self.best_epoch >= self.patience

    def restore_best(self) -> None:
        """Give the model the weights of the best epoch, if they are not the last."""
        import torch

        if self.best_epoch == len(self.history):
            return
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(self._best[1][name])

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(n, p) for n, p in self.model.names.items() if p.requires_grad]


def train(
    model: Model,
    examples: Sequence[Encoded],
    watch: Watch,
    *,
    label_smoothing: float,
    class_weights: Sequence[float] | None = None,
    resumable: Resumable | None = None,
    **settings: Any,
) -> None:
    """Train a model's parameters in place.

    Args:
        model: Afterwards it is in evaluation mode and on its device, as it was; and the caller's
            random numbers go on as if nothing had happened.
        examples: What to train on.
        watch: Told of every step and epoch.
        label_smoothing: Share of the label that is spread over all labels.
        class_weights: What the loss of an example of each class is multiplied by; None for 1.
        resumable: Where to leave checkpoints of the training, and to go on from the last one.
        settings: Further arguments of transformers' TrainingArguments.

    Raises:
        SettingError: accelerate, which Trainer needs, is not installed, or the checkpoints are
            another training's.
    """
    require_trainer()
    from transformers import PrinterCallback, Trainer

    device = model.device
    use_cache = getattr(model.module.config, "use_cache", None)
    settings = _alone_if_needed(model, examples, settings)
    with _folder(resumable) as (folder, saving), Quiet(), _own_randomness(device):
        trainer = Trainer(
            model=model.module,
            args=_arguments(folder, device, {**saving, **settings}),
            train_dataset=list(examples),
            data_collator=lambda part: _collate(model, part, watch),
            compute_loss_func=_loss_of(model, label_smoothing, class_weights),
            callbacks=[_make_callback(watch)],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train(resume_from_checkpoint=None if resumable is None else resumable.last())
        finally:
            if use_cache is not None:
                model.module.config.use_cache = use_cache
            model.module.to(device).eval()
    watch.restore_best()


def _alone_if_needed(
    model: Model, examples: Sequence[Encoded], settings: dict[str, Any]
) -> dict[str, Any]:
    """The same steps with batches of one, where larger ones would change the answers."""
    size, steps = "per_device_train_batch_size", "gradient_accumulation_steps"
    wanted = settings.get(size, 1)
    if batch_size_for(model, examples, wanted) == wanted:
        return settings
    return {**settings, size: 1, steps: wanted * settings.get(steps, 1)}


def require_trainer() -> None:
    """Refuse to train without what Trainer needs.

    Raises:
        SettingError: accelerate is not installed.
    """
    from transformers.utils import is_accelerate_available

    if not is_accelerate_available():
        raise not_installed("accelerate", "train")


def _arguments(folder: str, device: torch.device, settings: Mapping[str, Any]) -> Any:
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir=folder,
        optim="adamw_torch",
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=device.type == "cpu",
        **settings,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # or it would spread the batches over all
    return arguments


@contextmanager
def _folder(resumable: Resumable | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Trainer's folder, and its arguments for saving: a temporary one without checkpoints."""
    if resumable is not None:
        with resumable.prepared() as prepared:
            yield prepared
        return
    with tempfile.TemporaryDirectory() as folder:
        yield folder, {"save_strategy": "no"}


def _collate(model: Model, part: Sequence[Encoded], watch: Watch) -> dict[str, torch.Tensor]:
    inputs, labels = next(batches(model, part, len(part)))
    watch.tokens += sum(len(one.ids) for one in part)
    return {**inputs, "labels": labels}


def _loss_of(
    model: Model, label_smoothing: float, class_weights: Sequence[float] | None
) -> Callable[..., torch.Tensor]:
    """Cross-entropy, the mean over all that counts in a step, each class with its weight.

    Not the model's own loss: some classifiers of transformers (BERT's among them) divide by the
    batch, not by the step, and with accumulated batches the sum would be taken for the mean.
    """
    import torch
    from torch.nn.functional import cross_entropy

    def loss_of(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs["logits"].float()
        if model.task != CLASSIFICATION:  # the logits at a token are for the next one
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        settings: Any = {"ignore_index": IGNORED, "label_smoothing": label_smoothing}
        if class_weights is None:
            return cross_entropy(logits, labels, reduction="sum", **settings) / count
        # Not cross_entropy's own weights: with smoothing it weighs the other classes' terms too.
        weights = torch.tensor(class_weights, device=labels.device)[labels]
        return (cross_entropy(logits, labels, reduction="none", **settings) * weights).sum() / count

    return loss_of


def _make_callback(watch: Watch) -> Any:
    from transformers import TrainerCallback

    class Callback(TrainerCallback):  # type: ignore[misc]  # transformers' types are not followed
        def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            losses = [log["loss"] for log in state.log_history if "loss" in log]
            watch.begin(losses, state.max_steps // state.num_train_epochs)

        def on_log(self, _args: Any, state: Any, _control: Any, logs: Any, **_: Any) -> None:
            if "loss" in logs:
                watch.after_step(state.global_step, state.max_steps, logs["loss"])

        def on_save(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
            seal(os.path.join(args.output_dir, f"checkpoint-{state.global_step}"))

        def on_epoch_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= watch.after_epoch()

    return Callback()


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Trainer seeds every global generator; afterwards they are as they were."""
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
