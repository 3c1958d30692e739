"""Options that commands share, and what is made of them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from types import MappingProxyType
from typing import Any

import click

from weightsurgery.checkpoint import Checkpoint
from weightsurgery.cli.name_options import read_map
from weightsurgery.cli.progress import drawing
from weightsurgery.cli.words import in_flags
from weightsurgery.errors import PolicyError, SettingError, SurgeryError, shown
from weightsurgery.formats import open_checkpoint
from weightsurgery.formats.plan import fit_workers, parse_size
from weightsurgery.formats.vocabulary import read_vocabulary
from weightsurgery.name_map import match_names
from weightsurgery.report.tables import Table, show
from weightsurgery.stream import Engine
from weightsurgery.token_counts import TokenCounts, count_by_wordfreq, count_corpus, read_counts


class Command(click.Command):
    """A command that tells what it takes from a settings file, and whose errors say its flags.

    Attributes:
        complements: Parameter to another that stands for one minus it.
        own: Options that a settings file gives in the command's own table alone; at the top their
            names stand for something else, such as the inputs of other commands.
    """

    complements: Mapping[str, str] = MappingProxyType({})
    own: Collection[str] = ()

    def __init__(self, name: str, *, params: list[click.Parameter], **given: Any) -> None:
        # Whoever opens models offers --weights, and with it what else opening goes by.
        at = params.index(WEIGHTS) + 1 if WEIGHTS in params else len(params)
        added = [KEY, ALLOW_PICKLE, FOLLOW_LINKS] if WEIGHTS in params else []
        super().__init__(name, params=[*params[:at], *added, *params[at:]], **given)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; every error knows its command, also those for which click forgets it."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """Run it; refuse inputs of which some are from the file, for which is which is a guess."""
        sources = {p: ctx.get_parameter_source(p.name or "") for p in self.params}
        inputs = [p for p in self.params if isinstance(p, click.Argument)]
        path = ctx.find_root().obj
        for name in _TRUSTING:
            if ctx.params.get(name) and not is_typed(ctx, name):
                # A downloaded model's folder may hold a wsurg.toml, and be the working directory.
                raise click.UsageError(f"type {flag(name)}; {shown(path)} cannot give it", ctx)
        others = {**self.complements, **{b: a for a, b in self.complements.items()}}
        if len({sources[p] for p in inputs}) > 1:
            names = " ".join(p.make_metavar(ctx) for p in inputs)
            raise click.UsageError(f"give {names} on the command line, or all in {path}", ctx)
        taken = [
            f"{(p.opts[0] if isinstance(p, click.Argument) else max(p.opts, key=len)).lstrip('-')}"
            f" = {shown(_toml(ctx.params[p.name or '']))}"
            for p in self.params
            if sources[p] is click.core.ParameterSource.DEFAULT_MAP
            and ctx.get_parameter_source(others.get(p.name or "", "")) is not _TYPED
        ]
        if taken:
            click.echo(f"from {path}: {', '.join(taken)}", err=True)
        ctx.params.pop("allow_pickle", None)
        ctx.meta[_MAY] = {n: ctx.params.pop(n, False) for n in _TRUSTING}  # for `open_one`
        ctx.meta[_KEY] = ctx.params.pop("key", None)  # for `open_all`
        try:
            return super().invoke(ctx)
        except SurgeryError as error:
            raise in_flags(error, self.params) from error


_MAY, _KEY = "weightsurgery.may", "weightsurgery.key"
_TRUSTING = ("follow_links",)  # parameters that trust an input with more
_TYPED = click.core.ParameterSource.COMMANDLINE


def _toml(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def flag(name: str) -> str:
    """A parameter as it is typed."""
    return "--" + name.replace("_", "-")


def is_typed(context: click.Context, name: str) -> bool:
    """Whether a parameter is from the command line, and not from a file or a default."""
    return context.get_parameter_source(name) is _TYPED


def typed(context: click.Context, name: str) -> str:
    """A command's parameter as it is typed, where that is not its name."""
    return next(max(p.opts, key=len) for p in context.command.params if p.name == name)


