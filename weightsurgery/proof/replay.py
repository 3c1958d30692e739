"""`replay`: the same bytes again, from the same inputs, by the steps that a record tells."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from weightsurgery.checkpoint import Checkpoint
from weightsurgery.errors import (
    FormatError,
    GateError,
    MismatchError,
    PolicyError,
    SettingError,
    counted,
    first_few,
    shown,
)
from weightsurgery.formats.destination import check_destination
from weightsurgery.formats.record import SEAL
from weightsurgery.formats.recorded import find_record, read_record
from weightsurgery.formats.save import save
from weightsurgery.formats.strict_json import dump
from weightsurgery.proof.inputs import Paths, check_inputs, find_counts, find_inputs, open_inputs
from weightsurgery.proof.rebuild import EXACT, check_replayable, cut_as_recorded, rebuild, steps_of
from weightsurgery.stream import Engine
from weightsurgery.token_counts import TokenCounts

# What other inputs than the recorded ones may be the reason of.
_OF_INPUTS = (FormatError, MismatchError, PolicyError, SettingError)


def replay(
    record: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    inputs: Paths | None = None,
    follow_links: bool = False,
    overwrite: bool = False,
    max_memory: int | str | None = None,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Make an output again from its record, and compare it with what the record says of the first.

    Inputs that are not the recorded ones are refused: by the names and sizes of their files before
    anything is computed, by their SHA-256 before anything appears at `out`. The SHA-256 are taken
    of the reads of the work itself, so that it reads no more than the run that it replays.
    What comes out is written in any case; whether it has the same bytes, the report tells.

    Args:
        record: The record, or the output that it is of.
        out: Where to write.
        inputs: An input's recorded name, its role (`base`, `tuned`, …) or its number, to where it
            is now; also the recorded name of a file of token counts, or of a corpus. What is not
            given is looked for by its name beside the output, then in it if it is a folder.
        follow_links: Follow symbolic links that lead out of an input's directory.
        overwrite: Replace what is there.
        max_memory: Bytes, or a size such as "1GB"; fewer workers are used to stay under it.
        engine: Workers and progress.

    Returns:
        The report, with the schema `wsurg.replay/1`: whether all is `identical`, the files in which
        it `differs`, and what the records have `told_otherwise`.

    Raises:
        FormatError: The record is malformed or was altered.
        MismatchError: An input is not the recorded one.
        PolicyError: A step cannot be replayed, another version made the record, it holds no
            hashes, or `out` exists or touches an input.
        SettingError: An input is found nowhere, or `inputs` names what is none.
        StorageError: A file cannot be read or written.
    """
    path, out, engine = os.fspath(record), os.fspath(out), engine or Engine()
    recorded = read_record(find_record(path))
    check_replayable(recorded)
    paths, further = find_inputs(recorded, inputs or {})
    # The work may take long; what can be said against `out` is said before.
    check_destination(out, is_directory=recorded.is_directory, overwrite=overwrite, inputs=paths)
    opened = open_inputs(recorded, paths, follow_links=follow_links)
    known: dict[str, str] = {}

    def check(hashes: Mapping[str, str]) -> None:
        known.update(hashes)
        check_inputs(recorded, paths, opened, engine, known)

    try:
        made = rebuild(
            recorded.content["recipe"],
            dict(enumerate(opened)),
            path=recorded.path,
            find_counts=partial(_counts, further),
            engine=engine,
        )
        written = save(
            cut_as_recorded(made, recorded),
            out,
            overwrite=overwrite,
            max_memory=max_memory,
            engine=engine,
            check_inputs=check,
        )
    except _OF_INPUTS:
        check({})  # that they are others is what to tell, if they are
        raise
    differs = _differences(recorded.files, written["outputs"])
    otherwise = _told_otherwise(recorded.content, written)
    return {
        "schema": "wsurg.replay/1",
        "record": recorded.path,
        "out": out,
        "identical": not differs and not otherwise,
        "files": len(written["outputs"]),
        "inputs": [
            {"name": entry["name"], "path": place}
            for entry, place in zip(recorded.content["inputs"], paths, strict=True)
        ],
        "differs": differs,
        "told_otherwise": otherwise,
        "computed": any(
            step["operator"] not in EXACT for step in steps_of(recorded.content["recipe"])
        ),
    }


def _counts(further: Mapping[str, str], told: Any, tuned: Checkpoint) -> TokenCounts:
    if not isinstance(told, dict) or not isinstance(told.get("source"), str):
        raise FormatError(f"the record's token counts are {shown(told)}", code="E-RECORD")
    return find_counts(further.get(told["source"]), told, tuned)


def _differences(
    then: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The files whose SHA-256 is another; a single file may be called otherwise."""
    before = {name: entry["sha256"] for name, entry in then.items()}
    after = {name: entry["sha256"] for name, entry in now.items()}
    if len(before) == len(after) == 1:
        before = dict(zip(after, before.values(), strict=True))
    return [
        {"file": name, "recorded": before.get(name), "got": after.get(name)}
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]


# The hashes of the inputs are compared before. How their files are called now, and what else lies
# in their folders, may be another thing than it was then.
_NOT_COMPARED = {SEAL, "left_out"}


def _told_otherwise(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys under which the two records tell other things, but for names of single files.

    Files whose bytes differ are told of for themselves.
    """
    same_bytes = not _differences(then["outputs"], now["outputs"])
    before, after = (
        {
            **{key: value for key, value in record.items() if key not in _NOT_COMPARED},
            "tensors": {n: {**e, "file": ""} for n, e in record["tensors"].items()},
            "outputs": [record["outputs"][n] for n in sorted(record["outputs"])] * same_bytes,
            "inputs": [_without_name(given) for given in record["inputs"]],
        }
        for record in (then, now)
    )
    return [
        shown(key)
        for key in sorted({*before, *after})
        if (key in before) != (key in after) or dump(before.get(key)) != dump(after.get(key))
    ]


def _without_name(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """An input whose one file may be called otherwise now."""
    if len(given["files"]) != 1:
        return given
    return {**given, "files": [{**given["files"][0], "name": ""}]}


def check_replay(report: Mapping[str, Any]) -> None:
    """Nothing, if the same bytes and the same record came out.

    Args:
        report: From `replay`.

    Raises:
        GateError: They did not; the first files, or what the record tells otherwise, are named.
    """
    if report["identical"]:
        return
    hint = "the record, or the output that it tells of, was changed since that run"
    if report["computed"]:
        hint += ", or another version of numpy or another processor rounds otherwise"
    if report["differs"]:
        names = first_few([shown(one["file"]) for one in report["differs"]])
        files = counted(len(report["differs"]), "file has", "files have")
        reason = f"{files} other bytes than recorded: {names}"
    else:
        keys = first_few(report["told_otherwise"])
        reason = f"the bytes are as recorded, but the record tells otherwise of {keys}"
    raise GateError(reason, file=report["out"], hint=hint, code="E-REPLAY")
