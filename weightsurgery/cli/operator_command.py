"""A command for each operator, made from its signature and docstring."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

import click

import weightsurgery.operators
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.cli import name_options, options
from weightsurgery.cli.companion import companion_of
from weightsurgery.formats import save
from weightsurgery.formats.destination import (
    check_destination,
    check_file_name,
    check_outputs_apart,
)
from weightsurgery.formats.plan import input_paths, make_plan
from weightsurgery.masks import changed_mask
from weightsurgery.registry import OPERATORS, Operator, Setting
from weightsurgery.report.outcome import plan_tables
from weightsurgery.token_counts import TokenCounts

_NAMES = {option.name: option for option in name_options.ADAPTER_NAMES}


def make_command(name: str) -> click.Command:
    """The click command of a registered operator."""
    operator = OPERATORS[name]
    parameters: list[click.Parameter] = [_argument(operator, n) for n in operator.inputs]
    parameters += [make_path_option(*declared) for declared in operator.optional.items()]
    for setting, (kind, declaration, default) in operator.settings.items():
        parameters += make_options(setting, kind, declaration, default)
    companion = companion_of(name)
    parameters += [
        *companion.parameters,
        *options.WRITING,
        options.WEIGHTS,
        *(name_options.NAMES if _is_pair(operator) else ()),
        options.WORKERS,
        options.JSON,
    ]

    def callback(**given: Any) -> None:
        _run(operator, given)

    command = options.Command(name, callback=callback, params=parameters, help=_help(operator))
    settings = operator.settings.items()
    command.complements = {n: d.complement for n, (_, d, _) in settings if d.complement}
    return command


def _argument(operator: Operator, name: str) -> click.Argument:
    """The argument that stands for a checkpoint, or for any number of them."""
    if name != operator.variadic:
        return click.Argument([name], metavar=name.upper(), type=click.Path())
    metavar = f"{name.removesuffix('s').upper()}..."
    return click.Argument([name], metavar=metavar, type=click.Path(), nargs=-1, required=True)


def _is_pair(operator: Operator) -> bool:
    """True if the operator takes BASE and TUNED, whose names may have to be paired by hand."""
    return operator.inputs == ("base", "tuned")


def _open(operator: Operator, given: Mapping[str, Any]) -> tuple[list[Checkpoint], Checkpoint]:
    """The inputs, and the one of them that is edited."""
    if _is_pair(operator):
        names = {key: given[key] for key in ("weights", "strip_prefix", "name_map")}
        pair = options.open_pair(given["base"], given["tuned"], **names)
        return list(pair), pair[1]
    paths = [
        path
        for name in operator.inputs
        for path in (given[name] if name == operator.variadic else [given[name]])
    ]
    opened = options.open_all(paths, given["weights"])
    return opened, opened[0]


def _run(operator: Operator, given: dict[str, Any]) -> None:
    context = click.get_current_context()
    companion = companion_of(operator.name)
    given = {**given, **companion.check(context)}
    check_usage(context, operator, given, companion.also_used(given))
    _check_resume(context, given)
    inputs, subject = _open(operator, given)
    further = {n: options.open_one(given[n]) for n in operator.optional if given[n] is not None}
    settings = read_settings(context, operator, given, subject)
    out, read = given["out"], (*inputs, *further.values())
    sizes = {key: given[key] for key in ("overwrite", "max_shard_size", "max_memory")}
    _check_destinations(given, subject, read)
    further |= companion.before(inputs, settings, given)
    limit = given["max_memory"]
    with options.running(given["workers"], max_memory=limit, inputs=read) as engine:
        edited = operator.function(*inputs, **settings, **further, engine=engine)
    result = companion.after(inputs, edited, given)
    with options.running(given["workers"], max_memory=limit, inputs=read) as engine:
        if given["dry_run"]:
            plan = make_plan(result, out, engine=engine, **sizes).to_json()
            options.warn(list(result.warnings))
        else:
            kept = {"hashes": given["hashes"], "resume": given["resume"]}
            record = save(result, out, engine=engine, **kept, **sizes)
            if given["mask"] is not None:
                written = {"overwrite": given["overwrite"], "hashes": given["hashes"]}
                save(changed_mask(edited), given["mask"], engine=engine, **written)
    if given["dry_run"]:
        _show_plan(plan, result, given)
        return
    told = {"out": out, **record, **companion.found(inputs, given)}
    options.present(told, lambda: companion.tables(out, told), as_json=given["as_json"])
    companion.judge(told)


def _check_resume(context: click.Context, given: Mapping[str, Any]) -> None:
    """Refuse --resume where there is nothing to go on with."""
    if given["dry_run"]:
        options.refuse_typed(context, ["resume"], "is for writing, which --dry-run does not")
    if given["resume"] and not given["hashes"]:
        raise click.UsageError("--resume needs --hash", context)
    if given["resume"] and (given.get("finetune") or given.get("data") is not None):
        reason = "cannot go on with numbers that --data makes; write them to a file first"
        raise click.UsageError(f"--resume {reason}", context)


def _check_destinations(
    given: Mapping[str, Any], subject: Checkpoint, read: Sequence[Checkpoint]
) -> None:
    """Refuse outputs before any work; saving checks again."""
    outs = [(given["out"], subject.is_directory)]
    if given["mask"] is not None:
        outs.append((given["mask"], False))
    check_outputs_apart(outs)
    inputs = [path for checkpoint in read for path in input_paths(checkpoint)]
    for path, is_directory in outs:
        if not is_directory:
            check_file_name(path)
        check_destination(
            path, is_directory=is_directory, overwrite=given["overwrite"], inputs=inputs
        )


def _show_plan(plan: dict[str, Any], result: Checkpoint, given: Mapping[str, Any]) -> None:
    alignment = result.notes.get("alignment")
    options.present(
        {**plan, "alignment": alignment},
        lambda: plan_tables(plan, alignment),
        as_json=given["as_json"],
    )


def read_settings(
    context: click.Context, operator: Operator, given: dict[str, Any], tuned: Checkpoint
) -> dict[str, Any]:
    """An operator's settings as its function wants them.

    Args:
        context: Of the command.
        operator: Which.
        given: The command's parameters.
        tuned: Whose tokenizer counts a corpus.
    """
    settings = {
        n: _value(context, n, found, given)
        for n, found in operator.settings.items()
        if n in given and not _is_counts(found[0])
    }
    counted = {
        n: options.make_counts(tuned, **{k: given[k] for k in options.COUNTED})
        for n, (kind, _, _) in operator.settings.items()
        if _is_counts(kind) and operator.idle(n, given) is None
    }
    return settings | counted


def check_usage(
    context: click.Context, operator: Operator, given: dict[str, Any], used: Collection[str] = ()
) -> None:
    """Refuse options that were typed and would do nothing; at most one source of counts.

    Args:
        context: Of the command.
        operator: Which.
        given: The command's parameters.
        used: Parameters that serve something besides the operator.
    """
    for kind, _, _ in operator.settings.values():
        sources = [name for name in options.COUNTED if given.get(name)] if _is_counts(kind) else []
        needed = kind is TokenCounts
        if len(sources) > 1 or (needed and not sources):
            raise click.UsageError("give one of --counts, --corpus and --wordfreq", context)
    for name in (*operator.optional, *operator.settings):
        why = operator.idle(name, given)
        if why is None or name in used:
            continue
        other = options.flag(why[0])
        if why[1] == (False,):
            reason = f"has no part in {other}"
        elif why[1] == (True,):
            reason = f"is for {other}"
        else:
            reason = f"is for {other} {' or '.join(map(str, why[1]))}"
        options.refuse_typed(context, _parameters(operator, name), reason)


def _parameters(operator: Operator, name: str) -> tuple[str, ...]:
    """What the command line calls a setting."""
    if name in operator.optional:
        return (name,)
    kind, declaration, _ = operator.settings[name]
    if _is_counts(kind):
        return options.COUNTED
    return (name, declaration.complement) if declaration.complement else (name,)


def make_path_option(name: str, declaration: Setting) -> click.Option:
    """The option that stands for a checkpoint that may be left out.

    Args:
        name: The argument.
        declaration: Its declaration.
    """
    text = _sentence(declaration)
    return click.Option([options.flag(name), name], metavar="PATH", help=text)


def make_options(name: str, kind: Any, declaration: Setting, default: Any) -> list[click.Parameter]:
    """The options that stand for an operator's setting.

    Args:
        name: The setting.
        kind: Its type.
        declaration: Its declaration.
        default: Its default.
    """
    flag = options.flag(name)
    text = _sentence(declaration)
    if kind is bool:
        return [click.Option([flag, name], is_flag=True, default=default, help=text)]
    if _is_counts(kind):
        return list(options.COUNTS)
    if name in _NAMES:
        return [_NAMES[name]]
    if get_origin(kind) is tuple:
        return [
            click.Option(
                [flag, name],
                multiple=True,
                type=float if get_args(kind)[0] is float else None,
                metavar=declaration.metavar or None,
                help=f"{text.rstrip('.')}; repeatable.",
            )
        ]
    type_ = click.Choice(get_args(kind)) if get_origin(kind) is Literal else kind
    made: list[click.Parameter] = [
        click.Option([flag, name], type=type_, default=default, show_default=True, help=text)
    ]
    if declaration.complement:
        made.append(
            click.Option(
                [f"--{declaration.complement}"],
                type=options.Complement(),
                help=f"One minus {flag}, in its place.",
            )
        )
    return made


def _sentence(declaration: Setting) -> str:
    """The help of a setting, with what it counts beside."""
    choices = [
        f"{options.flag(other)} {' or '.join(map(str, values))}"
        for other, values in declaration.only_with.items()
        if not isinstance(values[0], bool)
    ]
    text = declaration.help[:1].upper() + declaration.help[1:]
    return f"{text} (with {' and '.join(choices)})." if choices else f"{text}."


def _is_counts(kind: Any) -> bool:
    return kind is TokenCounts or TokenCounts in get_args(kind)


def _value(
    context: click.Context, name: str, setting: tuple[Any, Setting, Any], given: dict[str, Any]
) -> Any:
    kind, declaration, _ = setting
    if name == "name_map":
        return name_options.read_map(given[name])
    if get_origin(kind) is tuple and get_origin(get_args(kind)[0]) is tuple:
        return tuple(_rule(context, name, text) for text in given[name])
    other = declaration.complement
    if not other or given.get(other) is None:
        return given[name]
    sources = [context.get_parameter_source(n) for n in (name, other)]
    if sources[0] == sources[1]:
        raise click.UsageError(f"--{name} and --{other} exclude each other", context)
    if sources[0] is click.core.ParameterSource.COMMANDLINE:
        return given[name]  # the other one is only in wsurg.toml
    return float(1 - given[other])


def _rule(context: click.Context, name: str, text: str) -> tuple[str, float]:
    glob, _, number = str(text).rpartition("=")
    try:
        if glob:
            return glob, float(number)
    except ValueError:
        pass  # falls through to the message
    flag = "--" + name.replace("_", "-")
    raise click.UsageError(f"{flag} is '{text}'; expected GLOB=NUMBER", context)


def _help(operator: Operator) -> str:
    """The docstring up to its sections, and an example."""
    text = (inspect.getdoc(operator.function) or "").partition("\nArgs:")[0]
    for name in operator.settings:
        text = text.replace(f"`{name}`", "--" + name.replace("_", "-"))
    text = text.replace("`", "'")
    words = [f"{n.removesuffix('s') if n == operator.variadic else n}/" for n in operator.inputs]
    words += [f"--{name} {name}.safetensors" for name in list(operator.optional)[:1]]
    kinds = [(n, kind, default) for n, (kind, _, default) in operator.settings.items()]
    words += ["--counts counts.json" for _, kind, _ in kinds if kind is TokenCounts]
    shares = [(n, default) for n, kind, default in kinds if kind is float]
    # What an operator is mostly about, a ratio or a weight, is its first number.
    words += [f"--{n.replace('_', '-')} {default:g}" for n, default in shares[:1]]
    return f"{text}\n\n\b\nExample:\n  wsurg {operator.name} {' '.join(words)} -o out/"


assert weightsurgery.operators  # noqa: S101  imported for what it registers
