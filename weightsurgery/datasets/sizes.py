"""How many examples a model takes at a time: fewer where memory or its answers would suffer."""

from __future__ import annotations

from collections.abc import Sequence

from weightsurgery.datasets.batches import Encoded, padding_side
from weightsurgery.models import Model
from weightsurgery.tasks import CLASSIFICATION

_LOGITS = 1 << 26  # of a batch; four times in float32 they take 1 GiB


def batch_size_for(model: Model, examples: Sequence[Encoded], size: int) -> int:
    """The batch size that changes no answer: `size`, or 1 for what must be run alone.

    Classifiers of encoder-decoder models (BART, T5) judge by the last end-of-text token and take
    no batch whose texts have different numbers of them.

    Args:
        model: From `load_model`.
        examples: What is to be run.
        size: The batch size that is wanted.
    """
    if padding_side(model) not in model.sides:
        return 1
    config = model.module.config
    if model.task == CLASSIFICATION and getattr(config, "is_encoder_decoder", False):
        end = getattr(config, "eos_token_id", None)
        if len({one.ids.count(end) for one in examples}) > 1:
            return 1
    return size


def bounded_batch_size(model: Model, examples: Sequence[Encoded], size: int) -> int:
    """`batch_size_for`, and fewer where a causal model's logits would take more than 1 GiB.

    The loss and its gradient hold the logits of a batch about four times, in float32.

    Args:
        model: From `load_model`.
        examples: What is to be run.
        size: The batch size that is wanted.
    """
    size = batch_size_for(model, examples, size)
    if model.task == CLASSIFICATION or not examples:
        return size
    words: int = model.module.get_input_embeddings().weight.shape[0]
    longest = max(len(one.ids) for one in examples)
    return max(1, min(size, _LOGITS // (longest * words)))


def alone_warning(model: Model, examples: Sequence[Encoded], size: int) -> list[str]:
    """A warning if examples run one at a time although batches were wanted.

    Args:
        model: From `load_model`.
        examples: What is run.
        size: The batch size that is wanted.
    """
    if min(size, len(examples)) < 2 or batch_size_for(model, examples, size) > 1:
        return []
    return [running_alone(model)]


def running_alone(model: Model) -> str:
    """The warning that texts run one at a time, which takes longer.

    Args:
        model: For which a batch size was not followed.
    """
    kind = type(model.module).__name__
    return f"texts run one at a time: in a batch, padding would change the answers of {kind}"
