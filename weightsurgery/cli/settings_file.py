"""wsurg.toml: arguments from a file, so that `wsurg mix --ratio 0.3` is enough in its folder."""

from __future__ import annotations

import difflib
import sys
from typing import Any

import click

from weightsurgery.errors import FormatError, SettingError, StorageError, shown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_settings(path: str, ctx: click.Context) -> dict[str, Any]:
    """The settings of every command, as click's default_map.

    A key at the top of the file is for every command that has such an argument; a table named
    after a command is for that command alone, and wins. Keys are the long options (or the
    arguments' names), with dashes or underscores.

    Raises:
        StorageError: The file cannot be read.
        FormatError: It is not TOML.
        SettingError: A key is unknown.
    """
    try:
        with open(path, "rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise StorageError(f"cannot read: {error.strerror}", file=path) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"not valid TOML: {shown(error)}", file=path) from None
    group = ctx.command
    if not isinstance(group, click.Group):
        raise TypeError("settings files belong to the group")
    known = {name: _parameters(group.get_command(ctx, name)) for name in group.list_commands(ctx)}
    shared = {k: v for k, v in content.items() if not isinstance(v, dict)}
    for key in shared:
        _check(path, key, sorted({name for names in known.values() for name in names} | set(known)))
    for table, own in content.items():
        if isinstance(own, dict):
            _check(path, table, sorted(known), "command")
            for key in own:
                _check(path, key, sorted(known[table]), f"setting of {table}")
    return {
        command: {
            names[_plain(key)]: value
            for key, value in (*shared.items(), *content.get(command, {}).items())
            if _plain(key) in names
        }
        for command, names in known.items()
    }


def _plain(key: str) -> str:
    return key.replace("-", "_")


def _parameters(command: click.Command | None) -> dict[str, str]:
    """What a key may be called, to click's name of the parameter."""
    names: dict[str, str] = {}
    for parameter in command.params if command else []:
        if parameter.name is None:
            continue
        for spelled in (parameter.name, *parameter.opts):
            names[_plain(spelled.lstrip("-"))] = parameter.name
    return names


def _check(path: str, key: str, known: list[str], what: str = "setting") -> None:
    if _plain(key) in map(_plain, known):
        return
    near = difflib.get_close_matches(_plain(key), known, 1, 0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}"
    raise SettingError(f"unknown {what} '{shown(key)}'", file=path, hint=hint)
