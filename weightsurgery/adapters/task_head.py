"""A trained task head that BASE's class lacks, such as a classifier's on a causal language model.

PEFT trains the head of another class than BASE was saved as, and stores it whole. The merged model
is of that class: the new head is added, and what that class does not have is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from weightsurgery.adapters.contents import sort_out
from weightsurgery.adapters.naming import Naming
from weightsurgery.architecture.canonical import read_names, template
from weightsurgery.architecture.composite import find_architecture
from weightsurgery.architecture.embedding import find_embedding
from weightsurgery.architecture.facts import Architecture, architecture_of, class_ending, class_of
from weightsurgery.checkpoint import Checkpoint, TensorView
from weightsurgery.errors import first_few, shown
from weightsurgery.formats.config import with_config
from weightsurgery.kernels import Block

# What PEFT calls a task, to the ending of transformers' class with the head that is trained.
ENDINGS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
_DEFAULT_LABELS = 2  # of a configuration that names none


@dataclass(frozen=True)
class _Head:
    """A head that BASE's class lacks.

    Attributes:
        architecture: The class that has it.
        parts: Its tensors' names in the model, to the adapter's tensors.
    """

    architecture: Architecture
    parts: Mapping[str, TensorView]

    @property
    def rows(self) -> int:
        """The number of labels; a layer before the last one is square."""
        shapes = [view.shape for view in self.parts.values() if len(view.shape) == 2]
        return max(shapes, key=lambda shape: shape[0] != shape[1])[0]


def ending_of(adapter: Checkpoint) -> str:
    """The ending of the class that an adapter was trained as, "" for one that has no head.

    Args:
        adapter: From `open_checkpoint`.
    """
    task = adapter.config.get("task_type")
    return ENDINGS.get(task, "") if isinstance(task, str) else ""


def find_unstored(base: Checkpoint, adapter: Checkpoint) -> list[str]:
    """What the class that an adapter was trained as has, and neither BASE's class nor the adapter.

    Args:
        base: The model.
        adapter: From `open_checkpoint`.
    """
    ours = find_architecture(base.config)
    ending = ending_of(adapter)
    name = class_ending(ours.model_type, (ending,)) if ours and ending else None
    theirs = architecture_of({**base.config, "architectures": [name]}) if name else None
    if ours is None or theirs is None or ours.prefix != theirs.prefix:
        return []  # of another prefix, all names would differ
    return sorted(theirs.parameters - ours.parameters - sort_out(adapter).plain.keys())


def with_head_of(base: Checkpoint, adapters: Sequence[Checkpoint], naming: Naming) -> Checkpoint:
    """BASE as the class that its adapters were trained as, its new head zero until it is replaced.

    Args:
        base: The model.
        adapters: From `open_checkpoint`.
        naming: How their names correspond to BASE's.

    Returns:
        BASE where no adapter holds a head that BASE's class lacks, or where it is not known how
        BASE would be stored as that class; with a warning if a trained head was not saved.
    """
    heads = (_head_of(base, adapter, naming) for adapter in adapters)
    head = next(filter(None, heads), None)
    if head is None:
        return replace(base, warnings=(*base.warnings, *_without_head(base, adapters)))
    dropped = _unknown_to(head.architecture, base)
    embedding = find_embedding(base)
    like = base[embedding] if embedding is not None else next(iter(base.values()))
    added = {name: _zeros(name, view.shape, like) for name, view in head.parts.items()}
    kept = {name: view for name, view in base.items() if name not in dropped}
    changed = with_config(
        replace(base, tensors={**kept, **added}), architectures=[head.architecture.name]
    )
    changed = _with_labels(changed, head.rows)
    return replace(changed, warnings=(*base.warnings, *_warnings(changed, head, dropped)))


def _head_of(base: Checkpoint, adapter: Checkpoint, naming: Naming) -> _Head | None:
    """The head that an adapter holds whole and BASE's class lacks; None if it has no such one.

    Without a task in the adapter's configuration, the class is the one that has all of it.
    """
    ours = find_architecture(base.config)
    if ours is None or not ours.prefix or ours.is_base:
        return None
    plain = {naming.translated(n, base): view for n, view in sort_out(adapter).plain.items()}
    stated = ending_of(adapter)
    found = [_head_as(base, ours, e, plain) for e in ([stated] if stated else ENDINGS.values())]
    # A tagger's head may be a classifier's and a bias.
    return max(filter(None, found), key=lambda head: len(head.parts), default=None)


def _head_as(
    base: Checkpoint, ours: Architecture, ending: str, plain: Mapping[str, TensorView]
) -> _Head | None:
    """The same for the class of one ending."""
    if (class_of(base.config) or "").endswith(ending):
        return None
    name = class_ending(ours.model_type, (ending,))
    theirs = architecture_of({**base.config, "architectures": [name]}) if name else None
    if theirs is None or theirs.name != name or theirs.prefix != ours.prefix:
        return None
    lacking = theirs.parameters - ours.parameters
    if not lacking <= plain.keys():
        return None  # what is missing would be random
    parts = {name: plain[name] for name in sorted(lacking)}
    fits = any(len(view.shape) == 2 for view in parts.values())
    return _Head(theirs, parts) if fits else None


def _without_head(base: Checkpoint, adapters: Sequence[Checkpoint]) -> list[str]:
    """A warning for each adapter of another class than BASE's that stores no whole tensor."""
    ours = class_of(base.config) or ""
    return [
        f"{shown(adapter.label)} was trained in a {ending} model and does not store its head; the "
        f"output is a {shown(ours)} model, as BASE is"
        for adapter in adapters
        if (ending := ending_of(adapter))
        and ours
        and not ours.endswith(ending)
        and not sort_out(adapter).plain
    ]


