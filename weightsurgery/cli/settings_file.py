"""wsurg.toml: arguments from a file, so that `wsurg mix --ratio 0.3` is enough in its folder."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click

from weightsurgery.cli.options import Complement, ShareOrFile, Size
from weightsurgery.errors import FormatError, SettingError, shown
from weightsurgery.formats.files import InputFile

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_MAX_BYTES = 1 << 20  # of a settings file
_MAX_BITS = 64  # of a number in it; int() and float() refuse or overflow far beyond
# Click converts what it can: true to 1, 1.7 to 1, 3 to "3". In a file that is a mistake.
_KINDS: tuple[tuple[type[Any], tuple[type, ...], str], ...] = (
    (click.types.BoolParamType, (bool,), "true or false"),
    (click.types.IntParamType, (int,), "an integer"),
    (click.types.FloatParamType, (int, float), "a number"),
    (Complement, (int, float, str), "a number"),
    (Size, (int, str), "a size such as '5GB'"),
    (ShareOrFile, (int, float, str), "a share or a file"),
    (click.ParamType, (str,), "a string"),
)


@dataclass(frozen=True)
class _Key:
    """What a key of the file stands for.

    Attributes:
        parameter: Click's parameter.
        inverted: Whether the key is the opposite of it, as `no-hash` is.
    """

    parameter: click.Parameter
    inverted: bool = False


def read_settings(path: str, ctx: click.Context) -> dict[str, Any]:
    """The settings of every command, as click's default_map.

    A key at the top of the file is for every command that has such an argument; a table named
    after a command is for that command alone, and wins. Keys are the long options (or the
    arguments' names), with dashes or underscores.

    Raises:
        StorageError: The file cannot be read.
        FormatError: It is not a regular file, too large, or not TOML.
        SettingError: A key is unknown, or its value is of the wrong type.
    """
    content = _read(path)
    group = ctx.command
    if not isinstance(group, click.Group):
        raise TypeError("settings files belong to the group")
    known = {name: _keys(group.get_command(ctx, name)) for name in group.list_commands(ctx)}
    commands = {_plain(name): name for name in known}
    everywhere = sorted({key for keys in known.values() for key in keys})
    settings: dict[str, dict[str, Any]] = {name: {} for name in known}
    for key, value in content.items():
        if isinstance(value, dict):
            continue
        if _plain(key) in commands and _plain(key) not in everywhere:
            raise SettingError(
                f"'{shown(key)}' is {_described(value)}; it is a command, so expected a table",
                file=path,
                hint=f"begin one with [{shown(key)}]",
                code="E-SETTINGS-FILE",
            )
        _check(path, key, everywhere)
        for command, keys in known.items():
            if _plain(key) not in getattr(group.get_command(ctx, command), "own", ()):
                settings[command].update(_setting(path, key, key, value, keys))
    for table, own in content.items():  # after the others, so that tables win
        if isinstance(own, dict):
            _check(path, table, sorted(known), "command")
            command = commands[_plain(table)]
            for key, value in own.items():
                _check(path, key, sorted(known[command]), f"setting of {command}")
                label = f"{command}.{key}"
                settings[command].update(_setting(path, label, key, value, known[command]))
    return settings


def _read(path: str) -> dict[str, Any]:
    data = InputFile(path).read_all(_MAX_BYTES)
    try:
        return tomllib.loads(data.decode("utf-8"))
    # ValueError: not TOML, not UTF-8, or a decimal number of more digits than int() takes.
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not valid TOML: {shown(error)}", file=path, code="E-TOML") from None


def _plain(key: str) -> str:
    return key.replace("-", "_")


def _keys(command: click.Command | None) -> dict[str, _Key]:
    """What a key may be called, and what it then stands for."""
    keys: dict[str, _Key] = {}
    for parameter in command.params if command else []:
        for spelled in parameter.opts:
            if spelled.startswith("--") or isinstance(parameter, click.Argument):
                keys[_plain(spelled.lstrip("-"))] = _Key(parameter)
        for spelled in parameter.secondary_opts:
            keys[_plain(spelled.lstrip("-"))] = _Key(parameter, inverted=True)
    return keys


def _check(path: str, key: str, known: list[str], what: str = "setting") -> None:
    if _plain(key) in map(_plain, known):
        return
    near = difflib.get_close_matches(_plain(key), known, 1, 0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}"
    raise SettingError(
        f"unknown {what} '{shown(key)}'", file=path, hint=hint, code="E-SETTING-UNKNOWN"
    )


def _setting(
    path: str, label: str, key: str, value: Any, keys: Mapping[str, _Key]
) -> dict[str, Any]:
    """Click's name of the parameter to its value; empty for a command that has no such key."""
    found = keys.get(_plain(key))
    if found is None:
        return {}
    parameter = found.parameter
    several = getattr(parameter, "multiple", False) or parameter.nargs == -1
    if several and not isinstance(value, list):
        value = [value]
    kinds, expected = next(
        (kinds, words) for kind, kinds, words in _KINDS if isinstance(parameter.type, kind)
    )
    for item in value if several else [value]:
        if not _is_one(item, kinds):
            raise SettingError(
                f"'{shown(label)}' is {_described(item)}; expected "
                + (f"{expected}, or a list of such" if several else expected),
                file=path,
                code="E-SETTINGS-FILE",
            )
    return {parameter.name or "": not value if found.inverted else value}


def _is_one(value: Any, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool) or bool in kinds:  # a bool is an int to isinstance
        return isinstance(value, bool) and bool in kinds
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        return False
    return isinstance(value, kinds) and not (isinstance(value, str) and "\0" in value)


def _described(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        return f"a number of {value.bit_length():,} bits"  # str() refuses very long ones
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    return shown(repr(value) if isinstance(value, str) else value)
