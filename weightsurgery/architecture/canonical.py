"""Canonical names: what a stored tensor is in the model, whatever the file calls it.

A checkpoint's names depend on the library version that wrote it, on wrappers around the model,
and on the head it was saved with. The canonical name does not: wrapper segments are removed, the
loading library's renamings done, and the prefixes of the base model and of the text model dropped.
So `_orig_mod.bert.encoder.layer.0.output.LayerNorm.gamma` of a BertForMaskedLM and
`encoder.layer.0.output.LayerNorm.weight` of a BertModel are the same tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from weightsurgery.architecture.conversion import Loaded, Renamer
from weightsurgery.architecture.facts import Architecture, architecture_of, legacy_rules

# Left in names by FSDP, activation checkpointing, torch.compile, FairScale and PEFT.
_WRAPPERS = frozenset(
    (
        *("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"),
        *("_fpw_module", "_forward_module", "base_layer"),
    )
)
_FRONT = ("module",)  # DistributedDataParallel and DeepSpeed: only in front of all else
_ADAPTED = ("base_model", "model")  # PEFT's, in front of the model's own names
_DIGITS = re.compile(r"\d+")
_SENTINEL = 90_010  # stands for a number of a name while rules look at it, and so do its multiples


@dataclass(frozen=True)
class Place:
    """What a stored tensor is in the model.

    Attributes:
        canonical: Its canonical name.
        target: Canonical name of the model's tensor that it becomes, or the first one that it
            becomes part of; `canonical` unless a converter is at work.
        loaded: What the loading library does with it.
    """

    canonical: str
    target: str
    loaded: Loaded


@dataclass(frozen=True)
class Names:
    """The places of a checkpoint's tensors.

    Attributes:
        architecture: The facts that were used; None where the architecture is unknown.
        places: Stored name to place.
        stored: Canonical name to stored name.
        ambiguous: Stored names that share a canonical name with an earlier one; they keep theirs.
    """

    architecture: Architecture | None
    places: Mapping[str, Place]
    stored: Mapping[str, str] = field(default_factory=dict)
    ambiguous: tuple[str, ...] = ()


def unwrapped(name: str) -> str:
    """A name without the segments that wrappers left in it.

    Example:
        >>> unwrapped("module._orig_mod.layers.0._fsdp_wrapped_module.q.base_layer.weight")
        'layers.0.q.weight'
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 2 and parts[0] in _FRONT:
        del parts[0]
    if tuple(parts[:2]) == _ADAPTED and len(parts) > 3:
        del parts[:2]
    return ".".join(parts)


def template(name: str) -> str:
    """A name with its numbers replaced by `*`, as facts list parameters.

    Example:
        >>> template("model.layers.11.mlp.up_proj.weight")
        'model.layers.*.mlp.up_proj.weight'
    """
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def read_names(names: Iterable[str], architecture: Architecture | None) -> Names:
    """Find the canonical name of each stored tensor.

    Args:
        names: As they are stored.
        architecture: The facts; None applies only what holds for all architectures.

    Returns:
        The places. Where two stored names would be one tensor, the second keeps its own.
    """
    names = list(names)
    reader = _Reader(architecture, names)
    places, stored, ambiguous = {}, {}, []
    for name in names:
        place = reader.place(name)
        if place.canonical in stored:
            ambiguous.append(name)
            place = Place(name, name, Loaded(name, name))
        places[name] = place
        stored.setdefault(place.canonical, name)
    return Names(architecture, places, stored, tuple(ambiguous))


class _Reader:
    """Places of names; rules look once at names that differ only in their numbers."""

    def __init__(self, architecture: Architecture | None, names: list[str]) -> None:
        self._architecture = architecture
        rules = architecture.rules if architecture else (*_experts(), *legacy_rules())
        self._renamer = Renamer(rules, map(unwrapped, names))
        patterns = " ".join(text for rule in rules for text in (rule.match, *rule.targets))
        self._literal = set(_DIGITS.findall(re.sub(r"\\\d|P<g\d+>", "", patterns)))
        self._known: dict[str, Place | None] = {}

    def place(self, name: str) -> Place:
        """A stored name's place."""
        parts = unwrapped(name).split(".")
        at = [i for i, p in enumerate(parts) if p.isdecimal() and p not in self._literal]
        numbers = {str((1 + i) * _SENTINEL): parts[j] for i, j in enumerate(at)}
        for sentinel, j in zip(numbers, at, strict=True):
            parts[j] = sentinel
        like = ".".join(parts)
        if like not in self._known:
            found = self._place(like)
            texts = (found.canonical, found.target, found.loaded.renamed, found.loaded.target)
            fits = all(_is_filled(text, numbers, self._literal) for text in texts)
            self._known[like] = found if fits else None
        known = self._known[like]
        return self._place(unwrapped(name)) if known is None else _filled(known, numbers)

    def _place(self, name: str) -> Place:
        loaded = self._renamer.load(name)
        known = self._architecture
        if known is None:
            return Place(loaded.renamed, loaded.target, loaded)
        if not _is_parameter(known, loaded.target) and template(name) in known.parameters:
            loaded = Loaded(name, name)  # it is a name of the model already; rules do not count
        return Place(relative(known, loaded.renamed), relative(known, loaded.target), loaded)


def _experts() -> Iterable[object]:
    """How mixtures of experts are mostly stored, for architectures that are not known."""
    for kind in ("qwen2_moe", "mixtral"):
        found = architecture_of({"model_type": kind})
        yield from (rule for rule in found.rules if rule.operations) if found else ()


def _is_filled(text: str, numbers: Mapping[str, str], literal: set[str]) -> bool:
    """True if each number of a result is one that was put in, or one that rules name."""
    allowed = numbers.keys() | literal
    return all(p in allowed for p in text.split(".") if p.isdecimal()) and not any(
        n in part and n != part for part in text.split(".") for n in numbers
    )


def _filled(place: Place, numbers: Mapping[str, str]) -> Place:
    """A place with the numbers that sentinels stand for."""

    def fill(text: str) -> str:
        return ".".join(numbers.get(part, part) for part in text.split("."))

    loaded = place.loaded
    renamed = fill(loaded.renamed)
    if loaded.converter is None:
        canonical = fill(place.canonical)
        return Place(canonical, canonical, Loaded(renamed, renamed))
    target = fill(loaded.target)
    made = Loaded(renamed, target, loaded.converter, loaded.source)
    return Place(fill(place.canonical), fill(place.target), made)


def _is_parameter(known: Architecture, name: str) -> bool:
    """True if the model has it, under this name or with the base model's prefix added or removed."""
    like = template(name)
    prefix = f"{known.base_prefix if known.is_base else known.prefix}."
    if like in known.parameters:
        return True
    return like.removeprefix(prefix) in known.parameters or prefix + like in known.parameters


def relative(known: Architecture, name: str) -> str:
    """A name of the model without the prefixes of the base model and of its text model."""
    prefix, text = known.prefix, known.text
    if known.is_base:
        inner = name.removeprefix(f"{known.base_prefix}.") if known.base_prefix else name
        if inner != name and template(name) not in known.parameters:
            name = inner
    elif prefix:
        name = name.removeprefix(f"{prefix}.")
        text = text.removeprefix(prefix).removeprefix(".")
    return name.removeprefix(f"{text}.") if text else name
