"""Defences of a sentence classifier, each a function from a ratio to an edited checkpoint.

Fine-mixing, its "Sel" variant, Fine-purifying and E-PUR are the package's operators. Fine-pruning
is here for comparison: Liu, Dolan-Gavitt and Garg, "Fine-Pruning: Defending Against Backdooring
Attacks on Deep Neural Networks", RAID 2018, arXiv:1805.12185. All go on with the same fine-tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from weightsurgery import (
    Checkpoint,
    TokenCounts,
    align,
    epur,
    fisher,
    map_tensors,
    mix,
    purify,
)
from weightsurgery.anatomy import find_embedding
from weightsurgery.datasets.batches import Encoded, batches
from weightsurgery.masks import rows_of
from weightsurgery.models import Model

Edit = Callable[[float], Checkpoint]


@dataclass(frozen=True)
class Case:
    """A suspicious model and what its defender has.

    Attributes:
        base: The pre-trained weights it came from.
        model: The model, as it was downloaded.
        examples: A few clean examples.
        counts: How often each token occurs in ordinary text, for E-PUR.
        seed: Of random masks.
    """

    base: Checkpoint
    model: Model
    examples: Sequence[Encoded]
    counts: TokenCounts
    seed: int

    @property
    def tuned(self) -> Checkpoint:
        """The suspicious weights."""
        return self.model.checkpoint

    @cached_property
    def fisher(self) -> Checkpoint:
        """The curvature on the clean examples, at the suspicious weights."""
        return fisher(self.model, self.examples)

    @cached_property
    def activity(self) -> dict[str, np.ndarray[Any, Any]]:
        """Mean absolute activation of each neuron on the clean examples, by weight name."""
        return neuron_activity(self.model, self.examples)


def _fine_mixing(case: Case, ratio: float, *, with_epur: bool, select: str) -> Checkpoint:
    # With E-PUR, the word embedding is E-PUR's alone.
    exclude = [find_embedding(case.tuned) or ""] if with_epur else []
    settings = {"ratio": ratio, "select": select, "seed": case.seed, "exclude": exclude}
    return _epur(case, mix(case.base, case.tuned, **settings), with_epur=with_epur)


def _fine_purifying(case: Case, ratio: float, *, with_epur: bool) -> Checkpoint:
    embeddings = {"embeddings": "epur", "counts": case.counts} if with_epur else {}
    return purify(case.base, case.tuned, fisher=case.fisher, ratio=ratio, **embeddings)


def _epur(case: Case, edited: Checkpoint, *, with_epur: bool) -> Checkpoint:
    return epur(case.base, edited, counts=case.counts) if with_epur else edited


def make_edit(case: Case, defence: str, *, with_epur: bool) -> Edit:
    """What a defence does before fine-tuning.

    Args:
        case: What is to be defended.
        defence: One of `DEFENCES`.
        with_epur: Whether E-PUR takes care of the word embedding.

    Returns:
        Ratio to edited checkpoint.
    """
    edits: dict[str, Edit] = {
        "Fine-pruning": lambda r: _epur(
            case, prune(case.tuned, case.activity, r), with_epur=with_epur
        ),
        "Fine-mixing": lambda r: _fine_mixing(case, r, with_epur=with_epur, select="random"),
        "Fine-mixing (Sel)": lambda r: _fine_mixing(case, r, with_epur=with_epur, select="drift"),
        "Fine-purifying": lambda r: _fine_purifying(case, r, with_epur=with_epur),
    }
    return edits.get(defence, lambda _: _epur(case, case.tuned, with_epur=with_epur))


DEFENCES = (
    "none",
    "fine-tuning",
    "Fine-pruning",
    "Fine-mixing",
    "Fine-mixing (Sel)",
    "Fine-purifying",
)
WITHOUT_RATIO = ("none", "fine-tuning")
UNTRAINED = ("none",)


# --- Fine-pruning -----------------------------------------------------------------------------


def neuron_activity(model: Model, examples: Sequence[Encoded]) -> dict[str, np.ndarray[Any, Any]]:
    """Measure how active the inner neurons of a BERT's feed-forward layers are.

    Args:
        model: A BERT classifier.
        examples: Clean ones.

    Returns:
        For each layer's weight on disk, the mean over all tokens of the absolute activation of
        each of its neurons, float64.
    """
    totals: dict[str, torch.Tensor] = {}
    hooks = []
    for path, module in model.module.named_modules():
        if path.endswith(".intermediate"):

            def add(_: Any, __: Any, out: torch.Tensor, name: str = path) -> None:
                totals[name] = totals.get(name, 0) + out.abs().sum((0, 1)).double().cpu()

            hooks.append(module.register_forward_hook(add))
    tokens = sum(len(one.ids) for one in examples)
    with torch.inference_mode():
        for inputs, _ in batches(model, examples, 1):  # one at a time: nothing is padded
            model.module(**inputs)
    for hook in hooks:
        hook.remove()
    return {f"{path}.dense.weight": total.numpy() / tokens for path, total in totals.items()}


def prune(tuned: Checkpoint, activity: dict[str, np.ndarray[Any, Any]], ratio: float) -> Checkpoint:
    """Set the weights and biases of the least active neurons to 0, over all layers together.

    Args:
        tuned: The suspicious weights.
        activity: From `neuron_activity`.
        ratio: Share of the neurons.

    Returns:
        The pruned model.
    """
    everything = np.sort(np.concatenate(list(activity.values())))
    count = int(ratio * everything.size)
    threshold = everything[count] if count < everything.size else np.inf
    dormant = {}
    for name, means in activity.items():
        dormant[name] = dormant[name.replace(".weight", ".bias")] = means < threshold

    def edit(name: str, start: int, block: Any, _base: Any) -> Any:
        if name not in dormant:
            return block
        width = tuned[name].width if name.endswith(".weight") else 1
        return np.where(rows_of(dormant[name], start, block.size, width), 0, block).astype(
            block.dtype
        )

    return map_tensors(edit, align(tuned, tuned))
