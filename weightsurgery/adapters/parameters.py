"""BASE's parameters, by the names that an adapter gives them.

An adapter names modules of the model in memory; the version that trained it decides how. BASE
stores the parameters as some version wrote them, perhaps several as one tensor, or one as several.
Both are brought to canonical names, as pairs of models are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from weightsurgery.adapters.missing import explain, some_fit
from weightsurgery.adapters.naming import Naming
from weightsurgery.adapters.split import find_slice
from weightsurgery.architecture.canonical import Place, read_names, template
from weightsurgery.architecture.conversion import UnsupportedError
from weightsurgery.architecture.matching import Counterpart, Made, Matcher, endings, read_sides
from weightsurgery.architecture.pieces import Link
from weightsurgery.checkpoint import Checkpoint, TensorView
from weightsurgery.dtypes import DTYPES
from weightsurgery.errors import FormatError, MismatchError, SettingError, shown
from weightsurgery.formats.layout import ADAPTER
from weightsurgery.kernels import Block

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model, as the adapter sees it.

    Attributes:
        view: Its elements in BASE; BASE's own tensor where that is the parameter.
        links: Where its elements lie in BASE's tensors, `ours` being the parameter; () for a tensor
            of BASE's own.
    """

    view: TensorView
    links: tuple[Link, ...] = ()


