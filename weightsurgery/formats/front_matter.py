"""Front matter of model cards: the keys that the card of an output repeats."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from weightsurgery.errors import SurgeryError, shown
from weightsurgery.formats.files import InputFile

KEYS = (
    *("license", "license_name", "license_link"),
    *("base_model", "base_model_relation", "pipeline_tag"),
)
_LIST_KEYS = ("license", "base_model")
_LONGEST_CARD = 4 << 20  # bytes looked at: evaluation results in front matter are long
_LONGEST_VALUE = 200  # characters
_MOST_VALUES = 20
_BLOCK = 8 << 10  # characters of one key with its value
_FENCE = "---"
_KEY = re.compile(r"""(["']?)([A-Za-z_]+)\1:(?=\s|$)""")


def read_front_matter(file: InputFile) -> tuple[dict[str, Any], list[str]]:
    """The keys of a model card's front matter that an output's card repeats.

    Only these keys are parsed, each by itself, whatever else the front matter holds.

    Args:
        file: A README.md, which is not trusted.

    Returns:
        Key to a text or a list of texts; and a warning for each key whose value is neither.
    """
    try:
        text = file.read_bytes(0, min(file.size, _LONGEST_CARD)).decode("utf-8", "replace")
    except SurgeryError as error:
        return {}, [f"README.md: {error.reason}"]
    found: dict[str, Any] = {}
    warnings = []
    for key, block in _blocks(text).items():
        value = _parsed(key, block)
        if is_card_value(key, value):
            found[key] = value
        elif value is not None:
            warnings.append(f"README.md: '{key}' is not copied: its value is not plain text")
    return found, warnings


def is_card_value(key: str, value: Any) -> bool:
    """True if a value is one that an output's card may repeat under a key."""
    several = value if isinstance(value, list) and key in _LIST_KEYS else [value]
    return (
        key in KEYS
        and 0 < len(several) <= _MOST_VALUES
        and all(isinstance(v, str) and 0 < len(v) <= _LONGEST_VALUE for v in several)
        and all(v.isprintable() and shown(v) == v for v in several)
    )


def card_of(inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The license and the task of an output.

    Args:
        inputs: What each input's card says, the edited model first.

    Returns:
        The first license that is stated, with its name and link, and the first task.
    """
    licensed = next((card for card in inputs.values() if "license" in card), {})
    found = {key: licensed[key] for key in KEYS if key.startswith("license") and key in licensed}
    task = next((card["pipeline_tag"] for card in inputs.values() if "pipeline_tag" in card), None)
    return found if task is None else {**found, "pipeline_tag": task}


def license_warning(inputs: Mapping[str, Mapping[str, Any]]) -> str:
    """A warning if inputs have different licenses, "" if not.

    Args:
        inputs: Each input's name to what its card says.
    """
    stated = {name: card["license"] for name, card in inputs.items() if "license" in card}
    if len({str(value) for value in stated.values()}) < 2:
        return ""
    each = ", ".join(f"{_joined(value)} ('{shown(name)}')" for name, value in stated.items())
    return f"the inputs have different licenses: {each}; the model card names the first"


def _joined(value: Any) -> str:
    return " and ".join(value) if isinstance(value, list) else str(value)


def _blocks(text: str) -> dict[str, str]:
    """The lines of each wanted key of the front matter, the first of each."""
    lines = text.removeprefix("\ufeff").splitlines()
    found: dict[str, str] = {}
    if not lines or lines[0].rstrip() != _FENCE:
        return found
    key = ""
    for line in lines[1:]:
        if line.rstrip() == _FENCE:
            return found
        named = _KEY.match(line)
        if named or not line.startswith((" ", "-", "\t")):
            key = named[2] if named and named[2] in KEYS and named[2] not in found else ""
        if key and len(found.get(key, "")) < _BLOCK:
            found[key] = f"{found.get(key, '')}{line[:_BLOCK]}\n"
    return {}  # no closing fence, so this is not front matter


def _parsed(key: str, block: str) -> Any:
    """A key's value, None if there is none; the block itself where it is not YAML."""
    import yaml

    try:
        value = yaml.safe_load(block)
    except (yaml.YAMLError, RecursionError, ValueError):
        return object()
    return value.get(key) if isinstance(value, dict) else object()
