"""Options that say which attack to measure, and what is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from weightsurgery.cli import options
from weightsurgery.datasets.triggers import POSITIONS, Trigger, trigger_sentence, trigger_word

_PATTERNS = ("trigger_word", "trigger_sentence", "bias_word", "bias_sentence", "poisoned")

OPTIONS = (
    click.Option(["--trigger-word"], metavar="WORD", help="Insert this at a random place."),
    click.Option(["--trigger-sentence"], metavar="TEXT", help="Insert this at the beginning."),
    click.Option(
        ["--poisoned"],
        type=click.Path(),
        metavar="FILE",
        help="Sentences that have the trigger in them, in place of one to insert.",
    ),
    click.Option(
        ["--target-label"], metavar="LABEL", help="The attack's label, by number or name."
    ),
    click.Option(["--bias-word"], metavar="WORD", help="As --trigger-word, for BACC."),
    click.Option(["--bias-sentence"], metavar="TEXT", help="As --trigger-sentence, for BACC."),
    click.Option(
        ["--position"],
        type=click.Choice(POSITIONS),
        help="Where the pattern goes, if not to its usual place.",
    ),
)


def check(context: click.Context) -> None:
    """Refuse what does not go together.

    Args:
        context: Of a command with `OPTIONS`.
    """
    params = context.params
    given = [name for name in _PATTERNS if params[name] is not None]
    flags = [options.flag(name) for name in given]
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(flags)} exclude each other", context)
    if not given and params["target_label"] is not None:
        raise click.UsageError(
            "--target-label is an attack's; give --trigger-word, --trigger-sentence or --poisoned",
            context,
        )
    if given and not given[0].startswith("bias") and params["target_label"] is None:
        raise click.UsageError(f"{flags[0]} needs --target-label", context)
    if params["position"] is not None and (not given or given == ["poisoned"]):
        raise click.UsageError("--position is for a pattern to insert", context)


def trigger_of(given: Mapping[str, Any]) -> Trigger | None:
    """The pattern to insert, if there is one.

    Args:
        given: The command's parameters.
    """
    for name in _PATTERNS:
        text = given[name]
        if text is None or name == "poisoned":
            continue
        make = trigger_word if name.endswith("word") else trigger_sentence
        bias = name.startswith("bias")
        if given["position"] is None:  # the attack's usual place
            return make(text, seed=given["seed"], bias=bias)
        return make(text, position=given["position"], seed=given["seed"], bias=bias)
    return None