def refuse_typed(context: click.Context, names: Iterable[str], reason: str) -> None:
    """Refuse the first of these parameters that was typed.

    Args:
        context: Of the command.
        names: Parameters.
        reason: What follows the flag in the message.
    """
    for name in names:
        if is_typed(context, name):
            raise click.UsageError(f"{typed(context, name)} {reason}", context)


class Size(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes: 5GB, 512MiB, 1000."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse, with the usual message where that fails."""
        try:
            return parse_size(value)
        except SettingError as error:
            self.fail(str(error), param, ctx)


class Complement(click.ParamType):  # type: ignore[type-arg]
    """A number that stands for one minus another, kept in decimals.

    In binary 1 - 0.7 is not 0.3, and the two must give the same bytes.
    """

    name = "float"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Decimal:
        """Parse; NaN and infinity are no numbers here."""
        try:
            number = Decimal(str(value))
        except InvalidOperation:
            number = Decimal("nan")
        if not number.is_finite():
            self.fail(f"'{value}'; expected a number", param, ctx)
        return number


class ShareOrFile(click.ParamType):  # type: ignore[type-arg]
    """A number, or else the path of a file."""

    name = "share or file"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float | str:
        """A number where it is one."""
        del param, ctx
        try:
            return float(value)
        except ValueError:
            return str(value)


JSON = click.Option(["--json", "as_json"], is_flag=True, help="Print the result as JSON.")
WORKERS = click.Option(
    ["--workers"],
    type=click.IntRange(0),
    default=0,
    help="Blocks worked on at a time; 0 means one for each core. Results do not depend on it.",
)
WEIGHTS = click.Option(
    ["--weights"],
    metavar="FILE",
    help="Weights file to open if a directory contains several.",
)
KEY = click.Option(
    ["--key"],
    metavar="NAME",
    help="State dict to read if a PyTorch file contains several, such as ema.",
)
ALLOW_PICKLE = click.Option(
    ["--allow-pickle"],
    is_flag=True,
    help="No longer needed: PyTorch files (.bin, .pt, .pth, .ckpt) are read without running code.",
)
FOLLOW_LINKS = click.Option(
    ["--follow-links"],
    is_flag=True,
    help="Follow symbolic links that point outside the model directory. Linked configuration and "
    "tokenizer files are copied to the output.",
)
MEMORY = click.Option(
    ["--max-memory"], type=Size(), help="Use fewer workers to stay under this much memory."
)
HASH = click.Option(
    ["--hash/--no-hash", "hashes"],
    default=True,
    help="Take the SHA-256 of all inputs, outputs and tensors for the record.",
)
COUNTED = ("counts", "corpus", "wordfreq")
COUNTS = (
    click.Option(
        ["--counts"],
        metavar="FILE",
        help="Token counts in ordinary text: JSON {token: count}, or lines token<TAB>count.",
    ),
    click.Option(
        ["--corpus"], metavar="FILE", help="Count the tokens of this text file, for E-PUR."
    ),
    click.Option(
        ["--wordfreq"], is_flag=True, help="Take the counts from the package wordfreq (English)."
    ),
)
WRITING = (
    click.Option(
        ["-o", "--out"], type=click.Path(), required=True, metavar="OUT", help="Where to write."
    ),
    click.Option(["--overwrite"], is_flag=True, help="Replace OUT if it exists."),
    click.Option(
        ["--resume"],
        is_flag=True,
        help="Go on with the sharded output of a run that was interrupted, and let another go on "
        "with this one's.",
    ),
    click.Option(
        ["--dry-run"], is_flag=True, help="Show what would be written, and write nothing."
    ),
    click.Option(
        ["--max-shard-size"], type=Size(), help="Split the weights into files of at most this size."
    ),
    click.Option(
        ["--mask"],
        metavar="OUT",
        help="Also write which dimensions changed, one bit for each (a second pass).",
    ),
    MEMORY,
    HASH,
)


def open_pair(
    base: str, tuned: str, *, weights: str | None, strip_prefix: str, name_map: Sequence[str]
) -> tuple[Checkpoint, Checkpoint]:
    """Open BASE and TUNED, with BASE's names as the user says they correspond.

    Raises:
        SettingError: The name map gives something that is not a name; neither input is a
            directory with a file called `weights`.
    """
    opened = open_all((base, tuned), weights)
    if not strip_prefix and not name_map:
        return opened[0], opened[1]
    names = read_map(name_map)
    named = match_names(opened[0], opened[1], strip_prefix=strip_prefix, name_map=names)
    return named, opened[1]


def open_one(path: str, weights: str | None = None, key: str | None = None) -> Checkpoint:
    """Open a checkpoint as the command's options allow it.

    Args:
        path: As for `open_checkpoint`.
        weights: The weights file to use.
        key: The state dict to use.
    """
    return open_checkpoint(path, weights=weights, key=key, follow_links=trusted()["follow_links"])


def trusted() -> dict[str, bool]:
    """How the running command may open inputs: `follow_links`."""
    found: dict[str, bool] = click.get_current_context().meta.get(_MAY, {})
    return found


def open_all(paths: Sequence[str], weights: str | None) -> list[Checkpoint]:
    """Open checkpoints; `weights` and --key are for whichever of them have what is so called.

    Raises:
        SettingError: None of them is a directory with a file called `weights`, or none is a PyTorch
            file with a state dict of that name.
    """
    key = click.get_current_context().meta.get(_KEY)
    chosen = {n: v for n, v in (("weights", weights), ("key", key)) if v is not None}
    refusals: dict[str, list[SettingError]] = {name: [] for name in chosen}
    found = [_open_with(path, chosen, refusals) for path in paths]
    for refused in refusals.values():
        if len(refused) == len(paths):
            # What a directory lacks says more than that a file is no directory.
            raise min(refused, key=lambda refusal: os.path.isfile(refusal.file or ""))
    return found


_OF_CHOICE = {"E-WEIGHTS-NAME": "weights", "E-KEY-NAME": "key"}


def _open_with(
    path: str, chosen: Mapping[str, str], refusals: Mapping[str, list[SettingError]]
) -> Checkpoint:
    """A checkpoint, by what of `chosen` it has; why it has not the rest is added to `refusals`."""
    try:
        return open_one(path, **chosen)
    except SettingError as error:
        name = _OF_CHOICE.get(error.code, "")
        if name not in chosen:
            raise
        refusals[name].append(error)
        rest = {n: v for n, v in chosen.items() if n != name}
        try:
            return _open_with(path, rest, refusals)
        except PolicyError as other:
            # That a file holds several says less than that it has none of the name that was given.
            raise (error if other.code == "E-PICKLE-SEVERAL" else other) from other


@contextmanager
def running(
    workers: int, *, max_memory: int | None = None, inputs: Sequence[Checkpoint] = ()
) -> Iterator[Engine]:
    """An engine within a memory limit, with a progress bar on stderr if that is a terminal."""
    workers, _ = fit_workers(inputs, Engine(workers=workers).width, max_memory)
    with drawing("DownloadColumn", "TransferSpeedColumn", key=str) as progress:
        yield Engine(workers=workers, progress=progress)


def make_counts(
    tuned: Checkpoint, *, counts: str | None, corpus: str | None, wordfreq: bool
) -> TokenCounts | None:
    """Token counts from the source that was asked for."""
    if counts is not None:
        return read_counts(counts)
    if corpus is not None:
        return count_corpus(corpus, tuned)
    return count_by_wordfreq(read_vocabulary(tuned)) if wordfreq else None


def print_json(value: Any) -> None:
    """One JSON document on stdout; escaped where that cannot show all of its characters."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2, allow_nan=False)
    click.echo(text)


def present(document: Any, tables: Callable[[], list[Table]], *, as_json: bool) -> None:
    """What a command found: as one JSON document, or as tables.

    Args:
        document: For programs.
        tables: Makes them, for people.
        as_json: Which of the two.
    """
    if as_json:
        print_json(document)
    else:
        show(tables())


def note(text: str) -> None:
    """One line about how an input was read, on stderr."""
    click.echo(f"note: {shown(text)}", err=True)


def warn(warnings: list[str]) -> None:
    """Warnings, one line each, on stderr."""
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)
