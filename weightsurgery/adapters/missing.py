"""What to say of a parameter that an adapter is about and BASE lacks, or has in another shape."""

from __future__ import annotations

import difflib

from weightsurgery.adapters.task_head import ending_of, find_unstored
from weightsurgery.anatomy import kind_of
from weightsurgery.architecture.canonical import template
from weightsurgery.architecture.conversion import UnsupportedError
from weightsurgery.architecture.facts import class_of
from weightsurgery.architecture.matching import Matcher
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.errors import counted, first_few, shown

WRONG_MODEL = "is this the model that the adapter was trained on?"


def explain(
    matcher: Matcher, name: str, adapter: Checkpoint, *, is_mapped: bool = False
) -> tuple[str, str]:
    """Why BASE lacks a parameter, and what to do.

    Args:
        matcher: Of BASE and of what the adapter is about.
        name: The parameter's.
        adapter: From `open_checkpoint`.
        is_mapped: Whether the name is one that the user gave.

    Returns:
        The reason, to be added to a sentence, and a hint; "" for what is not known.
    """
    base = matcher.base.checkpoint
    hint = "" if some_fit(matcher) else WRONG_MODEL
    alike = _in_other_layers(matcher, name)
    if alike:
        count = counted(len(alike), "tensor")
        return f"; it has {count} of other numbers, such as {alike[0]}", hint
    ending = ending_of(adapter)
    if kind_of(name) == "head":
        ours = class_of(base.config) or "a model without it"
        advice = f"it is the head of a {ending} model, and BASE is {shown(ours)}; "
        random = [f"'{one}'" for one in find_unstored(base, adapter)]
        advice += (
            f"that class also has {first_few(random)}, which the adapter "
            "does not store: give the very base that it was trained on"
            if random
            else "save BASE as that class first, its new head is then replaced by the adapter's"
        )
        return "", (advice if ending and not hint else hint)
    near = difflib.get_close_matches(name, list(base), 1, 0.6)
    if not near:
        return "", hint
    nearest, shape = shown(near[0]), matcher.tuned.checkpoint[name].shape
    theirs = base[near[0]].shape
    if shape and sorted(theirs) != sorted(shape):
        return f"; the nearest, '{nearest}', is {list(theirs)}, not {list(shape)}", hint
    old, new = _difference(name, near[0])
    advice = f"if that is the same, --map {shown(old)}={shown(new)}"
    return f"; the nearest is '{nearest}' {list(theirs)}", "" if is_mapped else advice


def some_fit(matcher: Matcher) -> bool:
    """True if BASE has something that the adapter is about, in its size.

    Args:
        matcher: Of BASE and of what the adapter is about.
    """
    for name, wanted in matcher.tuned.checkpoint.items():
        try:
            found = matcher.find(name, alone=True)
        except UnsupportedError:
            continue
        if found is not None and (not wanted.shape or found.view.size == wanted.size):
            return True
    return False


def _in_other_layers(matcher: Matcher, name: str) -> list[str]:
    """The tensors of BASE whose names differ in numbers alone."""
    wanted = template(matcher.tuned.canonical(name))
    stored = matcher.base.names.stored.items()
    return [f"'{shown(own)}'" for canonical, own in stored if template(canonical) == wanted]


def _difference(one: str, other: str) -> tuple[str, str]:
    """Two names without the segments at their ends that are the same."""
    ones, others = one.split("."), other.split(".")
    while len(ones) > 1 and len(others) > 1 and ones[-1] == others[-1]:
        del ones[-1], others[-1]
    return ".".join(ones), ".".join(others)
