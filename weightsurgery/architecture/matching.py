"""Counterparts: which elements of BASE are the same parameters as a tensor of TUNED's.

Both sides are brought to canonical names. A tensor's counterpart is, in this order: the tensor
that TUNED's ties make of it, the one of the same canonical name, the one that BASE's ties make of
it, and the pieces of BASE's tensors that the loading library makes the same parameters of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from weightsurgery.anatomy import natural_key
from weightsurgery.architecture.canonical import Names, read_names, relative, template
from weightsurgery.architecture.composite import find_architecture
from weightsurgery.architecture.facts import Architecture
from weightsurgery.architecture.ties import Ties, find_ties
from weightsurgery.checkpoint import Checkpoint, TensorView
from weightsurgery.errors import shown

if TYPE_CHECKING:
    from weightsurgery.architecture.pieces import Assembly, Link

Run = tuple[int, int]


@dataclass(frozen=True)
class Counterpart:
    """What BASE has for a tensor of TUNED's.

    Attributes:
        view: Its elements, in BASE's dtype; in TUNED's order and shape where `runs` are given.
        names: The tensors of BASE that they are read from.
        runs: The elements (start, stop) of TUNED's tensor that have a counterpart; () for a
            tensor that stands for another as a whole.
        note: What is worth reporting.
        links: Where the elements lie, if `runs` are given; `ours` is TUNED's tensor.
    """

    view: TensorView
    names: tuple[str, ...]
    runs: tuple[Run, ...] = ()
    note: str = ""
    links: tuple[Link, ...] = ()


@dataclass(frozen=True)
class Side:
    """One checkpoint, as the loading library sees it.

    Attributes:
        checkpoint: The checkpoint.
        names: Canonical names of its tensors.
        ties: Canonical names that are one tensor.
        known: Whether the facts are its own; False where they are the other side's.
    """

    checkpoint: Checkpoint
    names: Names
    ties: Ties
    known: bool

    def stored(self, canonical: str) -> str | None:
        """Return the stored tensor of a canonical name, or None."""
        return self.names.stored.get(canonical)

    def canonical(self, name: str) -> str:
        """The canonical name of a stored tensor."""
        return self.names.places[name].canonical

    def is_outside(self, name: str) -> bool:
        """True for a parameter that the class has outside of its base model, such as a head."""
        known, loaded = self.names.architecture, self.names.places[name].model_name
        return (
            known is not None
            and bool(known.prefix)
            and not loaded.startswith(f"{known.prefix}.")
            and template(loaded) in known.parameters
        )


def read_sides(base: Checkpoint, tuned: Checkpoint) -> tuple[Side, Side]:
    """BASE and TUNED as the loading library sees them.

    A side without a configuration, such as a single file or a fisher, is read with the other's
    facts.

    Args:
        base: The one.
        tuned: The other.
    """
    found = [find_architecture(side.config) for side in (base, tuned)]
    return (
        _side(base, found[0], found[1], tuned),
        _side(tuned, found[1], found[0], base),
    )


def _side(
    checkpoint: Checkpoint,
    own: Architecture | None,
    others: Architecture | None,
    other: Checkpoint,
) -> Side:
    borrowed = own is None and not checkpoint.config.get("model_type")
    architecture = others if borrowed else own
    config = other.config if borrowed else checkpoint.config
    ties = find_ties(architecture, config)
    return Side(checkpoint, read_names(checkpoint, architecture), ties, own is not None)


@dataclass
class Matcher:
    """Finds counterparts; made once for a pair of checkpoints.

    Attributes:
        base: BASE's side.
        tuned: TUNED's side.
        prefix: A prefix of canonical names that one side has and the other lacks; "" if none.
        prefix_on: "tuned" or "base": the side that has it.
        rival: Another prefix that pairs as many, None if there is none.
    """

    base: Side
    tuned: Side
    prefix: str = field(init=False, default="")
    prefix_on: str = field(init=False, default="")
    rival: str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.prefix, self.prefix_on, self.rival = _common_prefix(self.base, self.tuned)
        self._links: dict[str, dict[str, list[Link]]] = {}

    @cached_property
    def _mapped(self) -> frozenset[str]:
        """Names of TUNED's that the user gave to tensors of BASE: nothing else decides these."""
        step = self.base.checkpoint.step
        if step is None or step.operator != "rename":
            return frozenset()
        return frozenset(step.settings["names"].values()) & self.base.checkpoint.keys()

    @cached_property
    def made(self) -> tuple[Made, Made]:
        """What converters make of BASE's tensors, and of TUNED's."""
        shapes = [_shapes_in(side) for side in (self.base, self.tuned)]
        return (
            Made(self.base, {**shapes[1], **shapes[0]}),
            Made(self.tuned, {**shapes[0], **shapes[1]}),
        )

    def find(self, name: str, *, alone: bool = False) -> Counterpart | None:
        """What BASE has for a stored tensor of TUNED's.

        Args:
            name: TUNED's name.
            alone: True for a tensor that the configuration ties to another, but whose values
                differ: the loading library leaves it alone then.

        Returns:
            None where BASE has nothing for it.

        Raises:
            UnsupportedError: BASE has something, but its arrangement does not fit TUNED's.
        """
        if name in self._mapped:
            return self._plain(name)
        canonical = self.tuned.canonical(name)
        group = [canonical] if alone else self.tied_in_tuned(canonical)
        for one in group:
            found = self._in_base(one)
            if found is not None and self._is_same_shape(name, found):
                return self._plain(found, "" if one == canonical else "tied in TUNED")
        found = self._tied_in_base(canonical)
        if found is not None:
            return self._plain(found, "tied in BASE")
        converted = self._converted(name)
        if converted is not None:
            return converted
        found = next(filter(None, map(self._in_base, group)), None)
        return None if found is None else self._plain(found)

    def tied_in_tuned(self, canonical: str) -> list[str]:
        """The names that TUNED makes one tensor with a name, in the order in which BASE is asked.

        BASE may have them apart. The word embedding is what matters most, so the head comes last.
        """
        known = self.tuned.names.architecture
        head = relative(known, known.head) if known is not None and known.head else ""
        return sorted(self.tuned.ties.group(canonical), key=lambda name: name == head)

    def _is_same_shape(self, name: str, found: str) -> bool:
        return self.base.checkpoint[found].shape == self.tuned.checkpoint[name].shape

    def _plain(self, found: str, tied: str = "") -> Counterpart:
        note = f"{tied} to '{shown(found)}'" if tied else ""
        return Counterpart(self.base.checkpoint[found], (found,), note=note)

    def stored_in_base(self, name: str) -> str | None:
        """BASE's tensor of a name that TUNED need not have, by its name alone.

        Args:
            name: As TUNED would store it.
        """
        known = self.base.names.architecture
        return self._in_base(read_names([name], known).places[name].canonical)

    def _in_base(self, canonical: str) -> str | None:
        """BASE's tensor of a canonical name, with the prefix that one side has."""
        found = self.base.stored(canonical)
        if found is not None:
            return found
        mine = self.tuned.stored(canonical)
        if mine is not None and self.tuned.is_outside(mine):
            return None
        other = ""
        if self.prefix_on == "tuned" and canonical.startswith(self.prefix):
            other = canonical.removeprefix(self.prefix)
        elif self.prefix_on == "base":
            other = self.prefix + canonical
        if not other or self.tuned.stored(other) is not None:
            return None  # what TUNED has too belongs to that one
        return self.base.stored(other)

    def _tied_in_base(self, canonical: str) -> str | None:
        """What BASE's ties make of a name that it does not store."""
        ties = self.base.ties
        for one in ties.group(canonical):
            if one != canonical and self.base.stored(one) is not None:
                return self.base.stored(one)
        if self.base.known or canonical not in ties.possible:
            return None
        # Without a configuration: that it does not store the head says that it is tied.
        return self.base.stored(ties.possible[canonical])

    def _converted(self, name: str) -> Counterpart | None:
        """A view of the pieces that the loading library makes the same parameters of."""
        from weightsurgery.architecture.views import linked_view  # most models need none

        theirs, mine = self.made
        links: list[Link] = []
        for target in mine.targets_of(name):
            if not mine.makes(target) and not theirs.makes(target):
                continue  # both store it as it is
            if target not in self._links:
                self._links[target] = _linked(mine.assembly(target), theirs.assembly(target))
            links += self._links[target].get(name, [])
        if not links:
            return None
        base, like = self.base.checkpoint, self.tuned.checkpoint[name]
        names = sorted({link.theirs for link in links}, key=natural_key)
        view, runs = linked_view(like, links, {one: base[one] for one in names})
        many = f"made of {len(names):,} tensors of BASE" if len(names) > 1 else ""
        note = many or f"a part of '{names[0]}' in BASE"
        return Counterpart(view, tuple(names), runs, note, tuple(links))


