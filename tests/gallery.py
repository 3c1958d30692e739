"""Everything hostile that the tests have, and everything odd that is valid, in one place.

The tables of the tests are gathered here, so that what must hold of all that is hostile is asked of
all of it: a case that is added there is asked too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

from tests import (
    hostile,
    test_input_files,
    test_links_and_hub,
    test_model_directory,
    test_replay,
    test_safetensors_reader,
    test_verify,
)
from tests.bombs import BOMBS, header
from tests.hostile import INDEX, SHARDS
from tests.refusals import REFUSALS, Place

Fate = Literal["opens", "is refused", "either"]
Make = Callable[[Path], list[Path]]
BOMB = 9_000_000  # bytes; what is packed with the dearest is refused at this size
PACKED = ("empty lists", "empty objects", "objects of one key", "short texts", "nested lists")


class Exhibit(NamedTuple):
    """Something to be opened.

    Attributes:
        make: Builds it in an empty folder; gives what is to be opened.
        fate: What becomes of it.
    """

    make: Make
    fate: Fate


def gallery() -> dict[str, Exhibit]:
    """All of it, by what it is."""
    sources = (_files, _no_files, _directories, _links, _bombs, _refusals, _records)
    return {name: exhibit for source in sources for name, exhibit in source()}


def _file(content: bytes, name: str = "x.safetensors") -> Make:
    return lambda folder: [hostile.folder(folder, {name: content}) / name]


def _files() -> Iterator[tuple[str, Exhibit]]:
    for case in test_safetensors_reader.REFUSED:
        yield f"file: {case.id}", Exhibit(_file(case.values[0]), "is refused")
    for name, blob in test_safetensors_reader.ACCEPTED.items():
        yield f"valid file: {name}", Exhibit(_file(blob), "opens")
    for name, (content, _) in test_input_files.OTHER_KINDS.items():
        yield f"other kind: {name}", Exhibit(_file(content), "is refused")


def _no_files() -> Iterator[tuple[str, Exhibit]]:
    def at(make: Callable[[Path], Any]) -> Make:
        def build(folder: Path) -> list[Path]:
            folder.mkdir()
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)  # where a socket is made
                make(folder / "x.safetensors")
            return [folder / "x.safetensors"]

        return build

    for case in test_input_files.NO_FILE:
        yield f"no file: {case.id}", Exhibit(at(case.values[0]), "is refused")
    for case in test_input_files.PICKLES:
        place, make, protocol = case.values

        def pickled(
            folder: Path, place: str = place, make: Any = make, protocol: int = protocol
        ) -> list[Path]:
            path = folder / place
            path.parent.mkdir(parents=True)
            make(path, folder.parent / "code-ran", protocol)
            return [path if path.parent == folder else path.parent]

        yield f"pickle: {case.id}", Exhibit(pickled, "is refused")


def _sharded(files: dict[str, Any]) -> Make:
    """A model in two shards, files of it changed, added or (None) removed."""

    def build(folder: Path) -> list[Path]:
        given = {name: content for name, content in files.items() if content is not None}
        model = hostile.sharded(folder / "model", given)
        for name in files.keys() - given.keys():
            (model / name).unlink()
        return [model]

    return build


def _directories() -> Iterator[tuple[str, Exhibit]]:
    alone = dict.fromkeys((INDEX, *SHARDS, "config.json"))
    for case in test_model_directory.REFUSED:
        yield f"directory: {case.id}", Exhibit(_sharded(case.values[0]), "is refused")
    for name, files in test_model_directory.ACCEPTED.items():
        yield f"valid directory: {name}", Exhibit(_sharded(files), "opens")
    for table in (test_model_directory.TWO_ANSWERS, test_model_directory.NO_ANSWER):
        for name, (files, _) in table.items():
            yield f"answers: {name}", Exhibit(_sharded({**alone, **files}), "is refused")
    for name in test_input_files.MEMBERS:

        def pipe(folder: Path, name: str = name) -> list[Path]:
            model = hostile.sharded(folder / "model")
            (model / (INDEX if name == "model.safetensors" else name)).unlink()
            os.mkfifo(model / name)
            return [model]

        yield f"pipe as {name}", Exhibit(pipe, "is refused")


def _links() -> Iterator[tuple[str, Exhibit]]:
    for name, target in test_links_and_hub.OUT.items():

        def link(folder: Path, target: str = target) -> list[Path]:
            snapshot = test_links_and_hub.cache_with_targets(folder)
            test_links_and_hub.relink(snapshot / "model.safetensors", target)
            return [snapshot]

        yield f"link to {name}", Exhibit(link, "is refused")


def _bombs() -> Iterator[tuple[str, Exhibit]]:
    for name in PACKED:

        def in_header(folder: Path, name: str = name) -> list[Path]:
            return _file(header(BOMBS[name](BOMB)))(folder)

        yield f"bomb, header: {name}", Exhibit(in_header, "is refused")
        for file in ("config.json", INDEX):

            def beside(folder: Path, name: str = name, file: str = file) -> list[Path]:
                return _sharded({file: BOMBS[name](BOMB)})(folder)

            yield f"bomb, {file}: {name}", Exhibit(beside, "is refused")


def _refusals() -> Iterator[tuple[str, Exhibit]]:
    """What the commands that earn each error code are given; the fault may lie elsewhere."""
    for code, case in REFUSALS.items():

        def build(folder: Path, case: Any = case) -> list[Path]:
            folder.mkdir()
            with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
                patch.chdir(folder)
                words = case(Place(folder, patch, stack))
                paths = [folder / word for word in words[1:]]
            return [p for p in paths if os.path.lexists(p) and p.suffix != ".toml"]

        yield f"of {code}", Exhibit(build, "either")


def _records() -> Iterator[tuple[str, Exhibit]]:
    """Records that are malformed, or tell of steps that there are not."""
    tables: dict[str, Any] = {**test_verify.BAD, **test_replay.HOSTILE}
    for name, (change, *_) in tables.items():

        def build(folder: Path, change: Any = change) -> list[Path]:
            pair = test_verify.Pair(folder)
            pair.save()
            pair.rewrite(change)
            return [pair.out / test_verify.RECORD]

        yield f"record: {name}", Exhibit(build, "either")
