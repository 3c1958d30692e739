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
from functools import cached_property

from weightsurgery.architecture.conversion import Loaded, Renamer
from weightsurgery.architecture.facts import Architecture, Rule, architecture_of, legacy_rules

# Left in names by FSDP, activation checkpointing, torch.compile, FairScale and PEFT.
_WRAPPERS = frozenset(
    (
        *("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"),
        *("_fpw_module", "_forward_module", "base_layer"),
    )
)
_ALONE = frozenset(("module", "base_model"))  # what may be a wrapper's in front
_FRONT = ("module",)  # DistributedDataParallel and DeepSpeed: only in front of all else
_LEAVES = (["weight"], ["bias"])  # of a module that is itself called `module`
_ADAPTED = ("base_model", "model")  # PEFT's, in front of the model's own names
_DIGITS = re.compile(r"\d+")
_MOST_NUMBERS = 32  # per name; any further ones are treated as words
# Stand for a name's numbers while rules look at it.
_SENTINELS = tuple(str(90_010 * (1 + i)) for i in range(_MOST_NUMBERS))
_PLACES = {sentinel: i for i, sentinel in enumerate(_SENTINELS)}


@dataclass(frozen=True)
class Form:
    """What all names become that differ only in their numbers.

    Attributes:
        loaded: What the loading library does with them, sentinels in place of the numbers.
        canonical: The canonical name, likewise.
        target: Canonical name of the model's tensor that they become part of, likewise.
    """

    loaded: Loaded
    canonical: str
    target: str

    @cached_property
    def pattern(self) -> tuple[str, tuple[int, ...]]:
        """The canonical name as a format string, and the places of the numbers that go in."""
        parts, picks = [], []
        for part in self.canonical.split("."):
            place = _PLACES.get(part)
            parts.append(part.replace("%", "%%") if place is None else "%s")
            picks += [] if place is None else [place]
        return ".".join(parts), tuple(picks)


@dataclass(frozen=True)
class Place:
    """What a stored tensor is in the model.

    Attributes:
        canonical: Its canonical name.
        form: What it has in common with names that differ only in their numbers.
        numbers: Its numbers; () where the form is the name's own.
    """

    canonical: str
    form: Form
    numbers: tuple[str, ...] = ()

    @property
    def converter(self) -> Rule | None:
        """The rule that makes it a part of another tensor, None if it is loaded as it is."""
        return self.form.loaded.converter

    @property
    def source(self) -> str:
        """Which of the converter's source patterns it matches."""
        return self.form.loaded.source

    @property
    def target(self) -> str:
        """Canonical name of the model's tensor that it becomes, or the first one it is part of."""
        return _filled(self.form.target, self.numbers)

    @property
    def model_name(self) -> str:
        """The model's own name for that tensor, prefixes included."""
        return _filled(self.form.loaded.target, self.numbers)


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
    while len(parts) > 1 and parts[0] in _FRONT and parts[1:] not in _LEAVES:
        del parts[0]
    if tuple(parts[:2]) == _ADAPTED and len(parts) > 3:
        del parts[:2]
    return ".".join(parts)


def _is_wrapped(name: str) -> bool:
    parts = name.split(".")
    return parts[0] in _ALONE or not _WRAPPERS.isdisjoint(parts)


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
        The places. Where two stored names would be one tensor, the loading library reads the one
        without wrapper segments; the other keeps its own name.
    """
    names = sorted(names, key=_is_wrapped)  # stable: what the loading library reads comes first
    reader = _Reader(architecture, names)
    places: dict[str, Place] = {}
    stored: dict[str, str] = {}
    ambiguous = []
    for name in names:
        place = reader.place(name)
        if place.canonical in stored:
            ambiguous.append(name)
            place = Place(name, Form(Loaded(name, name), name, name))
        places[name] = place
        stored.setdefault(place.canonical, name)
    return Names(architecture, places, stored, tuple(ambiguous))


class _Reader:
    """Places of names; rules look once at names that differ only in their numbers."""

    def __init__(self, architecture: Architecture | None, names: list[str]) -> None:
        self._architecture = architecture
        rules = architecture.rules if architecture else (*_experts(names), *legacy_rules())
        self._renamer = Renamer(rules, map(unwrapped, names))
        patterns = " ".join(text for rule in rules for text in (rule.match, *rule.targets))
        self._literal = set(_DIGITS.findall(re.sub(r"\\\d|P<g\d+>", "", patterns)))
        self._forms: dict[str, tuple[Form, bool]] = {}

    def place(self, name: str) -> Place:
        """A stored name's place."""
        parts = name.split(".")
        if parts[0] in _ALONE or not _WRAPPERS.isdisjoint(parts):
            parts = unwrapped(name).split(".")
        plain = parts[:]
        numbers: list[str] = []
        for i, part in enumerate(parts):
            if part.isdecimal() and part not in self._literal and len(numbers) < _MOST_NUMBERS:
                parts[i] = _SENTINELS[len(numbers)]
                numbers.append(part)
        like = ".".join(parts)
        if like not in self._forms:
            form = self._form(like)
            self._forms[like] = form, _keeps_numbers(form, len(numbers), self._literal)
        form, is_kept = self._forms[like]
        if not numbers:
            return Place(form.canonical, form)
        if not is_kept:
            form = self._form(".".join(plain))
            return Place(form.canonical, form)
        text, picks = form.pattern
        return Place(text % tuple(numbers[i] for i in picks), form, tuple(numbers))

    def _form(self, name: str) -> Form:
        loaded, known = self._renamer.load(name), self._architecture
        if known is None:
            return Form(loaded, loaded.renamed, loaded.target)
        if not _is_parameter(known, loaded.target) and template(name) in known.parameters:
            loaded = Loaded(name, name)  # it is a name of the model already; rules do not count
        return Form(loaded, relative(known, loaded.renamed), relative(known, loaded.target))


def _experts(names: Iterable[str]) -> Iterable[Rule]:
    """How mixtures of experts are mostly stored, for architectures that are not known."""
    if not any("experts" in name for name in names):
        return
    for kind in ("qwen2_moe", "mixtral"):
        found = architecture_of({"model_type": kind})
        yield from (rule for rule in found.rules if rule.operations) if found else ()


def _keeps_numbers(form: Form, count: int, literal: set[str]) -> bool:
    """True if what became of a name has its numbers as they were put in, and rules' own at most."""
    known = set(_SENTINELS[:count])
    for text in (form.canonical, form.target, form.loaded.target):
        for part in text.split("."):
            if part.isdecimal() and part not in known and part not in literal:
                return False
            if part not in known and any(number in part for number in known):
                return False
    return True


def _filled(text: str, numbers: tuple[str, ...]) -> str:
    """A text with the numbers that sentinels stand for."""
    known = dict(zip(_SENTINELS, numbers, strict=False))
    return ".".join(known.get(part, part) for part in text.split("."))


def _is_parameter(known: Architecture, name: str) -> bool:
    """True if the model has it, perhaps with the base model's prefix added or removed."""
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
        inner = name.removeprefix(f"{prefix}.")
        twice = inner != name and template(inner) in known.parameters
        name = inner.removeprefix(f"{prefix}.") if twice else inner  # bert.bert. loads as bert.
        text = text.removeprefix(prefix).removeprefix(".")
    return name.removeprefix(f"{text}.") if text else name
