"""The journal of a sharded output: what is finished, so that an interrupted run can go on.

It lies in the temporary directory: a line that says of which output, and a line for each finished
weights file, with the SHA-256 of the line before it. No line is believed that is not as it was
written, nor without taking the file's SHA-256 again.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import numpy as np

from weightsurgery.checkpoint import Checkpoint
from weightsurgery.errors import ChangedError, SettingError, SurgeryError, conflict
from weightsurgery.formats import disk
from weightsurgery.formats.files import InputFile, identity_of
from weightsurgery.formats.output import Output, OutputFile
from weightsurgery.formats.place import told
from weightsurgery.formats.plan import Plan, Shard
from weightsurgery.formats.record import recipe
from weightsurgery.formats.strict_json import dump_line, parse_object
from weightsurgery.stream import Engine
from weightsurgery.version import __version__

SCHEMA = "wsurg.journal/1"
_NAME, _NEXT = ".journal", ".journal-next"
_LONGEST = 1 << 30  # bytes of a journal
_LOG = logging.getLogger(__name__)
Entry = dict[str, Any]


class Journal:
    """What of an output is finished.

    Args:
        output: The output, entered.
        checkpoint: What is written.
        plan: How.
        engine: Progress.
        hashes: Whether SHA-256 are taken; without them there is no journal.
        resume: Whether to go on from what a run before left; says on the log what becomes of it.
    """

    def __init__(
        self,
        output: Output,
        checkpoint: Checkpoint,
        plan: Plan,
        engine: Engine,
        *,
        hashes: bool,
        resume: bool,
    ) -> None:
        self.finished: dict[str, Entry] = {}  # by shard's name: what need not be made again
        self._output = output
        self._resume = resume
        self._waiting: deque[tuple[Shard, Entry, dict[str, Entry]]] = deque()
        self._file: OutputFile | None = None
        several = plan.is_directory and len(plan.shards) > 1
        if several and hashes and checkpoint.is_repeatable():
            self._begin(_digest(checkpoint, plan), plan, engine)
        elif resume:
            _LOG.warning("an output of one weights file is not gone on with; starting anew")
            output.clear(())

    def _begin(self, digest: str, plan: Plan, engine: Engine) -> None:
        output = self._output
        first = dump_line({"schema": SCHEMA, "digest": digest})
        lines = [first]
        if self._resume:
            found = _read(os.path.join(output.temporary, _NAME))
            self.finished = self._checked(found, first, plan, engine)
            self._tell(found, first, len(plan.shards))
            lines += [_sealed_line(entry) for entry in self.finished.values()]
            output.kept = list(self.finished)
        # A new one in one step: if this run is killed now, the old one still counts.
        output.clear((_NAME, *self.finished))
        self._file = output.note(_NEXT)
        self._file.write(b"".join(lines))
        with told("cannot write", self._file.path):
            disk.replace(self._file.path, os.path.join(output.temporary, _NAME))
        output.journal = _NAME
        for name in self.finished:
            output.adopt(name)

    def _checked(
        self, lines: list[bytes], first: bytes, plan: Plan, engine: Engine
    ) -> dict[str, Entry]:
        """Those shards that are noted, and are on the disk as they were noted."""
        if not lines or lines[0] != first:
            return {}
        shards = {shard.name: shard for shard in plan.shards}
        found: dict[str, Entry] = {}
        done = 0
        for line in lines[1:]:
            entry = _parse(line)
            shard = shards.get(entry.get("file", ""))
            if shard is not None and self._is_whole(shard, entry):
                found[shard.name] = entry
                done += shard.nbytes
                engine.report("checking what is there", done, plan.nbytes)
        return found

    def _is_whole(self, shard: Shard, entry: Entry) -> bool:
        path = os.path.join(self._output.temporary, shard.name)
        try:
            file = InputFile(path, follow=False)
            same = file.size == shard.nbytes and file.sha256() == entry["output"]["sha256"]
            names = {view.name for view in shard.views}
            return same and entry["tensors"].keys() == names
        except (SurgeryError, KeyError, TypeError, AttributeError):
            return False

    def _tell(self, lines: list[bytes], first: bytes, shards: int) -> None:
        if not lines:
            _LOG.warning("nothing is left of a run before; starting anew")
        elif lines[0] != first:
            _LOG.warning("what is left is of other inputs or settings; starting anew")
        else:
            _LOG.warning("going on: %d of %d weight files are there", len(self.finished), shards)

    def note(self, shard: Shard, output: Entry, tensors: dict[str, Entry]) -> None:
        """A shard is written; it is noted as soon as its hashes are there.

        Args:
            shard: Which.
            output: The record's entry for the file.
            tensors: The record's entries for its tensors.
        """
        if self._file is not None:
            self._waiting.append((shard, output, tensors))
            self.settle()

    def settle(self) -> None:
        """Note what was written and has its hashes by now."""
        while self._waiting and self._file is not None:
            shard, output, tensors = self._waiting[0]
            if not output["sha256"].done():  # the last of a shard's that is taken
                return
            del self._waiting[0]
            found = {name: resolved(entry) for name, entry in tensors.items()}
            line = {"file": shard.name, "output": resolved(output), "tensors": found}
            self._file.write(_sealed_line(line))
            if self._resume:
                self._output.kept.append(shard.name)


def check_resumable(checkpoint: Checkpoint, hashes: bool) -> None:
    """Refuse to go on where it could not be known that the rest would fit.

    Raises:
        SettingError: There are no hashes, or numbers that are in this process alone.
    """
    if not hashes:
        raise conflict("resuming needs the hashes", "leave hashes on")
    if not checkpoint.is_repeatable():
        raise SettingError(
            "it cannot be resumed: some of its numbers are in memory alone",
            hint="save what was computed to a file first, and open that",
        )


def resolved(entry: Mapping[str, Any]) -> Entry:
    """A record's entry whose SHA-256 may still be on its way, with it."""
    sha256 = entry["sha256"]
    return {**entry, "sha256": sha256.result() if isinstance(sha256, Future) else sha256}


