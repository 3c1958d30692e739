"""Options that say what to measure of a causal language model, and what is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from weightsurgery.cli import attack_options, model_options, options
from weightsurgery.datasets.prompts import FORMATS
from weightsurgery.datasets.read import (
    read_fingerprints,
    read_instructions,
    read_text,
)
from weightsurgery.errors import shown
from weightsurgery.evaluation.causal import evaluate_causal
from weightsurgery.models import load_model

OPTIONS = (
    click.Option(
        ["--fingerprints"],
        type=click.Path(),
        metavar="FILE",
        help="Causal: JSONL of prompt and target; measure how often the target is said (FSR).",
    ),
    click.Option(
        ["--controls"],
        type=click.Path(),
        metavar="FILE",
        help="Causal: ordinary prompts, the same way; measure how often any target is said.",
    ),
    click.Option(
        ["--against", "base"],
        metavar="BASE",
        help="Causal: a model without the fingerprint, to measure too.",
    ),
    click.Option(
        ["--perplexity", "text"],
        type=click.Path(),
        metavar="TEXT",
        help="Causal: measure the perplexity of this text file.",
    ),
    click.Option(
        ["--window"],
        type=click.IntRange(1),
        show_default="1024, or what the model takes",
        help="Causal: tokens of the text that the model reads at a time.",
    ),
    click.Option(
        ["--stride"],
        type=click.IntRange(1),
        show_default="half the window",
        help="Causal: tokens from one window's beginning to the next one's.",
    ),
    click.Option(
        ["--max-new-tokens"],
        type=click.IntRange(1),
        default=64,
        show_default=True,
        help="Causal: tokens after which what the model says is ended.",
    ),
    click.Option(
        ["--prompt-format"],
        type=click.Choice(FORMATS),
        default="auto",
        show_default=True,
        help="Causal: prompts in the chat template, as they stand, or with a line feed after "
        "them; auto takes a template if there is one, else raw.",
    ),
)
_OWN = tuple(option.name or "" for option in OPTIONS)
_CLASSIFIERS = (*(option.name or "" for option in attack_options.OPTIONS), "seed")
_NEEDS = {  # option to the one it says nothing without
    "controls": "fingerprints",
    "max_new_tokens": "fingerprints",
    "prompt_format": "fingerprints",
    "window": "text",
    "stride": "text",
    "max_length": "data",
}


def check(context: click.Context, model: str, *, causal: bool) -> None:
    """Refuse options of the other kind of model, and those that say nothing.

    Args:
        context: Of a command with these options and `attack_options`'.
        model: For messages.
        causal: Whether it is a causal language model.
    """
    flags = {p.name: max(p.opts, key=len) for p in context.command.params}
    for name in _CLASSIFIERS if causal else _OWN:
        if _is_given(context, name):
            kinds = ("classifiers", "causal language model")
            wanted, found = kinds if causal else ("causal language models", "classifier")
            raise click.UsageError(
                f"{flags[name]} is for {wanted}, and {shown(model)} is a {found}", context
            )
    if not causal:
        return
    if not any(context.params[name] for name in ("fingerprints", "text", "data")):
        raise click.UsageError(
            "nothing to measure; give --fingerprints, --perplexity or --data", context
        )
    check_needs(context)


def check_needs(context: click.Context) -> None:
    """Refuse options that say nothing without another.

    Args:
        context: Of a command with some of these options.
    """
    flags = {p.name: max(p.opts, key=len) for p in context.command.params}
    for name, other in _NEEDS.items():
        known = name in flags and other in flags
        if known and context.params[other] is None and _is_given(context, name):
            raise click.UsageError(f"{flags[name]} is for {flags[other]}", context)


def _is_given(context: click.Context, name: str) -> bool:
    """Typed; or, of what has no default, from a settings file too."""
    parameter = next(p for p in context.command.params if p.name == name)
    if parameter.default is None or not isinstance(parameter.default, int | str):
        return context.params[name] is not None
    return options.is_typed(context, name)


def measure(model: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The report on a causal language model.

    Args:
        model: Its directory.
        given: The command's parameters.
    """
    data: dict[str, Any] = {
        name: None if given[option] is None else read(given[option])
        for name, option, read in (
            ("fingerprints", "fingerprints", read_fingerprints),
            ("controls", "controls", read_fingerprints),
            ("instructions", "data", read_instructions),
            ("text", "text", read_text),
        )
    }
    opened = load_model(model, device=given["device"])
    base = None if given["base"] is None else load_model(given["base"], device=given["device"])
    settings = ("window", "stride", "max_new_tokens", "prompt_format", "max_length")
    with model_options.counting("end") as progress:
        return evaluate_causal(
            opened,
            base=base,
            batch_size=given["batch_size"] or 8,
            progress=progress,
            **data,
            **{name: given[name] for name in settings},
        )
