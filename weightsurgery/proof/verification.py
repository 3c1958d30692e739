"""`verify`: every file and tensor of an output against its record, and where its bits are from."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from typing import Any

from weightsurgery.checkpoint import Checkpoint, TensorView
from weightsurgery.errors import (
    GateError,
    StorageError,
    SurgeryError,
    conflict,
    counted,
    first_few,
    shown,
)
from weightsurgery.formats import open_checkpoint
from weightsurgery.formats.digest import Digest
from weightsurgery.formats.files import InputFile, open_member
from weightsurgery.formats.folder import list_folder
from weightsurgery.formats.layout import CARD, INDEXES, RECORD, joined, travels
from weightsurgery.formats.place import record_name
from weightsurgery.formats.recorded import find_output, read_record
from weightsurgery.formats.safetensors import file_order, open_safetensors
from weightsurgery.formats.sharded import read_index
from weightsurgery.proof.beside import check_beside
from weightsurgery.proof.findings import Found
from weightsurgery.proof.origin import Counts, Origin, check_given, count_origins, find_origin
from weightsurgery.stream import Engine


def verify(
    out: str | os.PathLike[str],
    *,
    base: Checkpoint | None = None,
    tuned: Checkpoint | None = None,
    mask: Checkpoint | None = None,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Check an output against its record, and with BASE and TUNED where its bits are from.

    Every file and every tensor is hashed again, every header and index read strictly. Of an output
    of `mix`, `purify` and `epur`, given BASE and TUNED, every element must have the bits of one of
    the two, and as many as the record says must not be TUNED's.

    Args:
        out: A directory or a file that wsurg wrote, its record in it or beside it.
        base: What dimensions were reset to.
        tuned: What they were reset in.
        mask: What `--mask` wrote beside, or the mask that `purify --from-mask` was given.
        engine: Workers and progress.

    Returns:
        The report, with the schema `wsurg.verification/1`: `proved`, and `problems`, one for each
        file and tensor that is not as recorded.

    Raises:
        FormatError: The record is malformed.
        MismatchError: `base`, `tuned` and `mask` do not fit each other.
        SettingError: One of `base` and `tuned` alone is given, or the output is not of the kind.
        StorageError: There is no record, or the system reports an error.
        ChangedError: A file changed meanwhile.
    """
    out, engine = find_output(os.fspath(out)), engine or Engine()
    if (base is None) != (tuned is None) or (mask is not None and base is None):
        raise conflict("base and tuned go together, and mask with them")
    is_directory = os.path.isdir(out)
    if not os.path.lexists(out):
        raise StorageError("no such file or directory", file=out, code="E-FILE-MISSING")
    folder = out if is_directory else os.path.dirname(out)
    name = record_name(out, is_directory=is_directory)
    found = Found(out, is_directory, read_record(os.path.join(folder, name)))
    origin = None
    if base is not None and tuned is not None:
        origin = find_origin(found.recorded, base, tuned, mask, engine)
    if not found.recorded.hashed:
        found.wrong(name, None, "not hashed", "made with --no-hash: nothing tells what was written")
    if not found.recorded.intact:
        found.wrong(name, None, "altered", "it does not have the SHA-256 that it says of itself")
    _open_files(found, folder, _present(out, is_directory=is_directory))
    counts, inputs = _check_contents(found, origin, engine)
    selection = None
    if origin is not None:
        check_given(inputs)
        _check_origins(found, origin, counts)
        same = all(given["same"] for given in inputs)
        check_beside(found, origin, same=same and not found.problems)
        selection = _selection(origin, counts, inputs)
        for given in (base, tuned, mask):
            if given is not None:
                given.check_unchanged()
    if is_directory and not found.problems:
        _check_whole(found)
    return _report(found, selection)


def _present(out: str, *, is_directory: bool) -> list[str]:
    """The names that an output has, without its record."""
    if not is_directory:
        return [os.path.basename(os.path.abspath(out))]

    def refuse(error: OSError) -> None:
        reason = f"cannot list: {error.strerror}"
        raise StorageError(reason, file=error.filename, code="E-FILE-OPEN") from error

    found = []
    for folder, folders, names in os.walk(out, onerror=refuse):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        within = os.path.relpath(folder, out)
        places = names + links + ([] if names or folders or within == "." else [""])
        found += [os.path.normpath(os.path.join(within, name)) for name in places]
    return sorted(name for name in found if name != RECORD)


