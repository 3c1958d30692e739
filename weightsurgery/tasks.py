"""What a model is for, as its configuration tells: a classifier, or a causal language model."""

from __future__ import annotations

from weightsurgery.checkpoint import Checkpoint
from weightsurgery.errors import MismatchError, shown

CLASSIFICATION, CAUSAL = "classification", "causal"
_KINDS = {CLASSIFICATION: "a classifier", CAUSAL: "a causal language model"}
_ENDS = {CLASSIFICATION: ("ForSequenceClassification",), CAUSAL: ("ForCausalLM", "LMHeadModel")}


def task_of(checkpoint: Checkpoint, *, expected: str = "") -> str:
    """The task that a directory's configuration names an architecture of.

    Args:
        checkpoint: What was opened.
        expected: The only task that will do, if only one will.

    Raises:
        MismatchError: It is none that is expected, or the head has no cross-entropy.
    """
    wanted = [_KINDS[expected]] if expected else list(_KINDS.values())
    if "peft_type" in checkpoint.config:
        raise MismatchError(
            f"an adapter; expected {' or '.join(wanted)}",
            file=checkpoint.label,
            hint="fold it into its base with `wsurg apply-adapter`",
            code="E-MODEL-TASK",
        )
    architectures = checkpoint.config.get("architectures") or [""]
    name = str(architectures[0]) if isinstance(architectures, list) else ""
    found = next((task for task, ends in _ENDS.items() if name.endswith(ends)), None)
    if found is None:
        raise MismatchError(
            f"config.json names the architecture '{shown(name)}'; expected {' or '.join(wanted)}",
            file=checkpoint.label,
            code="E-MODEL-TASK",
        )
    require_task(checkpoint, expected or found, found)
    if found == CLASSIFICATION:
        _refuse_heads(checkpoint)
    return found


def _refuse_heads(checkpoint: Checkpoint) -> None:
    """Refuse a classifier that does not choose one of several labels."""
    labels = checkpoint.config.get("id2label")
    count = len(labels) if isinstance(labels, dict) else checkpoint.config.get("num_labels", 2)
    kind = checkpoint.config.get("problem_type")
    reason = ""
    if kind == "multi_label_classification":
        reason = "a multi-label classifier"
    elif kind == "regression" or count == 1:
        reason = "a regression model"
    if reason:
        raise MismatchError(
            f"{reason}; expected a classifier that chooses one of two or more labels",
            file=checkpoint.label,
            code="E-MODEL-TASK",
        )


def require_task(checkpoint: Checkpoint, expected: str, task: str) -> None:
    """Refuse a model of the wrong task.

    Args:
        checkpoint: The model's.
        expected: The task that will do.
        task: The task that it has.

    Raises:
        MismatchError: They differ.
    """
    if task != expected:
        raise MismatchError(
            f"{_KINDS[task]}; expected {_KINDS[expected]}",
            file=checkpoint.label,
            code="E-MODEL-TASK",
        )