def _linked(ours: Assembly | None, theirs: Assembly | None) -> dict[str, list[Link]]:
    from weightsurgery.architecture.pieces import link

    if ours is None or theirs is None:
        return {}
    found: dict[str, list[Link]] = {}
    for one in link(ours, theirs):
        found.setdefault(one.ours, []).append(one)
    return found


def _shapes_in(side: Side) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's tensors that a side stores as they are loaded."""
    return {
        place.canonical: side.checkpoint[name].shape
        for name, place in side.names.places.items()
        if place.converter is None
    }


class Made:
    """The model's tensors that converters make of a side's stored ones.

    Args:
        side: The checkpoint.
        shapes: Shapes of the model's tensors, on which some conversions depend; None for those
            that the side has itself.
    """

    def __init__(self, side: Side, shapes: dict[str, tuple[int, ...]] | None = None) -> None:
        self._side = side
        self._groups: dict[tuple[int, str], dict[str, list[str]]] = {}
        for name, place in side.names.places.items():
            if place.converter is not None:
                key = (id(place.converter), place.target)
                group = self._groups.setdefault(key, {})
                group.setdefault(place.source, []).append(name)
        self._by_target: dict[str, tuple[int, str]] = {}
        for key, group in self._groups.items():
            rule = side.names.places[next(iter(group.values()))[0]].converter
            for pattern in rule.targets if rule else ():
                target = key[1].replace(rule.targets[0], pattern, 1) if rule else ""
                self._by_target.setdefault(target, key)
        self._shapes = _shapes_in(side) if shapes is None else shapes
        self._outputs: dict[tuple[int, str], dict[str, Assembly]] = {}

    def targets_of(self, name: str) -> list[str]:
        """Canonical names of the model's tensors that a stored one becomes part of.

        Args:
            name: The stored one's.
        """
        place = self._side.names.places[name]
        if place.converter is None:
            return [place.canonical]
        outputs = self._output(id(place.converter), place.target)
        return [t for t, one in outputs.items() if any(p.stored == name for p in one.pieces)]

    def makes(self, target: str) -> bool:
        """True if a converter makes this tensor of the model."""
        return target in self._by_target

    def assembly(self, target: str) -> Assembly | None:
        """A tensor of the model as pieces of stored ones, None if the side does not have it."""
        if target in self._by_target:
            return self._output(*self._by_target[target]).get(target)
        name = self._side.stored(target)
        if name is None or self._side.names.places[name].converter is not None:
            return None
        from weightsurgery.architecture.pieces import whole

        return whole(name, self._side.checkpoint[name].shape)

    def _output(self, rule: int, target: str) -> dict[str, Assembly]:
        from weightsurgery.architecture.assembly import assemble
        from weightsurgery.architecture.pieces import whole

        key = (rule, target)
        if key not in self._outputs:
            names, view = self._side.names, self._side.checkpoint
            group = self._groups[key]
            converter = names.places[next(iter(group.values()))[0]].converter
            if converter is None:
                raise ValueError("only converters make groups")
            sources = {
                pattern: [whole(n, view[n].shape) for n in sorted(found, key=natural_key)]
                for pattern, found in group.items()
            }
            self._outputs[key] = assemble(
                converter, target, sources, shapes=self._shapes, config=view.config
            )
        return self._outputs[key]


