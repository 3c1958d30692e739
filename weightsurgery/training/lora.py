"""How to train a LoRA adapter: every setting, checked, and MEraser's as presets.

References:
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv:2106.09685.
    Zhang et al., "MEraser: An Effective Fingerprint Erasure Approach for Large Language Models",
    ACL 2025, arXiv:2506.12551; the presets "meraser-…" are the settings of its released code,
    "strong-…" are our choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from weightsurgery.datasets.batches import LOSSES
from weightsurgery.datasets.prompts import FORMATS
from weightsurgery.errors import SettingError, shown
from weightsurgery.training.settings import Schedule, check_count
from weightsurgery.training.targets import ALL_LINEAR, KEYWORDS, QUERY_VALUE

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class LoraSettings(Schedule):
    """How to train a LoRA adapter. The defaults are our choice.

    Attributes:
        epochs: Passes over the examples.
        learning_rate: After the warm-up.
        scheduler: "linear", "cosine" or "constant".
        rank: r, the rank of B·A.
        alpha: α; B·A is scaled by α/r.
        dropout: Share of a linear layer's inputs that A does not see in a step; fused experts
            have none.
        targets: Names, or ends of names, of the linear layers or fused experts to adapt;
            ("all-linear",) stands for all of both but the output head and routers,
            ("query-value",) for the attention's queries and values.
        prompt_format: "auto", "chat", "raw" or "lines", as `encode_instructions` explains.
        loss_on: "answer" or "all".
        max_question: Tokens of a question after which it is cut.
        max_answer: The same of an answer, with its end-of-text token.
        precision: "float32", or "bfloat16" for the matrix products; weights, gradients of the
            adapter and the optimiser stay in float32.

    Raises:
        SettingError: One is out of range.
    """

    epochs: int = 3
    learning_rate: float = 2e-4
    scheduler: str = "cosine"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    targets: tuple[str, ...] = (ALL_LINEAR,)
    prompt_format: str = "auto"
    loss_on: str = "answer"
    max_question: int = 256
    max_answer: int = 256
    precision: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "max_question", "max_answer"):
            check_count(name, getattr(self, name))
        if not math.isfinite(self.alpha) or self.alpha <= 0:
            raise SettingError(f"alpha is {self.alpha}; expected more than 0")
        if not 0 <= self.dropout < 1:
            raise SettingError(f"dropout is {self.dropout}; expected 0 to below 1")
        object.__setattr__(self, "targets", tuple(self.targets))  # or a list would be no all-linear
        alone = len(self.targets) == 1 or not set(KEYWORDS) & set(self.targets)
        if not self.targets or not all(self.targets) or not alone:
            raise SettingError(
                "no names of layers to target; expected at least one, or all-linear or query-value "
                "alone"
            )
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                given = shown(getattr(self, name))
                raise SettingError(f"{name} is '{given}'; expected {', '.join(known)}")


_CHOICES = {"prompt_format": FORMATS, "loss_on": LOSSES, "precision": PRECISIONS}

_ERASE = LoraSettings(
    rank=8,
    alpha=16.0,
    targets=(QUERY_VALUE,),
    learning_rate=5e-4,
    scheduler="constant",
    epochs=5,
    batch_size=8,
    max_grad_norm=0.5,
    prompt_format="raw",
    loss_on="all",
)
_RECOVER = replace(
    _ERASE,
    rank=16,
    alpha=32.0,
    scheduler="cosine",
    epochs=2,
    batch_size=36,
    prompt_format="lines",
)
# Ours: what erased where the released settings did not (docs/explanation/evidence-meraser.md).
_STRONG = replace(
    _ERASE,
    rank=16,
    alpha=32.0,
    targets=(ALL_LINEAR,),
    learning_rate=1e-3,
    epochs=2,
    prompt_format="auto",
    loss_on="answer",
)
# Not in the chat template: training in it brought the fingerprint back.
_STRONG_RECOVER = replace(_RECOVER, epochs=1)
PRESETS: Mapping[str, LoraSettings] = MappingProxyType(
    {
        "meraser-erase": _ERASE,
        "meraser-recover": _RECOVER,
        "strong-erase": _STRONG,
        "strong-recover": _STRONG_RECOVER,
    }
)


def lora_settings(preset: str | None = None, **settings: Any) -> LoraSettings:
    """A preset's settings with some of them changed; without a preset, our defaults.

    Args:
        preset: A name in `PRESETS`.
        settings: Fields of `LoraSettings`.

    Returns:
        The settings, checked.

    Raises:
        SettingError: There is no such preset or setting, or a setting is out of range.

    Example:
        >>> lora_settings("meraser-erase", epochs=2).learning_rate
        0.0005
    """
    if preset is not None and preset not in PRESETS:
        known = ", ".join(PRESETS)
        raise SettingError(
            f"no preset '{shown(preset)}'; expected {known}", code="E-SETTING-UNKNOWN"
        )
    unknown = sorted(settings.keys() - LoraSettings.__dataclass_fields__.keys())
    if unknown:
        raise SettingError(f"there is no setting {shown(unknown[0])}", code="E-SETTING-UNKNOWN")
    return replace(PRESETS[preset] if preset is not None else LoraSettings(), **settings)
