"""Options that say what to measure of a causal language model, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import click

from weightsurgery.cli import attack_options, options
from weightsurgery.datasets.prompts import FORMATS
from weightsurgery.datasets.read import read_fingerprints, read_instructions, read_text
from weightsurgery.errors import shown
from weightsurgery.evaluation.causal import evaluate_causal
from weightsurgery.evaluation.generation import BOS
from weightsurgery.models import Model

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
        metavar="FILE",
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
        ["--bos"],
        type=click.Choice(BOS),
        default="auto",
        show_default=True,
        help="Causal: beginning-of-text token of windows: in each if the tokenizer begins texts "
        "with one, in each always, or in the first window alone.",
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
_CLASSIFIERS = (*(option.name or "" for option in attack_options.OPTIONS), "seed", "label_kind")
_SETTINGS = ("window", "stride", "bos", "max_new_tokens", "prompt_format", "max_length")
# What `evaluate_causal` calls it: the option, and what reads its file.
_DATA: dict[str, tuple[str, Callable[[str], Any]]] = {
    "fingerprints": ("fingerprints", read_fingerprints),
    "controls": ("controls", read_fingerprints),
    "instructions": ("data", read_instructions),
    "text": ("text", read_text),
}
_NEEDS = {  # option to the one it says nothing without
    "controls": "fingerprints",
    "max_new_tokens": "fingerprints",
    "prompt_format": "fingerprints",
    "window": "text",
    "stride": "text",
    "bos": "text",
    "max_length": "data",
}


def check(context: click.Context, model: str) -> None:
    """Refuse what says nothing of a causal language model.

    Args:
        context: Of a command with these options and `attack_options`'.
        model: For messages.
    """
    reason = f"is for classifiers, and {shown(model)} is a causal language model"
    _refuse(context, _CLASSIFIERS, reason)
    if not any(context.params[name] for name in ("fingerprints", "text", "data")):
        raise click.UsageError(
            "nothing to measure; give --fingerprints, --perplexity or --data", context
        )
    check_needs(context)


def refuse_all(context: click.Context, model: str) -> None:
    """Refuse these options, of which none says anything of a classifier.

    Args:
        context: Of a command with these options.
        model: For messages.
    """
    _refuse(context, _OWN, f"is for causal language models, and {shown(model)} is a classifier")


def check_needs(context: click.Context) -> None:
    """Refuse options that say nothing without another.

    Args:
        context: Of a command with some of these options.
    """
    known = {parameter.name for parameter in context.command.params}
    for name, other in _NEEDS.items():
        if {name, other} <= known and context.params[other] is None:
            _refuse(context, [name], f"is for {options.typed(context, other)}")


def _refuse(context: click.Context, names: Iterable[str], reason: str) -> None:
    for name in names:
        if _is_given(context, name):
            raise click.UsageError(f"{options.typed(context, name)} {reason}", context)


def _is_given(context: click.Context, name: str) -> bool:
    """Typed; or, of what has no default, from a settings file too."""
    parameter = next(p for p in context.command.params if p.name == name)
    if parameter.default is None or not isinstance(parameter.default, int | str):
        return context.params[name] not in (None, ())
    return options.is_typed(context, name)


def read_data(given: Mapping[str, Any]) -> dict[str, Any]:
    """What to measure with, as `evaluate_causal` takes it; None for what is not given.

    Args:
        given: The command's parameters.
    """
    return {
        name: None if given.get(option) is None else _read(read, option, given)
        for name, (option, read) in _DATA.items()
    }


def _read(read: Callable[..., Any], option: str, given: Mapping[str, Any]) -> Any:
    """What the file of an option holds."""
    if option == "text":
        return read(given[option])
    if option != "data":
        return read(given[option], note=options.note)
    columns = question_columns(given)
    return read(given[option], **columns, note=options.note)


def question_columns(given: Mapping[str, Any]) -> dict[str, str]:
    """The fields of question and answer, as `read_instructions` takes them.

    Args:
        given: The command's parameters.
    """
    names = given["text_column"]
    if len(names) > 1:
        reason = "--text-column names two fields; a causal model has one question"
        raise click.UsageError(reason, click.get_current_context())
    return {"text_column": "".join(names), "label_column": given["label_column"]}


def measure(
    model: Model, data: Mapping[str, Any], given: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """The report on a causal language model.

    Args:
        model: The model.
        data: From `read_data`.
        given: The command's parameters.
        more: Further arguments of `evaluate_causal`.
    """
    settings = {name: given[name] for name in _SETTINGS if name in given}
    return evaluate_causal(model, **data, **settings, **more)