def _unknown_to(theirs: Architecture, base: Checkpoint) -> list[str]:
    """The tensors that only BASE's class has, and those outside the base model that neither has."""
    ours = find_architecture(base.config)
    gone = (ours.parameters if ours else frozenset()) - theirs.parameters
    names = {name: place.model_name for name, place in read_names(base, ours).places.items()}
    return [
        stored
        for stored, name in names.items()
        if template(name) in gone
        or not (name.startswith(f"{theirs.prefix}.") or template(name) in theirs.parameters)
    ]


def _with_labels(base: Checkpoint, rows: int) -> Checkpoint:
    """BASE with as many labels as the head has rows; its own where they are as many."""
    labels = base.config.get("id2label")
    count = len(labels) if isinstance(labels, Mapping) else base.config.get("num_labels")
    if (count or _DEFAULT_LABELS) == rows:
        return base
    names = [f"LABEL_{number}" for number in range(rows)]
    return with_config(
        base,
        id2label={str(number): name for number, name in enumerate(names)},
        label2id={name: number for number, name in enumerate(names)},
    )


def _warnings(base: Checkpoint, head: _Head, dropped: Sequence[str]) -> list[str]:
    names = first_few([f"'{shown(name)}'" for name in head.parts])
    gone = first_few([f"'{shown(name)}'" for name in dropped])
    without = f", without BASE's {gone}" if dropped else ""
    found = [f"the output is a {head.architecture.name} with the adapter's head {names}{without}"]
    key = head.architecture.text_config_key
    configs = [base.config, base.config.get(key) if key else None]
    if all(c.get("pad_token_id") is None for c in configs if isinstance(c, Mapping)):
        found.append(
            "config.json has no pad_token_id, which transformers needs to classify more than one "
            "text at a time"
        )
    return found


def _zeros(name: str, shape: tuple[int, ...], like: TensorView) -> TensorView:
    def read_both(start: int, stop: int) -> tuple[Block, Block]:
        block = np.zeros(stop - start, like.dtype.numpy)
        return block, block

    return TensorView(name, shape, like.dtype, read_both, status="added")