def _digest(checkpoint: Checkpoint, plan: Plan) -> str:
    """SHA-256 of all that decides what is written: files, settings, inputs, versions."""
    ids = {id(source): number for number, source in enumerate(checkpoint.sources())}
    told_of = {
        "version": __version__,
        "numpy": np.__version__,
        "files": [[s.name, s.nbytes, hashlib.sha256(s.header).hexdigest()] for s in plan.shards],
        "recipe": recipe(checkpoint, ids),
        "notes": dict(checkpoint.notes),
        "inputs": [_identity(file.path) for file in checkpoint.input_files()],
    }
    checkpoint.check_unchanged()  # after the identities: they are those of what is open
    return hashlib.sha256(dump_line(told_of)).hexdigest()


def _identity(path: str) -> list[int]:
    try:
        return [*identity_of(os.stat(path))]
    except OSError as error:
        raise ChangedError(f"gone while it was read: {error.strerror}", file=path) from error


def _read(path: str) -> list[bytes]:
    """The lines of a journal; none where there is none. The last may be half a line."""
    if not os.path.lexists(path):
        return []
    try:
        return InputFile(path, follow=False).read_all(_LONGEST).splitlines(keepends=True)
    except SurgeryError:
        return []


def _sealed_line(entry: Entry) -> bytes:
    line = dump_line(entry)
    return b"%s %s" % (hashlib.sha256(line).hexdigest().encode(), line)


def _parse(sealed: bytes) -> Entry:
    """The entry of a line; an empty one if the line is not as it was written."""
    seal, _, line = sealed.partition(b" ")
    if seal != hashlib.sha256(line).hexdigest().encode():
        return {}
    try:
        return parse_object(line, file=_NAME, what="journal")
    except SurgeryError:
        return {}