def _open_files(found: Found, folder: str, present: list[str]) -> None:
    """Open what is recorded; note what is missing, extra or malformed."""
    recorded = found.recorded
    holding: dict[str, dict[str, Any]] = {}
    for tensor, entry in recorded.tensors.items():
        holding.setdefault(entry["file"], {})[tensor] = entry
    if len(recorded.files) == 2 and not holding:  # a model without tensors: its file and the card
        holding = {name: {} for name in recorded.files}
    for name in present:
        if name not in recorded.files:
            found.wrong(name, None, "extra", "the record does not name it")
        elif found.is_directory and not (name in holding or travels(name)):
            found.wrong(name, None, "extra", "the record names it, but wsurg writes no such file")
    if found.is_directory and CARD not in recorded.files:
        found.wrong(CARD, None, "missing", "every folder that wsurg writes has one")
    _check_room(found)
    for name, entry in recorded.files.items():
        if name not in present:
            found.wrong(name, None, "missing")
            continue
        try:
            file = found.files[name] = open_member(folder, name)
        except SurgeryError as error:
            found.wrong(name, None, "malformed", error.reason)
            continue
        if file.size != entry["size"]:
            detail = f"{file.size:,} bytes; recorded {entry['size']:,}"
            found.wrong(name, None, "altered", detail)
        if name.endswith(".safetensors"):
            _open_tensors(found, name, file, holding.get(name, {}))


def _check_room(found: Found) -> None:
    """Every file is held open, so that what is hashed is what is looked at.

    Raises:
        StorageError: The system lets this process open fewer.
    """
    count, most = len(found.recorded.files), resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if count + _OPEN_BESIDES > most:
        raise StorageError(
            f"it has {count:,} files; this process may hold {most:,} open",
            file=found.out,
            hint="`ulimit -n` raises that",
            code="E-FILE-OPEN",
        )


_OPEN_BESIDES = 200  # BASE's and TUNED's, the libraries'


def _open_tensors(
    found: Found, name: str, file: InputFile, expected: Mapping[str, Mapping[str, Any]]
) -> None:
    try:
        views, _ = open_safetensors(file)
    except SurgeryError as error:
        found.wrong(name, error.tensor, "malformed", error.reason)
        return
    front = joined(os.path.dirname(name) if found.is_directory else "", "")
    views = {front + tensor: replace(view, name=front + tensor) for tensor, view in views.items()}
    for tensor in sorted(views.keys() - expected.keys()):
        found.wrong(name, tensor, "extra", "the record does not name it")
    for tensor, entry in expected.items():
        if tensor not in views:
            found.wrong(name, tensor, "missing")
            continue
        view = views[tensor]
        if (view.dtype.name, list(view.shape)) != (entry["dtype"], entry["shape"]):
            detail = f"{view.dtype.name} {shown(list(view.shape))}; recorded {entry['dtype']} "
            found.wrong(name, tensor, "altered", detail + shown(entry["shape"]))
    found.views += [view for view in file_order(views) if view.name in expected]


def _check_contents(
    found: Found, origin: Origin | None, engine: Engine
) -> tuple[dict[str, Counts], list[dict[str, Any]]]:
    """Read everything once: hash tensors and files, compare with BASE and TUNED."""
    with ExitStack() as stack:
        for file in found.files.values():
            stack.callback(file.begin_hash())
        for given in origin.given.values() if origin is not None else ():
            for ref in given.files:
                stack.callback(ref.begin_hash())
        counts = _check_tensors(found, origin, engine)
        _check_files(found, engine)
        return counts, [] if origin is None else origin.describe()


def _check_tensors(found: Found, origin: Origin | None, engine: Engine) -> dict[str, Counts]:
    """Hash the tensors, and compare them with BASE and TUNED.

    Blocks are read in the order in which they lie in the files, by any number of workers, so that
    the hash of each file is fed as it is read. If each worker took a tensor of its own, all but
    the first one's reads would come too early for that, and be read again.
    """
    counts = {view.name: Counts() for view in found.views}
    digests: dict[str, Future[str]] = {}
    items = [(view, start, stop) for view in found.views for start, stop in view.blocks()]
    done, total = 0, sum(file.size for file in found.files.values())
    with ExitStack() as stack:
        digest = Digest(stack, 1)  # hashing keeps up with reading; more would take memory alone
        blocks = stack.enter_context(closing(engine.run(partial(_examine, origin), items)))
        for view in found.views:
            for _ in view.blocks():
                _, (data, part) = next(blocks)
                digest.update(data)
                counts[view.name].add(part)
                done += len(data)
                engine.report("verifying", done, total)
            digests[view.name] = digest.finish()
    for name, taken in digests.items():
        entry, sha256 = found.recorded.tensors[name], taken.result()
        if sha256 != entry["sha256"] is not None:
            found.wrong(entry["file"], name, "altered", f"its SHA-256 is {sha256}")
    return counts


def _check_files(found: Found, engine: Engine) -> None:
    """Finish the hashes of the files: little is left of what was read in order."""
    total = sum(file.size for file in found.files.values())
    files = list(found.files.items())
    with closing(engine.run(_sha256, files)) as hashed:
        for (name, file), digest in hashed:
            expected = found.recorded.files[name]["sha256"]
            if digest != expected is not None and not found.tells(name):
                found.wrong(name, None, "altered", f"its SHA-256 is {digest}")
            file.check_unchanged()
    engine.report("verifying", total, total)


def _sha256(item: tuple[str, InputFile]) -> str:
    return item[1].sha256()