class Parameters:
    """Finds the parameters that an adapter is about.

    Args:
        base: The model.
        adapter: The adapter, for messages.
        shapes: Each name that will be looked for, with the shape that the adapter's tensors tell;
            None where they tell none.
        naming: How the adapter's names correspond to BASE's.

    Raises:
        SettingError: Two of its names become one.
    """

    def __init__(
        self,
        base: Checkpoint,
        adapter: Checkpoint,
        shapes: Mapping[str, Shape | None],
        naming: Naming,
    ) -> None:
        self.base, self.adapter = base, adapter
        self._names = {name: naming.translated(name, base) for name in shapes}
        self._refuse_clashes()
        shapes = {self._names[name]: shape for name, shape in shapes.items()}
        wanted = {name: _view(name, shape or ()) for name, shape in shapes.items()}
        ours, _ = read_sides(base, Checkpoint(wanted))
        made = Made(ours)
        places = read_names(wanted, ours.names.architecture).places
        for name, shape in shapes.items():
            if shape is None:
                wanted[name] = _view(name, _shape(made, places[name].target))
        seen = set()  # one part is enough to derive the others
        for name in shapes:
            if places[name].target not in seen:
                seen.add(places[name].target)
                for sibling in _siblings(wanted[name], places[name], made):
                    wanted.setdefault(sibling.name, sibling)
        self._matcher = Matcher(*read_sides(base, Checkpoint(wanted)))
        self._found: dict[str, Parameter | UnsupportedError | None] = {}
        self._refuse_rivals()

    def _refuse_clashes(self) -> None:
        """Refuse two names that become one in BASE.

        Raises:
            SettingError: There are two.
        """
        count = Counter(self._names.values())
        twice = [name for name, new in self._names.items() if count[new] > 1]
        if twice:
            raise SettingError(
                f"two of its names become '{shown(self._names[twice[0]])}' in BASE: "
                + " and ".join(f"'{shown(name)}'" for name in twice[:2]),
                file=self.adapter.label,
                hint="map each to a name of its own",
                code="E-NAME-MAP",
            )

    def _refuse_rivals(self) -> None:
        """Refuse names that two prefixes of BASE's fit alike.

        Raises:
            MismatchError: There are two.
        """
        prefix, rival = self._matcher.prefix, self._matcher.rival
        if rival is not None:
            prefixes = " and ".join(sorted(f"'{shown(one)}'" for one in (prefix, rival)))
            raise MismatchError(
                f"its names match BASE's by the prefixes {prefixes} alike; expected one",
                file=self.adapter.label,
                hint="give its tensors the names of BASE's",
                code="E-ADAPTER-PREFIX",
            )

    def is_shared(self, name: str) -> bool:
        """True if several layers of the model may use a tensor of BASE's.

        Args:
            name: BASE's name for it.
        """
        side = self._matcher.base
        return template(side.canonical(name)) in side.ties.numbered

    def find(self, name: str) -> Parameter | None:
        """The parameter of a name, None if BASE has no such one.

        Args:
            name: One of those that were given.

        Raises:
            MismatchError: BASE has it, in an arrangement that does not fit.
        """
        name = self._names.get(name, name)
        if name not in self._found:
            try:
                self._found[name] = self._look(name)
            except UnsupportedError as error:
                # Of a parameter whose shape the adapter does not tell, as it is stored will do.
                as_stored = self._matcher.stored_in_base(name)
                known = self._matcher.tuned.checkpoint[name].shape or as_stored is None
                self._found[name] = error if known else Parameter(self.base[as_stored or ""])
        found = self._found[name]
        if isinstance(found, UnsupportedError):
            raise MismatchError(
                f"BASE has '{shown(name)}', but its arrangement does not fit: {found}",
                file=self.adapter.label,
                hint="merge it with the library that made it",
                code="E-ADAPTER-TARGET",
            )
        return found

    def _look(self, name: str) -> Parameter | None:
        found = self._matcher.find(name, alone=True) or self._in_another_layer(name)
        if found is not None and found.links:
            return Parameter(replace(found.view, name=name), found.links)
        if found is not None:
            return Parameter(found.view)
        wanted = self._matcher.tuned.checkpoint[name]
        cut = find_slice(self.base, self._matcher, name, wanted.shape)
        return None if cut is None else Parameter(*cut)

    def _in_another_layer(self, name: str) -> Counterpart | None:
        """What BASE stores for a layer that shares its weights with another one."""
        base, wanted = self._matcher.base, self._matcher.tuned.canonical(name)
        if template(wanted) not in base.ties.numbered:
            return None
        shape = self._matcher.tuned.checkpoint[name].shape
        alike = (s for n, s in base.names.stored.items() if template(n) == template(wanted))
        stored = next((one for one in alike if self.base[one].shape == shape), None)
        return None if stored is None else Counterpart(self.base[stored], (stored,))

    def need(self, name: str, view: TensorView) -> Parameter:
        """The parameter of a name.

        Args:
            name: One of those that were given.
            view: The adapter's tensor that is about it, for messages.

        Raises:
            FormatError: Another name means the same parameter.
            MismatchError: BASE has no such one.
        """
        found = self.find(name)
        if found is not None:
            return found
        own, name = name, self._names.get(name, name)
        if self._is_twice(name):
            raise FormatError(
                "another of its names adapts the same tensor of BASE; expected one of the two",
                file=self.adapter.label,
                tensor=view.name,
                code="E-ADAPTER-TENSOR",
            )
        place = self.adapter.layout.get(view.name, ADAPTER)
        reason, hint = explain(self._matcher, name, self.adapter, is_mapped=own != name)
        if place != ADAPTER:
            hint = hint or "move the file out of the folder to merge the adapter without it"
        raise MismatchError(
            f"BASE has no '{shown(name)}' that it could adapt{reason}",
            file=self.adapter.label if place == ADAPTER else f"{self.adapter.label}/{place}",
            tensor=view.name,
            hint=hint,
            code="E-ADAPTER-TARGET",
        )

    def _is_twice(self, name: str) -> bool:
        """True if another of the names means the same, with or without a prefix."""
        side = self._matcher.tuned
        shorter = map(side.stored, endings(side.canonical(name)))
        return name in side.names.ambiguous or any(shorter)

    @cached_property
    def some_fit(self) -> bool:
        """True if BASE has something that the adapter is about, in its size."""
        return some_fit(self._matcher)


def _siblings(view: TensorView, place: Place, made: Made) -> list[TensorView]:
    """The other parts of a tensor that loading makes of several, which an adapter may lack.

    Adapters may be of some experts alone, or of one of two projections that are one in the model.
    """
    before, star, after = place.source.partition("*")
    at = view.name.rfind(before) if star and place.converter is not None else -1
    experts = _shape(made, place.target)[:1]
    if at < 0 or not experts:
        return []
    number, _, rest = view.name[at + len(before) :].partition(after)
    if not number.isdecimal():
        return []
    found = []
    for source in place.converter.sources if place.converter is not None else ():
        front, _, back = source.partition("*")
        found += [
            _view(f"{view.name[:at]}{front}{expert}{back}{rest}", view.shape)
            for expert in range(experts[0])
        ]
    return found


def _shape(made: Made, target: str) -> Shape:
    try:
        known = made.assembly(target)
    except UnsupportedError:  # reported when the parameter is looked up
        return ()
    return known.shape if known is not None else ()


def _view(name: str, shape: Shape) -> TensorView:
    def read_both(_start: int, _stop: int) -> tuple[Block, Block]:
        raise ValueError("a wanted parameter has no values")

    return TensorView(name, shape, DTYPES["F32"], read_both)
