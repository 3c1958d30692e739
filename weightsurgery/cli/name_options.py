"""Options that say how names correspond, and what is made of them."""

from __future__ import annotations

from collections.abc import Sequence

import click

from weightsurgery.errors import SettingError
from weightsurgery.formats.files import InputFile
from weightsurgery.formats.strict_json import parse_object

STRIP_PREFIX = click.Option(
    ["--strip-prefix"], metavar="PREFIX", default="", help="Ignore this prefix when pairing."
)


def _map_option(whose: str, what: str) -> click.Option:
    """The option that pairs names by hand."""
    text = (
        f"Pair {what} by hand: {whose} name and BASE's, or a JSON file "
        f'{{"{whose} name": "BASE\'s name"}}; repeatable.'
    )
    return click.Option(["--map", "name_map"], multiple=True, metavar="NAME=NAME", help=text)


NAMES = (STRIP_PREFIX, _map_option("TUNED's", "tensors"))
ADAPTER_NAMES = (STRIP_PREFIX, _map_option("the adapter's", "modules or tensors"))


def read_map(given: Sequence[str]) -> dict[str, str]:
    """What --map pairs: names joined by `=`, and JSON files; of two for one name the last.

    Args:
        given: The values of the option. One that ends in `.json`, or has no `=`, is a file.

    Raises:
        SettingError: A file gives something that is not a name.
    """
    found: dict[str, str] = {}
    for one in given:
        name, joined, other = one.partition("=")
        found |= {name: other} if joined and not one.endswith(".json") else _mapped_in(one)
    return found


def _mapped_in(path: str) -> dict[str, str]:
    """The pairs in a JSON file.

    Raises:
        SettingError: One gives something that is not a name.
    """
    file = InputFile(path)
    names = parse_object(file.read_all(1 << 28), file=file.path, what="name map")
    for tensor, other in names.items():
        if not isinstance(other, str):
            raise SettingError(
                "the name map gives no name", file=path, tensor=tensor, code="E-NAME-MAP"
            )
    return dict(names)