def _examine(origin: Origin | None, item: tuple[TensorView, int, int]) -> tuple[memoryview, Counts]:
    """The bytes of a block, and where its elements are from."""
    view, start, stop = item
    block, counts = view.read(start, stop), Counts()
    if origin is not None and _fits(view, origin):
        count_origins(origin, view, start, stop, block, counts)
    return block.view("u1").data, counts


def _fits(view: TensorView, origin: Origin) -> bool:
    """Whether TUNED has such a tensor."""
    pair = origin.pairs.get(view.name)
    return pair is not None and (pair.tuned.shape, pair.tuned.dtype) == (view.shape, view.dtype)


def _check_origins(found: Found, origin: Origin, counts: Mapping[str, Counts]) -> None:
    """Note tensors that are not BASE's and TUNED's, or not as many elements of them as recorded."""
    recorded = found.recorded.tensors
    views = {view.name: view for view in found.views}
    for name, view in views.items():
        file, entry, count = recorded[name]["file"], recorded[name], counts[name]
        if not _fits(view, origin):
            found.wrong(file, name, "not TUNED's", "TUNED has none of its shape and dtype")
        elif count.neither:
            detail = f"{count.neither:,} of {view.size:,} elements"
            found.wrong(file, name, "neither BASE's nor TUNED's", detail)
        elif count.changed != entry["changed"]:
            those = counted(count.changed, "element is", "elements are")
            detail = f"{those} not TUNED's; recorded {entry['changed']:,}"
            found.wrong(file, name, "other dimensions", detail)
        elif count.unlike_mask:
            detail = f"{count.unlike_mask:,} of {view.size:,} elements"
            found.wrong(file, name, "not as the mask says", detail)
        elif count.unlike_recipe:
            detail = f"{count.unlike_recipe:,} of {view.size:,} elements"
            found.wrong(file, name, "not what its steps give", detail)
    for name in origin.tuned:
        if name not in recorded:
            found.wrong(found.out, name, "missing", "TUNED has it")


def _check_whole(found: Found) -> None:
    """Open the directory as any other command would: index, configuration, one answer."""
    try:
        opened = open_checkpoint(found.out)
        folder = list_folder(found.out, label=found.out)
        for path in {file.name for file in opened.files}:
            part, index = os.path.split(path)
            if index in INDEXES:
                _, listed, _ = read_index(folder, path)
                if listed != opened.split()[part].layout:
                    found.wrong(path, None, "malformed", "not what the shards hold")
    except SurgeryError as error:
        file = os.path.relpath(error.file or found.out, found.out)
        found.wrong(file, error.tensor, "malformed", error.reason)


def _selection(
    origin: Origin, counts: Mapping[str, Counts], inputs: list[dict[str, Any]]
) -> dict[str, Any]:
    """What was found of the dimensions, and by what it is known which ones were to be reset."""
    copies = {n for n, pair in origin.pairs.items() if pair.is_tied_copy}
    by = {"recipe": origin.expected, "mask": origin.mask}
    return {
        "inputs": inputs,
        "renamed": dict(origin.renamed),
        "coverage": origin.coverage.to_json(),
        "changed_dimensions": sum(c.changed for n, c in counts.items() if n not in copies),
        "known_by": [name for name, given in by.items() if given is not None],
        "not_by_recipe": origin.why_not or None,
        "statements": origin.expected is not None and all(given["same"] for given in inputs),
        "mask": None if origin.mask is None else origin.mask.label,
    }


def _report(found: Found, selection: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "schema": "wsurg.verification/1",
        "out": found.out,
        "record": found.recorded.path,
        "proved": not found.problems,
        "files": len(found.recorded.files),
        "tensors": len(found.recorded.tensors),
        "bytes": sum(entry["size"] for entry in found.recorded.files.values()),
        "selection": selection,
        "problems": sorted(found.problems, key=lambda p: (p["file"], p["tensor"] or "")),
    }


def check_verification(report: Mapping[str, Any]) -> None:
    """Nothing, if the output is as recorded.

    Args:
        report: From `verify`.

    Raises:
        GateError: It is not; the first problems are named.
    """
    if report["proved"]:
        return
    problems = report["problems"]
    first = first_few(list(dict.fromkeys(map(_named, problems))))
    what = "thing is" if len(problems) == 1 else "things are"
    reason = f"{len(problems)} {what} not as the record says: {first}"
    inputs = [] if report["selection"] is None else report["selection"]["inputs"]
    others = [given["input"].upper() for given in inputs if given["same"] is False]
    hint = f"{' and '.join(others)} may be the wrong one: not the recorded file" if others else ""
    raise GateError(reason, file=report["out"], hint=hint, code="E-VERIFY")


def _named(problem: Mapping[str, Any]) -> str:
    tensor = f" '{shown(problem['tensor'])}'" if problem["tensor"] is not None else ""
    return f"{shown(problem['file'])}{tensor} ({problem['problem']})"
