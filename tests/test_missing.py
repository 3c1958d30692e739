"""What is missing is told by its name, what it is, and an example: in every command."""

from __future__ import annotations

import shlex

import click
import pytest

from tests import cases
from weightsurgery.cli import cli, missing

CONTEXT = click.Context(cli, info_name="wsurg")
COMMANDS = [(name, cli.get_command(CONTEXT, name)) for name in cli.list_commands(CONTEXT)]
REQUIRED = [
    (name, command, parameter)
    for name, command in COMMANDS
    if command is not None
    for parameter in command.params
    if parameter.required
]
IDS = [f"{name} {parameter.name}" for name, _, parameter in REQUIRED]


@pytest.mark.parametrize(("name", "command", "parameter"), REQUIRED, ids=IDS)
def test_every_needed_thing_is_explained(
    name: str, command: click.Command, parameter: click.Parameter
) -> None:
    context = click.Context(command, CONTEXT, info_name=name)
    told = missing.explain(click.MissingParameter(ctx=context, param=parameter))
    assert told is not None
    assert told.isprintable()
    found, _, rest = told.partition(" is missing: ")
    what, _, example = rest.partition("; for example: ")
    assert found == (
        parameter.make_metavar(context)
        if isinstance(parameter, click.Argument)
        else f"{parameter.opts[0]} {parameter.make_metavar(context)}"
    )
    assert len(what.split()) > 1
    words = shlex.split(example)
    assert words[:2] == ["wsurg", name]
    if isinstance(parameter, click.Option):
        assert set(parameter.opts) & set(words)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train-adapter"],
            "MODEL is missing: a model directory with its tokenizer, or a hub id; for example:",
        ),
        (
            ["train-adapter", "model", "-o", "out"],
            "--data FILE is missing: questions and answers; for example: wsurg train-adapter",
        ),
        (
            ["meraser", "model", "--erase", "a.jsonl"],
            "-o OUT is missing: where to write; for example: wsurg meraser model/ --erase mism",
        ),
        (
            ["train-adapter", "model", "-o", "out", "--data"],
            "--data needs FILE: questions and answers; for example: wsurg train-adapter model/",
        ),
        (["diff", "base"], "TUNED is missing: the fine-tuned model, a .safetensors file, a model"),
        (["apply-adapter", "base"], "ADAPTER... is missing: one or more adapters, folders as"),
        (["finetune", "m", "--seed"], "--seed needs INTEGER: of the examples' order, dropout,"),
    ],
)
def test_the_command_line_says_so(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cases.wsurg("--no-config", *arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error[E-USAGE]: {message}")
    assert told.count("\n") == 1
    assert told.endswith(f"; see `wsurg {arguments[0]} --help`\n")


def test_other_errors_are_left_alone() -> None:
    assert missing.explain(click.UsageError("something else")) is None
    context = click.Context(click.Command("x"))
    assert missing.explain(click.UsageError("something else", context)) is None
    odd = click.BadOptionUsage("--y", "Option '--y' requires an argument.", context)
    assert missing.explain(odd) is None
