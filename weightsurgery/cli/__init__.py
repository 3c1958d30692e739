"""The command line: parse, call the Python function, show what it gave.

Nothing heavy is imported here: `wsurg --help` reads the operators' summaries from their source.
"""

from __future__ import annotations

import functools
import importlib
import io
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from weightsurgery.cli import missing, startup
from weightsurgery.errors import StorageError, SurgeryError, shown
from weightsurgery.version import __version__

_OWN = {
    "demo": "Plant a backdoor in a real model, find it, and take it out.",
    "diff": "Show what moved between BASE and TUNED.",
    "evaluate": "Measure a model: accuracy and attacks, or fingerprints and perplexity.",
    "extract-adapter": "Make a LoRA adapter of what moved between BASE and TUNED.",
    "finetune": "Train a model on a few clean examples.",
    "fisher": "Estimate how much the loss on clean data depends on each weight.",
    "inspect": "Show what a checkpoint holds.",
    "meraser": "Erase a fingerprint or backdoor of unknown trigger by training.",
    "mismatch": "Pair questions with answers of other questions, to erase fingerprints with.",
    "replay": "Make an output again from its record.",
    "sweep": "Measure every ratio, before and after fine-tuning, and choose one.",
    "train-adapter": "Train a LoRA adapter on questions and answers.",
    "verify": "Check an output against its record.",
    "verify-adapter": "Check that MERGED is BASE with its adapters folded in.",
}
_OPERATORS = Path(__file__).parent.parent / "operators"
BUG, INTERRUPTED, TERMINATED = 1, 130, 143


class Commands(click.Group):
    """A group whose commands are imported when they are run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Own commands and operators, by name."""
        return sorted({*_OWN, *operator_summaries()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name in _OWN or cmd_name in operator_summaries():
            startup.import_numba()
        if cmd_name in _OWN:
            command: click.Command = importlib.import_module(
                f"weightsurgery.cli.{cmd_name.replace('-', '_')}_command"
            ).command
            return command
        if cmd_name in operator_summaries():
            from weightsurgery.cli.operator_command import make_command

            return make_command(cmd_name)
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; suggest the nearest name where there is none."""
        import difflib

        if args and args[0] not in self.list_commands(ctx) and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), 1)
            hint = f"; did you mean '{near[0]}'?" if near else "; see `wsurg --help`"
            raise click.UsageError(f"no command '{args[0]}'{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        rows = sorted({**_OWN, **operator_summaries()}.items())
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def operator_summaries() -> dict[str, str]:
    """Command name to first docstring line of every operator, read from the source files."""
    return dict(_summaries_in(_OPERATORS))


@functools.cache  # a command asks for them three times
def _summaries_in(folder: Path) -> dict[str, str]:
    import ast

    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef) and any(
                isinstance(d, ast.Name) and d.id == "operator" for d in node.decorator_list
            ):
                summary = (ast.get_docstring(node) or "").partition("\n")[0]
                found[node.name.replace("_", "-")] = summary
    return found


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 our bug, 2 usage, 3 malformed input, 4 inputs that do not fit "
    "each other, 5 refused by policy, 6 disk or system, 7 output busy, 10 a gate failed, "
    "130 interrupted, 143 terminated.",
)
@click.version_option(__version__, prog_name="wsurg")
@click.option(
    "--config",
    type=click.Path(),
    metavar="FILE",
    help="TOML file with arguments; ./wsurg.toml is read by itself.",
)
@click.option("--no-config", is_flag=True, help="Do not read ./wsurg.toml.")
@click.pass_context
def cli(ctx: click.Context, config: str | None, no_config: bool) -> None:
    """Surgery on the weights of language models.

    BASE are the trusted pre-trained weights, TUNED the fine-tuned ones. Both are a .safetensors
    file, a model directory, or a hub id org/name@revision.

    \b
    Examples:
      wsurg inspect model/
      wsurg diff base.safetensors tuned.safetensors
      wsurg mix base/ tuned/ --ratio 0.3 -o mixed/
    """  # noqa: D301  click wants the character, not an escape
    if no_config and config is not None:
        raise click.UsageError("--config and --no-config exclude each other", ctx)
    if config is not None or (not no_config and os.path.lexists("wsurg.toml")):
        from weightsurgery.cli.settings_file import read_settings

        ctx.obj = "wsurg.toml" if config is None else config  # for messages about its values
        ctx.default_map = read_settings(ctx.obj, ctx)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run `wsurg`, turn every error into one line on stderr, and exit with its code."""
    startup.spare_garbage_collection()
    signal.signal(signal.SIGTERM, _terminated)
    _accept_all_text()
    try:
        if "_WSURG_COMPLETE" in os.environ:  # shell completion, which click's own main offers
            cli.main(arguments, prog_name="wsurg")
        # Not cli.main: it turns a broken pipe into exit code 1 by itself.
        with cli.make_context("wsurg", sys.argv[1:] if arguments is None else arguments) as ctx:
            cli.invoke(ctx)
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()  # the reader (`head`, `less`) has gone
    except SurgeryError as error:
        _exit(str(error), error.exit_code, error.code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _exit(_one_line(error), error.exit_code, "E-USAGE")
    except (KeyboardInterrupt, click.Abort):
        _exit("interrupted; nothing is left half-written", INTERRUPTED, "E-INTERRUPTED")
    except _TerminatedError:
        _exit("terminated; nothing is left half-written", TERMINATED, "E-TERMINATED")
    except OSError as error:  # of the files, formats/ tells; what is left is stdout on a full disk
        _drop_output()
        reason = f"the system said: {error.strerror or error}"
        _exit(reason, StorageError.exit_code, StorageError.code)
    except Exception:
        sys.excepthook(*sys.exc_info())
        reason = "this is a bug in weightsurgery; please report it with the traceback above"
        _exit(reason, BUG, SurgeryError.code)
    sys.exit(0)


def _accept_all_text() -> None:
    """Where stdout's encoding lacks a character, show a question mark, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def _drop_output() -> None:
    """Send what stdout still holds nowhere, so that the interpreter's last flush cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _TerminatedError(BaseException):
    """SIGTERM came: an exception, so that temporary files are removed on the way out."""


def _terminated(_number: int, _frame: FrameType | None) -> None:
    raise _TerminatedError


def _exit(message: str, exit_code: int, code: str) -> NoReturn:
    click.echo(f"error[{code}]: {message}", err=True)
    sys.exit(exit_code)


def _one_line(error: click.ClickException) -> str:
    text = " ".join(error.format_message().split())
    context: Any = getattr(error, "ctx", None)
    if isinstance(error, click.BadParameter) and context is not None and error.param is not None:
        source = context.get_parameter_source(error.param.name)
        if source is click.core.ParameterSource.DEFAULT_MAP:
            return f"{shown(context.find_root().obj)}: {text}"
    if isinstance(error, click.UsageError) and context is not None:
        text = missing.explain(error) or text
        text = f"{text} See" if text.endswith("?") else f"{text.rstrip('.')}; see"
        return f"{text} `{context.command_path} --help`"
    return text
