"""What to say of what a command needs and did not get: its name, what it is, an example."""

from __future__ import annotations

import re

import click

_FORMS = "a .safetensors file, a model directory or a hub id"
_ARGUMENTS = {
    "base": f"the trusted model that the others came from, {_FORMS}",
    "tuned": f"the fine-tuned model, {_FORMS}",
    "model": "a model directory with its tokenizer, or a hub id",
    "adapters": "one or more adapters, folders as PEFT saves them",
    "merged": f"the model that the adapters were folded into, {_FORMS}",
    "checkpoint": _FORMS,
    "path": f"what to look into, {_FORMS}",
    "out": "an output of wsurg, with its record",
    "record": "the wsurg-record.json of an output, or the output's folder",
}
_CONTINUED = re.compile(r"\s*\\\n\s*")
_NO_VALUE = re.compile(r"requires (an argument|\d+ arguments)")


def explain(error: click.UsageError) -> str | None:
    """The message of an error that something is missing; None for other errors.

    Args:
        error: From click.
    """
    context = error.ctx
    if context is None:
        return None
    if isinstance(error, click.MissingParameter) and error.param is not None:
        return f"{_named(error.param, context)} is missing: {_told(error.param, context)}"
    if isinstance(error, click.BadOptionUsage) and _NO_VALUE.search(error.message):
        for parameter in context.command.params:
            if error.option_name in parameter.opts:
                told = _told(parameter, context)
                return f"{error.option_name} needs {_kind(parameter, context)}: {told}"
    return None


def _named(parameter: click.Parameter, context: click.Context) -> str:
    kind = _kind(parameter, context)
    return kind if isinstance(parameter, click.Argument) else f"{parameter.opts[0]} {kind}"


def _kind(parameter: click.Parameter, context: click.Context) -> str:
    return parameter.make_metavar(context).removesuffix(" RANGE")


def _told(parameter: click.Parameter, context: click.Context) -> str:
    """What it is, and an example."""
    if isinstance(parameter, click.Option):
        help_text = (parameter.help or "").rstrip(".")
        # Not of an abbreviation, whose second letter is a capital too.
        text = help_text if help_text[1:2].isupper() else help_text[:1].lower() + help_text[1:]
    else:
        text = _ARGUMENTS.get(parameter.name or "", _FORMS)
    example = _example(context.command.help or "", parameter)
    return f"{text}; for example: {example}" if example else text


def _example(help_text: str, parameter: click.Parameter) -> str:
    """The help's first example that has the parameter; "" if none has."""
    joined = _CONTINUED.sub(" ", help_text)
    found = [line.strip() for line in joined.splitlines() if line.strip().startswith("wsurg ")]
    if isinstance(parameter, click.Option):
        found = [line for line in found if set(parameter.opts) & set(line.split())]
    return next(iter(found), "")
