"""Which dictionary of a PyTorch file holds the weights.

A training saves more than one thing in a file: the weights, an average of them, the optimizer,
settings. A state dict is a dictionary that holds tensors; those nearest to the top are looked at,
and where there are several the user chooses.
"""

from __future__ import annotations

from typing import Any

from weightsurgery.errors import FormatError, PolicyError, SettingError, counted, first_few, shown
from weightsurgery.formats.pickle_values import Opaque
from weightsurgery.formats.torch_globals import Foreign, Tensor

TOP = "."  # the name of the outermost dictionary
_DEEPEST = 4
_MOST = 1000  # dictionaries that are looked into
_LISTED = 5


def choose(root: Any, key: str | None, file: str) -> tuple[dict[Any, Any], list[str]]:
    """The entries of the state dict that is meant.

    Args:
        root: What the file holds.
        key: The state dict's name; None where there is one alone.
        file: The file, for messages.

    Returns:
        Names to tensors, and warnings about all else that the file holds.

    Raises:
        FormatError: It holds no state dict.
        PolicyError: It holds several.
        SettingError: None has that name.
    """
    levels = _levels(root)
    found = {name: one for level in levels for name, one in level.items()}
    if not found:
        raise FormatError(
            f"it holds no dictionary of tensors, but {describe(root)}",
            file=file,
            hint="expected a state dict, such as torch.save(model.state_dict(), …) writes",
            code="E-PICKLE-LOAD",
        )
    if key is None:
        first = levels[0]
        if TOP in first and len(levels) > 1:  # tensors of its own, and dictionaries of tensors
            first = {**first, **levels[1]}
        if len(first) > 1:
            raise PolicyError(
                f"ambiguous weights: it holds the state dicts {_named(first)}",
                file=file,
                hint="choose one with --key NAME",
                code="E-PICKLE-SEVERAL",
            )
        (key,) = first
    elif key not in found:
        raise SettingError(
            f"no state dict '{shown(key)}' in this file; it holds {_named(found)}",
            file=file,
            code="E-KEY-NAME",
        )
    chosen = found[key]
    entries = {name: value for name, value in chosen.items() if isinstance(value, Tensor | Foreign)}
    return entries, [*_skipped(root, found, key), *_others(chosen, key)]


def _levels(root: Any) -> list[dict[str, dict[Any, Any]]]:
    """State dicts by name, for each depth at which there are any."""
    levels: list[dict[str, dict[Any, Any]]] = []
    seen: set[int] = set()
    here = {TOP: root} if type(root) is dict else {}
    for _ in range(_DEEPEST):
        found = {name: one for name, one in here.items() if _holds_tensors(one)}
        levels += [found] if found else []
        below: dict[str, dict[Any, Any]] = {}
        for name, one in here.items():
            # Of a state dict's own entries only the outermost's are others: `ema` beside tensors.
            if (name in found and name != TOP) or _is_optimizer(one):
                continue
            for key, value in one.items():
                if type(key) is str and type(value) is dict and id(value) not in seen:
                    if len(seen) >= _MOST:
                        break
                    seen.add(id(value))
                    below[key if name == TOP else f"{name}.{key}"] = value
        here = below
    return levels


def _holds_tensors(value: dict[Any, Any]) -> bool:
    return any(isinstance(one, Tensor | Foreign) for one in value.values())


def _is_optimizer(value: dict[Any, Any]) -> bool:
    return "param_groups" in value and "state" in value


def _skipped(root: dict[Any, Any], found: dict[str, Any], key: str) -> list[str]:
    """A warning of what lies beside the chosen state dict."""
    if key == TOP:
        others = [name for name in found if name != TOP]
        return [f"state dicts that were not read: {_listed(others)}"] if others else []
    chosen = found[key]
    others = [
        f"'{shown(name)}' ({describe(value)})"
        for name, value in root.items()
        if value is not chosen and not (type(name) is str and key.startswith(f"{name}."))
    ]
    inner = [
        f"'{shown(name)}'"
        for name, value in found.items()
        if "." in name and value is not chosen and root.get(name) is not value
    ]
    if not others and not inner:
        return []
    return [f"read the state dict '{shown(key)}'; skipped {_listed([*others, *inner])}"]


def _others(chosen: dict[Any, Any], key: str) -> list[str]:
    """A warning of entries of the state dict that are not tensors."""
    names = [
        f"'{shown(name)}' ({describe(value)})"
        for name, value in chosen.items()
        if not isinstance(value, Tensor | Foreign)
        # `_skipped` tells of a state dict beside the tensors of the outermost.
        and not (key == TOP and type(value) is dict and _holds_tensors(value))
    ]
    return [f"skipped entries that are not tensors: {_listed(names)}"] if names else []


def describe(value: Any) -> str:
    """What a value is, in a word.

    Example:
        >>> describe(3), describe(Opaque("argparse.Namespace")), describe({})
        ('int', 'argparse.Namespace', 'dict')
    """
    if isinstance(value, Opaque):
        return shown(value.name)
    return type(value).__name__


def _named(found: dict[str, dict[Any, Any]]) -> str:
    texts = [f"'{shown(name)}' ({counted(_tensors(one), 'tensor')})" for name, one in found.items()]
    return first_few(texts)


def _tensors(one: dict[Any, Any]) -> int:
    return sum(isinstance(value, Tensor | Foreign) for value in one.values())


def _listed(texts: list[str]) -> str:
    return ", ".join(texts[:_LISTED]) + (
        f" and {len(texts) - _LISTED:,} more" if len(texts) > _LISTED else ""
    )
