"""The inputs that a record names: where they lie, and whether they are the ones."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from weightsurgery.checkpoint import Checkpoint, FileRef
from weightsurgery.errors import FormatError, MismatchError, SettingError, first_few, shown
from weightsurgery.formats import open_checkpoint
from weightsurgery.formats.layout import (
    INDEX_NAMES,
    PICKLE_ENDINGS,
    as_single,
    fits,
    is_plain_path,
)
from weightsurgery.formats.record import describe_input
from weightsurgery.formats.recorded import Recorded
from weightsurgery.formats.sharded import parse_shard_name
from weightsurgery.formats.vocabulary import read_vocabulary
from weightsurgery.stream import Engine
from weightsurgery.token_counts import TokenCounts, count_by_wordfreq, count_corpus, read_counts

Paths = Mapping[str, str | os.PathLike[str]]


def find_inputs(recorded: Recorded, given: Paths) -> tuple[list[str], dict[str, str]]:
    """The path of each input, and of what was given besides, such as token counts.

    Args:
        recorded: The record.
        given: Name, role or number of an input, to its path.

    Raises:
        SettingError: A name fits no input or several, or an input is found nowhere.
    """
    entries = recorded.content["inputs"]
    sources = set(_sources(recorded.content["recipe"]))
    paths: dict[int, str] = {}
    further: dict[str, str] = {}
    for name, path in given.items():
        if name in sources:
            further[name] = os.fspath(path)
            continue
        number = _number(recorded, name)
        if number in paths:
            reason = f"input {number} is given twice, as '{shown(name)}' too"
            raise SettingError(reason, file=recorded.path, code="E-REPLAY-INPUT")
        paths[number] = os.fspath(path)
    nowhere = []
    for number, entry in enumerate(entries):
        if number not in paths:
            place = _beside(recorded, entry["name"])
            paths[number] = place
            nowhere += [] if place else [(f"{number}", entry["name"])]
    for name in sorted(sources - further.keys()):
        if not name.startswith("wordfreq ("):
            further[name] = _beside(recorded, name)
            nowhere += [] if further[name] else [(name, name)]
    if nowhere:
        names = ", ".join(f"'{shown(name)}'" for _, name in nowhere)
        what = "the input" if len(nowhere) == 1 else "the inputs"
        flags = " ".join(f"--input {shown(key)}=PATH" for key, _ in nowhere)
        raise SettingError(
            f"{what} {names} {'is' if len(nowhere) == 1 else 'are'} not beside the output",
            file=recorded.path,
            hint=f"say where: {flags}",
            code="E-REPLAY-NOWHERE",
        )
    return [paths[number] for number in range(len(entries))], further


def _number(recorded: Recorded, name: str) -> int:
    """Which input is meant: by its name, else by its role in the recipe, else by its number.

    Raises:
        SettingError: None, or several.
    """
    names = [entry["name"] for entry in recorded.content["inputs"]]
    found = {i for i, known in enumerate(names) if known == name}
    found = found or {i for role, i in _roles(recorded.content["recipe"]) if role == name}
    if not found and name.isascii() and name.isdigit() and len(name) < 9:
        found = {int(name)} & set(range(len(names)))
    if len(found) == 1:
        return found.pop()
    listed = ", ".join(
        [
            *(f"{i}: {shown(known)}" for i, known in enumerate(names)),
            *map(shown, sorted(set(_sources(recorded.content["recipe"])))),
        ]
    )
    what = "fits several inputs" if found else "is no input"
    raise SettingError(
        f"'{shown(name)}' {what} of this record; they are {listed}",
        file=recorded.path,
        hint="give one by its number, or by its name",
        code="E-REPLAY-INPUT",
    )


def _roles(recipe: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """What operators call each input."""
    for role, inner in recipe.get("inputs", {}).items():
        if "input" in inner:
            yield role, inner["input"]
        else:
            yield from _roles(inner)


def _sources(recipe: Mapping[str, Any]) -> Iterator[str]:
    """What the token counts of a recipe's steps came from."""
    counts = recipe.get("settings", {}).get("counts")
    if isinstance(counts, dict) and isinstance(counts.get("source"), str):
        yield counts["source"]
    for inner in recipe.get("inputs", {}).values():
        yield from _sources(inner)


def _beside(recorded: Recorded, name: str) -> str:
    """Where an input lies whose name says so, beside the output; "" if it does not."""
    folder = os.path.dirname(os.path.abspath(recorded.path))
    folders = [folder]
    if recorded.is_directory:  # inputs lie beside a model's folder
        folders = [os.path.dirname(folder), folder]
    places = [os.path.join(place, name) for place in folders if is_plain_path(name, 1)]
    return next((place for place in places if os.path.lexists(place)), "")


def open_inputs(
    recorded: Recorded, paths: Sequence[str], *, follow_links: bool = False
) -> list[Checkpoint]:
    """Open the inputs, if their files have the recorded names and sizes.

    Args:
        recorded: The record.
        paths: Of each input, in the record's order.
        follow_links: Follow symbolic links that lead out of an input's directory.

    Returns:
        The inputs, under their recorded names.

    Raises:
        MismatchError: A file is missing, was not there then, or has another size.
    """
    entries = recorded.content["inputs"]
    opened = [_open(p, entry, follow_links) for p, entry in zip(paths, entries, strict=True)]
    _refuse_others(recorded, paths, opened, {})
    return [named(one, entry) for one, entry in zip(opened, entries, strict=True)]


