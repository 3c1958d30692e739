"""The library's errors in the words of the command line."""

from __future__ import annotations

import click
import pytest

from weightsurgery.cli import cli
from weightsurgery.cli.words import in_flags
from weightsurgery.errors import MismatchError, SettingError


def of(command: str) -> list[click.Parameter]:
    """The parameters of a command."""
    with click.Context(cli) as context:
        found = cli.get_command(context, command)
    assert found is not None
    return found.params


@pytest.mark.parametrize(
    ("command", "reason", "expected"),
    [
        ("finetune", "max_length is 1; expected 2", "--max-length is 1; expected 2"),
        ("finetune", "held_out is 2 of 3", "--held-out is 2 of 3"),
        ("finetune", "freeze leaves nothing to train", "--freeze leaves nothing to train"),
        ("mix", "ratio is 2.0; expected a share", "--ratio is 2.0; expected a share"),
        ("mix", "include and exclude leave nothing", "--include and --exclude leave nothing"),
        ("purify", "embeddings=epur needs counts", "--embeddings epur needs counts"),
        ("inspect", "`weights` names a file", "--weights names a file"),
        # What is not a parameter here, or no parameter at all, is left as it is.
        ("inspect", "max_length is 1", "max_length is 1"),
        ("mix", "the seed is no matter", "the seed is no matter"),
        ("purify", "give the mask of this model", "give the mask of this model"),
        ("finetune", "'a.max_length' and max_length.b", "'a.max_length' and max_length.b"),
        ("purify", "torch.load(weights_only=True)", "torch.load(weights_only=True)"),
    ],
)
def test_parameters_become_flags(command: str, reason: str, expected: str) -> None:
    assert in_flags(SettingError(reason), of(command)).reason == expected


@pytest.mark.parametrize(
    ("command", "hint", "expected"),
    [
        ("mix", "same model? --keep-mismatched keeps it", None),
        ("fisher", "same model? --keep-mismatched keeps it", "same model?"),
        ("mix", "are they? --strip-prefix or --map FILE can pair", None),
        ("sweep", "are they? --strip-prefix or --map FILE can pair", "are they?"),
        ("mix", "see `wsurg diff`, or leave it out with --exclude", None),
        ("epur", "see `wsurg diff`, or leave it out with --exclude", "see `wsurg diff`"),
        ("epur", "leave it out with --exclude, or convert it", "convert it"),
        ("fisher", "choose one with --weights x", None),
        ("demo", "choose one with --weights x", ""),
        ("epur", "look with `wsurg inspect --values`", None),
        ("demo", "python -m pip install --no-deps x", None),
        ("mix", "--overwrite (overwrite=True) replaces it", "--overwrite replaces it"),
        ("purify", "give from_mask too", "give --from-mask too"),
    ],
)
def test_hints_name_flags_that_the_command_has(
    command: str, hint: str, expected: str | None
) -> None:
    told = in_flags(MismatchError("x", file="f", tensor="t", hint=hint), of(command))
    assert told.hint == (hint if expected is None else expected)
    assert (type(told), told.file, told.tensor) == (MismatchError, "f", "t")
    assert str(told) == "f: tensor 't': x" + (f"; {told.hint}" if told.hint else "")
