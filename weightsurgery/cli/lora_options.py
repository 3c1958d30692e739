"""Options of LoRA trainings: one for each field of `LoraSettings`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import click

from weightsurgery.cli import options
from weightsurgery.cli.model_options import SCHEDULE
from weightsurgery.datasets.batches import LOSSES
from weightsurgery.datasets.prompts import FORMATS
from weightsurgery.errors import SettingError, shown
from weightsurgery.training.lora import PRECISIONS, PRESETS, LoraSettings, lora_settings

_KINDS: dict[str, Any] = {
    "rank": (click.IntRange(1), "Rank r of the adapter's factors."),
    "alpha": (float, "α: the product of the factors is scaled by α/r."),
    "dropout": (
        float,
        "Share of a linear layer's inputs that the adapter does not see in a step.",
    ),
    "targets": (
        str,
        (
            "Name, or its end, of linear layers or fused experts to adapt; repeatable. all-linear: "
            "all of them but output head and routers. query-value: the attention's queries and "
            "values."
        ),
    ),
    **SCHEDULE,
    "prompt_format": (
        click.Choice(FORMATS),
        "Questions in the chat template, or the answer right behind them, or on the next line.",
    ),
    "loss_on": (click.Choice(LOSSES), "Learn the answer alone, or the question too."),
    "max_question": (click.IntRange(1), "Tokens of a question after which it is cut."),
    "max_answer": (click.IntRange(1), "Tokens of an answer after which it is cut."),
    "precision": (click.Choice(PRECISIONS), "Of the matrix products in training."),
    "seed": (click.IntRange(0), "Of the factors' start, the examples' order and dropout."),
}
PRESET = click.Option(
    ["--preset"],
    type=click.Choice(list(PRESETS)),
    help="Begin from these settings in place of the defaults shown; other options change them.",
)
CHECKPOINTS = (
    click.Option(
        ["--checkpoints"],
        type=click.Path(),
        metavar="FOLDER",
        help="Save training here as it goes; run again, the command goes on from there.",
    ),
    click.Option(
        ["--save-every"],
        type=click.IntRange(1),
        default=50,
        show_default=True,
        help="Steps between two checkpoints.",
    ),
)


def check_checkpoints(context: click.Context) -> None:
    """Refuse to be told how often to save where nothing is saved.

    Args:
        context: Of a command with `CHECKPOINTS`.
    """
    if context.params["checkpoints"] is None:
        options.refuse_typed(context, ["save_every"], "is for --checkpoints")


def _spelled(name: str) -> str:
    """A setting as it is typed."""
    return "target" if name == "targets" else name.replace("_", "-")


class _Option(click.Option):
    """One whose default is shown as those of other options, without click's parentheses."""

    def get_help_extra(self, ctx: click.Context) -> Any:
        """What stands in brackets behind the help."""
        extra = super().get_help_extra(ctx)
        return {**extra, "default": str(self.show_default)}


def _plain(default: object) -> str:
    return f"{default:g}" if isinstance(default, float) else str(default)


def _option(name: str) -> click.Option:
    kind, text = _KINDS[name]
    default = getattr(LoraSettings(), name)
    # Not the default itself: where an option is not given, it is the preset's that counts.
    return _Option(
        [f"--{_spelled(name)}", name],
        type=kind,
        multiple=name == "targets",
        show_default=", ".join(default) if isinstance(default, tuple) else _plain(default),
        help=text,
    )


OPTIONS = tuple(_option(field) for field in _KINDS)


def settings_of(preset: str | None, given: Mapping[str, Any]) -> LoraSettings:
    """What the options ask for; those that were not given are the preset's, or the defaults."""
    asked = {name: given[name] for name in _KINDS if given[name] not in (None, ())}
    return lora_settings(preset, **asked)


def parse_settings(preset: str, pairs: tuple[str, ...]) -> LoraSettings:
    """A preset's settings, changed by texts such as `learning-rate=1e-3`.

    Raises:
        SettingError: A text is not of that form, names no setting, or its value is not of its
            kind.
    """
    defaults = LoraSettings()
    types = {_spelled(name): (name, type(getattr(defaults, name))) for name in _KINDS}
    found: dict[str, Any] = {}
    for pair in pairs:
        flag, equals, text = pair.partition("=")
        if not equals or flag.strip().replace("_", "-") not in types:
            raise SettingError(_no_setting(pair, flag, sorted(types)), code="E-SETTING-UNKNOWN")
        name, kind = types[flag.strip().replace("_", "-")]
        try:
            found[name] = tuple(text.split(",")) if kind is tuple else kind(text)
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            raise SettingError(f"'{shown(pair)}'; expected {expected}") from None
    try:
        return lora_settings(preset, **found)
    except SettingError as error:
        named = next((n for n in found if error.reason.startswith(f"{n} ")), "")
        reason = _spelled(named) + error.reason.removeprefix(named)
        raise SettingError(reason, hint=error.hint, code=error.code) from None


def _no_setting(pair: str, flag: str, known: Sequence[str]) -> str:
    """Why a text changes no setting, and what would."""
    plain = flag.strip().lstrip("-").replace("_", "-")
    near = difflib.get_close_matches(plain, known, 1)
    if near:
        return f"'{shown(pair)}'; write it as {near[0]}=VALUE"
    return f"'{shown(pair)}'; expected NAME=VALUE with a name of {', '.join(known)}"
