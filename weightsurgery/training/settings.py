"""The hyper-parameters of a fine-tuning, checked."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from weightsurgery.errors import SettingError, shown

_FASTEST = 1e9  # torch's optimisers overflow at far larger ones
CLASS_WEIGHTS = ("none", "balanced")
SCHEDULERS = ("linear", "cosine", "constant")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How many steps of AdamW, and how large; `finetune` explains each.

    Attributes:
        epochs: Passes over the examples, at most.
        learning_rate: After the warm-up.
        batch_size: Examples in a batch.
        accumulation: Batches in a step.
        scheduler: One of `SCHEDULERS`.
        warmup: Share of the steps.
        weight_decay: AdamW's.
        max_grad_norm: 0 for no limit.
        label_smoothing: Share.
        seed: Any integer from 0.

    Raises:
        SettingError: One is out of range.
    """

    epochs: int = 20
    learning_rate: float = 5e-5
    batch_size: int = 8
    accumulation: int = 1
    scheduler: str = "linear"
    warmup: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    label_smoothing: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulation"):
            check_count(name, getattr(self, name))
        for name in ("warmup", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingError(f"{name} is {getattr(self, name)}; expected 0 to below 1")
        for name in ("weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SettingError(f"{name} is {getattr(self, name)}; expected 0 or more")
        if not 0 < self.learning_rate <= _FASTEST:
            raise SettingError(
                f"learning_rate is {self.learning_rate}; expected more than 0, at most {_FASTEST:g}"
            )
        if self.scheduler not in SCHEDULERS:
            raise SettingError(
                f"scheduler is '{shown(self.scheduler)}'; expected {', '.join(SCHEDULERS)}"
            )
        if not 0 <= self.seed < 1 << 32:  # numpy's generator, which Trainer seeds, takes no others
            raise SettingError(f"seed is {self.seed}; expected 0 to {(1 << 32) - 1}")

    def to_json(self) -> dict[str, Any]:
        """The fields as a dictionary."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    def steps(self, examples: int) -> int:
        """Steps in all epochs: the last batch of an epoch, and its last step, may be smaller."""
        batches = math.ceil(examples / self.batch_size)
        return math.ceil(batches / self.accumulation) * self.epochs

    def arguments(self, examples: int) -> dict[str, Any]:
        """The same as `train` takes it, in the words of transformers' TrainingArguments."""
        warmup_steps = round(self.warmup * self.steps(examples))
        scheduler = self.scheduler
        if scheduler == "constant" and warmup_steps:
            scheduler = "constant_with_warmup"  # the other one ignores the warm-up
        return {
            "num_train_epochs": self.epochs,
            "learning_rate": self.learning_rate,
            "per_device_train_batch_size": self.batch_size,
            "gradient_accumulation_steps": self.accumulation,
            "lr_scheduler_type": scheduler,
            "warmup_steps": warmup_steps,
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
            "label_smoothing": self.label_smoothing,
            "seed": self.seed,
        }


@dataclass(frozen=True, kw_only=True)
class Hyperparameters(Schedule):
    """How to fine-tune. The defaults are everybody's.

    Attributes:
        patience: In epochs, None for no early stop.
        class_weights: One of `CLASS_WEIGHTS`.
        freeze: Globs.

    Raises:
        SettingError: One is out of range.
    """

    patience: int | None = None
    class_weights: str = "none"
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patience is not None:
            check_count("patience", self.patience)
        if self.class_weights not in CLASS_WEIGHTS:
            raise SettingError(
                f"class_weights is '{shown(self.class_weights)}'; expected "
                f"{', '.join(CLASS_WEIGHTS)}"
            )


def check_count(name: str, count: int) -> None:
    """Refuse less than one.

    Raises:
        SettingError: It is less.
    """
    if count < 1:
        raise SettingError(f"{name} is {count}; expected at least 1")