def check_inputs(
    recorded: Recorded,
    paths: Sequence[str],
    opened: Sequence[Checkpoint],
    engine: Engine,
    known: Mapping[str, str],
) -> None:
    """Compare the inputs with the record by their SHA-256.

    Args:
        recorded: The record.
        paths: Of each input, in the record's order.
        opened: The inputs.
        engine: Workers and progress, to hash with.
        known: Path to SHA-256 of files that were hashed already; the others are hashed now.

    Raises:
        MismatchError: A file is not the one that was read then; it is named.
    """
    files = {f.path: f for one in opened for f in (*one.files, *one.side_files)}
    rest = [file for path, file in files.items() if path not in known]
    hashes, done, total = dict(known), 0, sum(file.size for file in rest)
    with closing(engine.run(_sha256, rest)) as results:
        for file, digest in results:
            hashes[file.path] = digest
            done += file.size
            engine.report("checking the inputs", done, total)
    _refuse_others(recorded, paths, opened, hashes)


def _refuse_others(
    recorded: Recorded,
    paths: Sequence[str],
    opened: Sequence[Checkpoint],
    hashes: Mapping[str, str],
) -> None:
    wrong = [
        text
        for number, (path, one) in enumerate(zip(paths, opened, strict=True))
        for text in _differences(number, path, one, recorded.content["inputs"][number], hashes)
    ]
    if wrong:
        raise MismatchError(
            f"not the recorded inputs: {first_few(wrong, '; ')}",
            file=recorded.path,
            hint="give those that the output was made from",
            code="E-REPLAY-OTHER",
        )


def _sha256(file: FileRef) -> str:
    return file.sha256(None)


def _open(path: str, entry: Mapping[str, Any], follow_links: bool) -> Checkpoint:
    """An input, by the weights file that was taken then where it has several."""
    first = _chosen([file["name"] for file in entry["files"]])
    there = first and os.path.isdir(path) and os.path.lexists(os.path.join(path, first))
    weights = os.path.basename(first) if there else None
    return open_checkpoint(path, weights=weights, key=entry.get("key"), follow_links=follow_links)


def _chosen(names: Sequence[str]) -> str:
    """The weights file that says best what --weights was, "" where none does.

    Args:
        names: Of the files that were read, the weights first.
    """
    bare = [name for name in names if _is_whole(os.path.basename(name))]
    if any("/" in name for name in bare):  # of several parts: the variant, where some have one
        bare = [name for name in bare if is_plain_path(name)]
        return max(bare, key=lambda name: as_single(os.path.basename(name)).count("."), default="")
    first = names[0] if names else ""
    return first if first in bare and is_plain_path(first, 1) else ""


def _is_whole(name: str) -> bool:
    shard = parse_shard_name(name)
    of_several = shard is not None and shard.count > 1  # without an index, all are opened
    known = name.endswith((".safetensors", *PICKLE_ENDINGS)) or fits(name, INDEX_NAMES)
    return known and not name.startswith("adapter_model.") and not of_several


def _differences(
    number: int,
    path: str,
    opened: Checkpoint,
    entry: Mapping[str, Any],
    hashes: Mapping[str, str],
) -> Iterator[str]:
    """What of an input is not as recorded."""
    now = {f["name"]: f for f in describe_input(opened, hashes)["files"]}
    then = {f["name"]: f for f in entry["files"]}
    where = f"{shown(path)}, taken for input {number} '{shown(entry['name'])}',"
    if not opened.is_directory and len(now) == len(then) == 1:  # a file may be called otherwise
        now = dict(zip(then, now.values(), strict=True))
    for name in sorted({*now, *then}):
        if name not in now:
            yield f"{where} lacks {shown(name)}"
        elif name not in then:
            yield f"{where} has {shown(name)}, which it had not"
        elif now[name]["size"] != then[name]["size"]:
            sizes = f"{now[name]['size']:,} bytes, recorded {then[name]['size']:,}"
            yield f"{where} has {shown(name)} of {sizes}"
        elif now[name]["sha256"] not in (None, then[name]["sha256"]):  # None: not taken yet
            digests = f"{now[name]['sha256']}, recorded {then[name]['sha256']}"
            yield f"{where} has {shown(name)} with SHA-256 {digests}"


def named(opened: Checkpoint, entry: Mapping[str, Any]) -> Checkpoint:
    """A checkpoint that cards and records call what the record calls it.

    Args:
        opened: An input.
        entry: What the record says of it.
    """
    name = entry["name"]
    hub_id = name if "/" in name else ""
    return replace(opened, label=name, hub_id=hub_id, card=entry.get("card", {}))


def find_counts(path: str | None, told: Any, tuned: Checkpoint) -> TokenCounts:
    """The token counts that a record tells of, from a file of counts or from a corpus.

    Args:
        path: Of the file; None takes them from the package wordfreq.
        told: What the record says of them.
        tuned: Whose tokenizer cut the corpus.

    Raises:
        MismatchError: They are other counts.
        FormatError: The record says nothing of them, or the file is neither.
    """
    if path is None:
        found = count_by_wordfreq(read_vocabulary(tuned))
        if found.to_json() == told:
            return found
        reason = "the counts of the installed wordfreq are not the recorded ones"
        raise MismatchError(reason, code="E-REPLAY-COUNTS")
    try:
        found = read_counts(path)
    except FormatError:  # a text, whose tokens were counted
        found = count_corpus(path, tuned)
    if {**found.to_json(), "source": told["source"]} == told:
        return replace(found, source=told["source"])
    reason = "not the token counts, or not the corpus, of the record"
    raise MismatchError(reason, file=path, code="E-REPLAY-COUNTS")
