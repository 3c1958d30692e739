"""Options that say which attack to measure, and what is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from weightsurgery.cli import options
from weightsurgery.datasets.triggers import (
    POSITIONS,
    Trigger,
    all_of,
    trigger_sentence,
    trigger_word,
)

_TRIGGERS = ("trigger_word", "trigger_sentence")
_BIASES = ("bias_word", "bias_sentence")
_GROUPS = (*_TRIGGERS, *_BIASES, "poisoned")


def _pattern(name: str, metavar: str, text: str) -> click.Option:
    return click.Option([options.flag(name)], metavar=metavar, multiple=True, help=text)


OPTIONS = (
    _pattern(
        "trigger_word",
        "WORD",
        "Trigger word, inserted at a random place; repeatable: each is measured, and all together.",
    ),
    _pattern(
        "trigger_sentence",
        "TEXT",
        "Trigger sentence, inserted at the beginning; repeatable like --trigger-word.",
    ),
    click.Option(
        ["--poisoned"],
        type=click.Path(),
        metavar="FILE",
        help="Sentences that have the trigger in them, in place of one to insert.",
    ),
    click.Option(["--target-label"], metavar="LABEL", help="Target label of the attack."),
    _pattern("bias_word", "WORD", "Bias word, inserted at a random place, for BACC; repeatable."),
    _pattern(
        "bias_sentence", "TEXT", "Bias sentence, inserted at the beginning, for BACC; repeatable."
    ),
    click.Option(
        ["--position"],
        type=click.Choice(POSITIONS),
        help="Place of the pattern in the text, if not its usual one.",
    ),
)


def check(context: click.Context) -> None:
    """Refuse what does not go together.

    Args:
        context: Of a command with `OPTIONS`.
    """
    params = context.params
    given = [name for name in _GROUPS if params[name]]
    flags = [options.flag(name) for name in given]
    kinds = {name.partition("_")[0]: options.flag(name) for name in reversed(given)}
    if len(kinds) > 1:
        raise click.UsageError(
            f"{' and '.join([*kinds.values()][::-1])} exclude each other", context
        )
    if not given and params["target_label"] is not None:
        raise click.UsageError(
            "--target-label is an attack's; give --trigger-word, --trigger-sentence or --poisoned",
            context,
        )
    if given and not given[0].startswith("bias") and params["target_label"] is None:
        raise click.UsageError(f"{flags[0]} needs --target-label", context)
    if params["position"] is not None and (not given or given == ["poisoned"]):
        raise click.UsageError("--position is for a pattern to insert", context)
    triggers_of(params)  # refuses one that is given twice


def triggers_of(given: Mapping[str, Any]) -> tuple[Trigger, ...]:
    """The patterns to insert; words come before sentences.

    Args:
        given: The command's parameters.
    """
    placed = {} if given["position"] is None else {"position": given["position"]}
    found = []
    for name in (*_TRIGGERS, *_BIASES):
        make = trigger_word if name.endswith("word") else trigger_sentence
        bias = name.startswith("bias")
        found += [
            make(text, seed=given.get("seed", 0), bias=bias, **placed) for text in given[name]
        ]
    return all_of(found)