def _common_prefix(base: Side, tuned: Side) -> tuple[str, str, str | None]:
    """The prefix that pairs most of the names that only one side has, its side, and a rival."""
    votes: Counter[tuple[str, str]] = Counter()
    for longer, shorter, side in ((tuned, base, "tuned"), (base, tuned, "base")):
        free = {
            canonical: name
            for canonical, name in shorter.names.stored.items()
            if longer.stored(canonical) is None and not shorter.is_outside(name)
        }
        for canonical, name in longer.names.stored.items():
            if shorter.stored(canonical) is not None or longer.is_outside(name):
                continue  # a head goes with no other head
            shape = longer.checkpoint[name].shape
            for rest in endings(canonical):
                if rest in free and shorter.checkpoint[free[rest]].shape == shape:
                    votes[canonical[: -len(rest)], side] += 1
    if not votes:
        return "", "", None
    first, *others = sorted(votes, key=lambda vote: (-votes[vote], len(vote[0]), vote))
    rival = others[0][0] if others and votes[others[0]] == votes[first] else None
    return *first, rival


def endings(name: str) -> Iterator[str]:
    """Every dotted ending: a.b.c gives b.c and c.

    Args:
        name: A tensor's.
    """
    dot = name.find(".")
    while dot >= 0:
        yield name[dot + 1 :]
        dot = name.find(".", dot + 1)
