"""The registry of operators: what `@operator` promises, and how settings are declared."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from weightsurgery.checkpoint import Checkpoint, Step, require_checkpoints
from weightsurgery.errors import SettingError, shown
from weightsurgery.stream import Engine


@dataclass(frozen=True)
class Setting:
    """What the command line needs to know of an operator's keyword argument.

    Attributes:
        help: One line.
        complement: Another option that gives one minus this value.
        metavar: How the value is called in the help.
        only_with: Other arguments, each with the values with which this one counts; for a
            checkpoint that may be left out, (True,) if it is given, (False,) if it is not. What
            does not count is not in the record, and the command line refuses to be told it.
    """

    help: str
    complement: str = ""
    metavar: str = ""
    only_with: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


Ratio = Annotated[
    float, Setting("share of eligible dimensions that is reset to BASE, 0 to 1", "reserve")
]
RatioFor = Annotated[
    tuple[tuple[str, float], ...],
    Setting("another ratio for the tensors that match GLOB; the last match wins", metavar="GLOB=R"),
]
Include = Annotated[
    tuple[str, ...], Setting("edit only tensors whose name matches GLOB", metavar="GLOB")
]
Exclude = Annotated[
    tuple[str, ...], Setting("do not edit tensors whose name matches GLOB", metavar="GLOB")
]
AllowNonfinite = Annotated[bool, Setting("let NaN and infinity pass through the arithmetic")]
StripPrefix = Annotated[str, Setting("ignore this prefix when pairing", metavar="PREFIX")]
NameMap = Annotated[
    tuple[tuple[str, str], ...],
    Setting("pairs the adapter's NAME, of a tensor or module, with BASE's", metavar="NAME=NAME"),
]
KeepMismatched = Annotated[
    bool, Setting("keep TUNED's tensor where the shapes differ, instead of refusing")
]
AllowPartial = Annotated[
    bool,
    Setting("continue even if less than 95 % of TUNED's parameters have a counterpart"),
]


@dataclass(frozen=True)
class Operator:
    """A registered operator.

    Attributes:
        name: The command's name: the function's, with dashes.
        function: The function itself.
        inputs: Names of its checkpoint arguments, in order.
        variadic: The last of them, if it takes any number of checkpoints, else "".
        optional: Name to declaration of the checkpoints that may be left out.
        settings: Name to (type, declaration, default) of its keyword arguments.
    """

    name: str
    function: Callable[..., Checkpoint]
    inputs: tuple[str, ...]
    variadic: str
    optional: Mapping[str, Setting]
    settings: Mapping[str, tuple[Any, Setting, Any]]

    def idle(self, name: str, given: Mapping[str, Any]) -> tuple[str, tuple[Any, ...]] | None:
        """Why an argument does not count: another one, and the values it would need; else None.

        Args:
            name: A setting, or a checkpoint that may be left out.
            given: All arguments by name; what is left out has its default.
        """
        declared = self.optional[name] if name in self.optional else self.settings[name][1]
        for other, values in declared.only_with.items():
            default = self.settings[other][2] if other in self.settings else None
            found = given.get(other, default)
            if (found is not None if other in self.optional else found) not in values:
                return other, values
        return None

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]


_OPTIONAL = Checkpoint | None
OPERATORS: dict[str, Operator] = {}
"""Every registered operator, by the name of its command."""


def operator(function: Callable[..., Checkpoint]) -> Callable[..., Checkpoint]:
    """Register a function from checkpoints to a checkpoint as an operator.

    Positional arguments are checkpoints, a starred one any number of them; keyword-only arguments
    are settings, or checkpoints that may be left out (`Annotated[Checkpoint | None, "help"] =
    None`). An `engine` argument, where there is one, says how to run folds and is not a setting.
    The result remembers the operator, its settings and its inputs, which is what the record of an
    output shows.

    Args:
        function: Every keyword-only argument but `engine` is annotated
            `Annotated[type, "help"]`, or with a `Setting` in place of the help.

    Returns:
        The function, registered in `OPERATORS` under its name with dashes; `engine` is optional.
    """
    hints = get_type_hints(function, include_extras=True)
    signature = inspect.signature(function)
    parameters = signature.parameters
    inputs = tuple(n for n, p in parameters.items() if p.kind is not p.KEYWORD_ONLY)
    variadic = next((n for n, p in parameters.items() if p.kind is p.VAR_POSITIONAL), "")
    declared = {
        name: (*_declared(hints[name]), parameter.default)
        for name, parameter in parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name != "engine"
    }
    optional = {n: setting for n, (kind, setting, _) in declared.items() if kind == _OPTIONAL}
    settings = {n: found for n, found in declared.items() if n not in optional}
    name = function.__name__.replace("_", "-")

    @functools.wraps(function)
    def recorded(
        *checkpoints: Checkpoint, engine: Engine | None = None, **given: Any
    ) -> Checkpoint:
        run = {"engine": engine or Engine()} if "engine" in parameters else {}
        given = {
            name: _checked(name, settings[name][0], _plain(value)) if name in settings else value
            for name, value in given.items()
        }
        bound = signature.bind(*checkpoints, **given, **run).arguments
        present = {n: bound[n] for n in (*inputs, *optional) if bound.get(n) is not None}
        present |= _numbered(variadic, present.pop(variadic, ()))
        require_checkpoints(*present.values())
        result = function(*checkpoints, **given, **run)
        full = {n: given.get(n, default) for n, (_, _, default) in settings.items()}
        counts = {n for n in (*optional, *settings) if made.idle(n, given) is None}
        told = _described({n: value for n, value in full.items() if n in counts})
        read = {n: one for n, one in present.items() if n not in optional or n in counts}
        return result.made_by(Step(name, told, read))

    made = OPERATORS[name] = Operator(name, recorded, inputs, variadic, optional, settings)
    return recorded


def _numbered(name: str, given: tuple[Checkpoint, ...]) -> dict[str, Checkpoint]:
    """Checkpoints under a plural's singular: adapter; or adapter 1, adapter 2 and so on."""
    one = name.removesuffix("s")
    return {one if len(given) == 1 else f"{one} {i}": c for i, c in enumerate(given, 1)}


