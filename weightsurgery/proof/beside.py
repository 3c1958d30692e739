"""All that an output has beside its weights' bits, against what its steps would write.

Headers, side files, index, card, and what the record says of the whole. Where the steps cannot be
done again, TUNED tells as much of it as it can.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from weightsurgery.checkpoint import Checkpoint
from weightsurgery.formats.card import make_card
from weightsurgery.formats.layout import CARD, INDEXES
from weightsurgery.formats.plan import Shard, shards_of, small_files
from weightsurgery.formats.record import SEAL, make_record
from weightsurgery.formats.strict_json import dump
from weightsurgery.proof.findings import Found
from weightsurgery.proof.origin import Origin
from weightsurgery.proof.rebuild import cut_as_recorded

# What lies in the folder of TUNED besides, and how it was called then, nobody can tell afterwards.
_UNKNOWN = {"inputs", "left_out", "warnings", SEAL}


def check_beside(found: Found, origin: Origin, *, same: bool) -> None:
    """Note files, headers and statements that are not those of what BASE and TUNED give.

    Args:
        found: Where to note them.
        origin: What the output should be from.
        same: Whether BASE and TUNED are the recorded files, and nothing is wrong so far. Else a
            card, a header or a statement may differ for that reason, and is not looked at.

    Raises:
        FormatError: A configuration of TUNED is not valid JSON.
        ChangedError: A file changed meanwhile.
    """
    made = origin.expected or cut_as_recorded(origin.tuned, found.recorded)
    if made.is_directory != found.is_directory:
        if found.is_directory and not found.tells(CARD):
            found.wrong(CARD, None, "not TUNED's", "TUNED is one file: give the folder it is from")
        return
    shards = shards_of(made, found.out)
    record = _record_of(origin.expected, found.recorded.content) if same else {}
    if found.is_directory:
        _check_files(found, shards, _small_files(made, shards, record))
    if same:
        _check_headers(found, shards)
    for key in _told_otherwise(found, origin, record) if same else ():
        name = os.path.basename(found.recorded.path)
        found.wrong(name, None, "tells otherwise", f"'{key}' is not what the steps give")


def _small_files(
    made: Checkpoint, shards: tuple[Shard, ...], record: Mapping[str, Any]
) -> dict[str, bytes]:
    """Side files, index and, if there is a record to make it of, the card."""
    found, _ = small_files(made, shards)
    if record:
        names = [*(shard.name for shard in shards), *found]  # in the order of writing
        outputs = {n: record["outputs"][n] for n in names if n in record["outputs"]}
        found[CARD] = make_card(made, {**record, "outputs": outputs})
    return found


def _check_files(found: Found, shards: tuple[Shard, ...], small: Mapping[str, bytes]) -> None:
    written = {shard.name for shard in shards} | small.keys() | {CARD}
    for name in sorted(found.recorded.files.keys() | written):
        if found.tells(name):
            continue
        if name not in written:
            found.wrong(name, None, "not TUNED's", "TUNED has no such file")
        elif name not in found.recorded.files:
            found.wrong(name, None, "missing", "the steps write it")
        elif name in small and name in found.files:
            file, content = found.files[name], small[name]
            if file.size != len(content) or file.read_all(len(content)) != content:
                whose = (
                    "the steps give other bytes"
                    if name == CARD or os.path.basename(name) in INDEXES
                    else _OTHER
                )
                found.wrong(name, None, "not TUNED's", whose)


_OTHER = "TUNED's has other bytes"


def _check_headers(found: Found, shards: tuple[Shard, ...]) -> None:
    """A header tells names, shapes and places, which are checked; and metadata."""
    names = [shard.name for shard in shards]
    single = len(found.files) == len(names) == 1  # may be called otherwise
    for shard in shards:
        name = next(iter(found.files)) if single else shard.name
        file = found.files.get(name)
        if file is None or found.tells(name):
            continue
        if file.size < len(shard.header) or file.read_bytes(0, len(shard.header)) != shard.header:
            found.wrong(name, None, "not TUNED's", "its header tells otherwise")


def _record_of(expected: Checkpoint | None, told: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the record should say, by its own word of each tensor's and file's bytes."""
    if expected is None:
        return {}
    return make_record(
        expected,
        outputs={n: {"size": e["size"], "sha256": e["sha256"]} for n, e in told["outputs"].items()},
        tensors={
            name: {
                **{key: entry[key] for key in ("file", "dtype", "shape", "changed", "sha256")},
                "status": expected[name].status if name in expected else entry["status"],
            }
            for name, entry in told["tensors"].items()
        },
        inputs=told["inputs"],
        warnings=(),
        left_out=(),
    )


def _told_otherwise(found: Found, origin: Origin, record: Mapping[str, Any]) -> Iterator[str]:
    """The keys under which the record is not what it should be."""
    told = found.recorded.content
    if not record:  # the sum at least
        copies = {name for name, pair in origin.pairs.items() if pair.is_tied_copy}
        entries = found.recorded.tensors.items()
        changed = sum(entry["changed"] for name, entry in entries if name not in copies)
        if told.get("changed_dimensions") != changed:
            yield "changed_dimensions"
        return
    for key in sorted((told.keys() | record.keys()) - _UNKNOWN):
        known = key in told and key in record
        if not known or dump(told[key]) != dump(record[key]):
            yield key
    if origin.expected is not None and len(told["inputs"]) != len(origin.expected.sources()):
        yield "inputs"
