"""An adapter's tensors and configuration, named and shaped as the library PEFT reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from weightsurgery.adapters.decompose import Factors
from weightsurgery.adapters.places import (
    BIAS,
    CONVOLUTION,
    EMBEDDING,
    FACTORS,
    NOWHERE,
    ROWS,
    STACKS,
    TRANSPOSED,
    TURNED_STACK,
    WHOLE,
    Place,
    Tree,
)
from weightsurgery.adapters.tie import find_tie
from weightsurgery.alignment import Alignment
from weightsurgery.architecture.canonical import template
from weightsurgery.architecture.composite import find_architecture
from weightsurgery.architecture.facts import library_versions
from weightsurgery.checkpoint import Checkpoint, TensorView, from_arrays
from weightsurgery.formats.adapter import name_base, new_adapter
from weightsurgery.kernels import Block

_FRONT = "base_model.model."
# The classes of PEFT's models, by the end of a transformers class's name.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # PEFT takes their heads as saved
_HEADS = ("classifier", "score", "qa_outputs")


class Held(Protocol):
    """A tensor's place, and what goes into the adapter of it."""

    @property
    def place(self) -> Place:
        """Where it goes."""

    @property
    def moved(self) -> bool:
        """Whether TUNED differs from BASE there."""

    @property
    def factors(self) -> Factors | None:
        """Of what goes into factors."""

    @property
    def rows(self) -> tuple[int, ...]:
        """Of what goes as rows."""


def make_adapter(alignment: Alignment, kept: Sequence[Held], base_name: str) -> Checkpoint:
    """The adapter of what is kept, as a checkpoint that `save` writes as PEFT does.

    Args:
        alignment: Of BASE and TUNED.
        kept: What it holds.
        base_name: What it belongs to; "" for BASE's own name.
    """
    tensors: dict[str, TensorView] = {}
    wrapped = dict.fromkeys(_adapted(kept), "base_layer")
    stacks = _stacks(alignment.tuned, kept)
    wrapped |= {m: ".".join(["base_layer"] * len(names)) for m, names in stacks.items()}
    if any(one.place.how == ROWS for one in kept):  # PEFT wraps the head that is tied to them too
        wrapped |= dict.fromkeys(_heads(alignment.tuned), "token_adapter.base_layer")
    for one in kept:
        tensors |= _tensors(one, wrapped, stacks)
    config = make_config(alignment, kept, base_name)
    copied = _tied_head(alignment.tuned, kept)
    if copied is not None:
        view, head = copied
        tensors[_FRONT + head] = replace(view, name=_FRONT + head)
        saved = [*(config["modules_to_save"] or ()), head.removesuffix(".weight")]
        config |= {"modules_to_save": sorted(saved), "ensure_weight_tying": True}
    return new_adapter(tensors, config)


def _tied_head(tuned: Checkpoint, kept: Sequence[Held]) -> tuple[TensorView, str] | None:
    """The head's name and values, where the embedding that it is tied to is held whole."""
    tie = find_tie(tuned)
    for one in kept if tie is not None and tie.head else ():
        if one.place.how == WHOLE and tie is not None and one.place.pair.name == tie.embedding:
            return one.place.pair.tuned, tie.head
    return None


def _stacks(tuned: Checkpoint, kept: Sequence[Held]) -> dict[str, list[str]]:
    """The parameters that are adapted directly, by module, in the order in which it has them."""
    known = find_architecture(tuned.config)
    order = [*known.stacks] if known is not None else []
    found: dict[str, list[str]] = {}
    held = [one.place for one in kept if one.place.layout in STACKS]
    for place in sorted(held, key=lambda place: order.index(template(place.pair.name))):
        found.setdefault(place.module, []).append(place.pair.name)
    return found


def _adapted(kept: Sequence[Held]) -> set[str]:
    return {one.place.module for one in kept if one.place.how == FACTORS}


def _heads(tuned: Checkpoint) -> list[str]:
    """The output head's module, where the model has a known one."""
    known = find_architecture(tuned.config)
    return [known.head.removesuffix(".weight")] if known is not None and known.head else []


def _tensors(
    one: Held, wrapped: Mapping[str, str], stacks: Mapping[str, list[str]]
) -> dict[str, TensorView]:
    """A tensor's names and views in the adapter."""
    place, pair = one.place, one.place.pair
    if one.factors is not None:
        module, names = place.module, stacks.get(place.module, [pair.name])
        # PEFT wraps a module once for each of its parameters, and the first is the innermost.
        wrappers = ".base_layer" * (len(names) - 1 - names.index(pair.name))
        return _factors(place, one.factors, f"{_FRONT}{module}{wrappers}.")
    if place.how == ROWS:
        name = f"{_FRONT}{place.module}.token_adapter.trainable_tokens_delta"
        return {name: _some_rows(pair.tuned, name, one.rows)}
    name = _FRONT + pair.name
    if place.how == BIAS and place.module in wrapped:
        name = f"{_FRONT}{place.module}.{wrapped[place.module]}.bias"
    # What is left out, though its module is saved, stays BASE's.
    view = pair.base if place.how == NOWHERE and pair.base is not None else pair.tuned
    return {name: replace(view, name=name)}