def _plain(value: Any) -> Any:
    """A setting as plain Python, which a record can hold: numpy's numbers, lists, paths."""
    if isinstance(value, Mapping):
        value = tuple(value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    return value.item() if hasattr(value, "item") else value


def _described(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a record can hold them: what is more than a value describes itself."""
    return {n: v.to_json() if hasattr(v, "to_json") else v for n, v in settings.items()}


_EXPECTED = {bool: "True or False", int: "an integer", float: "a number", str: "a string"}


def _checked(name: str, kind: Any, value: Any) -> Any:
    """A setting of its declared type; one string stands for a tuple with one.

    Raises:
        SettingError: It is of another type.
    """
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise SettingError(
                f"{name} is '{shown(value)}'; expected {' or '.join(map(str, get_args(kind)))}"
            )
    elif get_origin(kind) is tuple:
        value = (value,) if isinstance(value, str) else value
        inner, *rest = get_args(kind)
        if not isinstance(value, tuple) or (rest != [...] and len(value) != len(get_args(kind))):
            raise SettingError(f"{name} is {shown(repr(value))}; expected a list")
        kinds = [inner] * len(value) if rest == [...] else get_args(kind)
        return tuple(_checked(name, k, v) for k, v in zip(kinds, value, strict=True))
    elif kind in _EXPECTED:
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise SettingError(f"{name} is {shown(repr(value))}; expected {_EXPECTED[kind]}")
    return value


def _declared(hint: Any) -> tuple[Any, Setting]:
    if get_origin(hint) is not Annotated:
        raise TypeError(f"a setting needs Annotated[type, help]; got {hint}")
    kind, declaration, *_ = get_args(hint)
    return kind, declaration if isinstance(declaration, Setting) else Setting(declaration)


def check_share(name: str, share: float) -> None:
    """Refuse what is not between 0 and 1.

    Raises:
        SettingError: The share is outside 0 to 1, or not a number.
    """
    if not 0 <= share <= 1:
        raise SettingError(f"{name} is {share}; expected a share from 0 to 1")