def _factors(place: Place, factors: Factors, front: str) -> dict[str, TensorView]:
    left, right, rank = factors.left, factors.right, factors.rank
    shape = place.pair.tuned.shape
    arrays: dict[str, Block]
    if left.ndim == 3:
        a, b = right, left
        if place.layout == TURNED_STACK:
            a, b = left.transpose(0, 2, 1), right.transpose(0, 2, 1)
        # A has expert after expert, B rank after rank.
        a, b = a.reshape(-1, a.shape[2]), b.transpose(1, 2, 0).reshape(b.shape[1], -1)
        arrays = {"lora_A.weight": a, "lora_B.weight": b}
    elif place.layout == EMBEDDING:
        arrays = {"lora_embedding_A": left.T, "lora_embedding_B": right.T}
    elif place.layout == TRANSPOSED:
        arrays = {"lora_A.weight": left.T, "lora_B.weight": right.T}
    elif place.layout == CONVOLUTION:
        a = right.reshape(rank, *shape[1:])
        b = left.reshape(shape[0], rank, *([1] * (len(shape) - 2)))
        arrays = {"lora_A.weight": a, "lora_B.weight": b}
    else:
        arrays = {"lora_A.weight": right, "lora_B.weight": left}
    made = from_arrays({front + n: np.ascontiguousarray(array) for n, array in arrays.items()})
    return {name: replace(view, status="added") for name, view in made.items()}


def _some_rows(view: TensorView, name: str, rows: Sequence[int]) -> TensorView:
    """Rows of a matrix, read when they are asked for."""
    width = view.width

    def read_both(start: int, stop: int) -> tuple[Block, Block]:
        parts = [np.zeros(0, view.dtype.numpy)]
        while start < stop:
            place, offset = divmod(start, width)
            last = place  # rows that follow each other are read at once
            while last + 1 < len(rows) and rows[last + 1] == rows[last] + 1:
                if (last + 1) * width >= stop:
                    break
                last += 1
            count = min(stop, (last + 1) * width) - start
            first = rows[place] * width + offset
            parts.append(view.read(first, first + count))
            start += count
        block = np.concatenate(parts)
        return block, block

    return TensorView(name, (len(rows), width), view.dtype, read_both)


def make_config(alignment: Alignment, kept: Sequence[Held], base_name: str) -> dict[str, Any]:
    """The contents of adapter_config.json.

    α = r everywhere, so that the scale is 1. Names are written out in full, for PEFT takes the
    end of a name for the whole.

    Args:
        alignment: Of BASE and TUNED.
        kept: What the adapter holds.
        base_name: What it belongs to; "" for BASE's own name.
    """
    named = name_base(alignment.base)
    if base_name:
        named = {"base_model_name_or_path": base_name, "revision": None}
    ranks = {_adapted_name(o.place): o.factors.rank for o in kept if o.factors is not None}
    parameters = sorted(o.place.pair.name for o in kept if o.place.layout in STACKS)
    usual = _usual(ranks)
    tree = Tree(alignment.tuned)
    odd = {_key(m, tree): rank for m, rank in ranks.items() if rank != usual}
    saved = sorted({o.place.module for o in kept if o.place.how == WHOLE})
    targets = sorted(ranks.keys() - set(parameters))
    others = {a for m in targets for a in tree.alike(m, ".") if a not in ranks}
    rows = {o.place.module: list(o.rows) for o in kept if o.place.how == ROWS}
    biases = any(o.place.how == BIAS for o in kept)
    return {
        "peft_type": "LORA",
        "task_type": _task(alignment.tuned, saved),
        **named,
        "inference_mode": True,
        "init_lora_weights": True,
        "r": usual,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "rank_pattern": odd,
        "alpha_pattern": dict(odd),
        "use_rslora": False,
        "use_dora": False,
        "bias": "all" if biases else "none",
        "fan_in_fan_out": any(o.place.layout == TRANSPOSED for o in kept),
        "target_modules": targets,
        "exclude_modules": sorted(others) or None,
        "modules_to_save": [m for m in saved if not _is_below(m, saved)] or None,
        "trainable_token_indices": rows or None,
        **(_of_parameters(parameters) if parameters else {}),
    }


def _of_parameters(names: list[str]) -> dict[str, Any]:
    """What the configuration says of parameters, and for which PEFT: older ones turn matrices."""
    return {"target_parameters": names, "peft_version": library_versions()["peft"]}


def _adapted_name(place: Place) -> str:
    """What PEFT's patterns match: a module's name, or a parameter's that is adapted directly."""
    return place.pair.name if place.layout in STACKS else place.module


def _usual(ranks: Mapping[str, int]) -> int:
    """The rank that most modules have, the larger of two; 1 without any."""
    counts = Counter(ranks.values())
    return max(counts, key=lambda rank: (counts[rank], rank), default=1)


def _key(module: str, tree: Tree) -> str:
    """A module as a key of a pattern; `^` where it would fit another too."""
    return f"^{module}" if tree.alike(module, ".") else module


def _is_below(module: str, saved: Sequence[str]) -> bool:
    return any(module != other and module.startswith(f"{other}.") for other in saved)


def _task(tuned: Checkpoint, saved: Sequence[str]) -> str | None:
    """What PEFT calls the model's task; None where it would look for a head that is not saved."""
    named = tuned.config.get("architectures")
    first = str(named[0]) if isinstance(named, list) and named else ""
    task = next((task for ending, task in _TASKS.items() if first.endswith(ending)), None)
    heads = [module for module in saved if module.rpartition(".")[2] in _HEADS]
    return None if task in _WITH_HEADS and not heads else task
