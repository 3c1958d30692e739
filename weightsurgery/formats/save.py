"""`save`: the one place where work happens. Blocks are read, edited, hashed and written here."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

from weightsurgery.checkpoint import Checkpoint, TensorView, require_checkpoints
from weightsurgery.formats.card import cards_of, make_card
from weightsurgery.formats.digest import Digest, NoDigest
from weightsurgery.formats.front_matter import license_warning
from weightsurgery.formats.journal import Journal, check_resumable, resolved
from weightsurgery.formats.layout import CARD
from weightsurgery.formats.output import Output
from weightsurgery.formats.place import record_name
from weightsurgery.formats.plan import Plan, Shard, input_paths, make_plan, small_files
from weightsurgery.formats.record import describe_input, make_record, sealed
from weightsurgery.formats.strict_json import dump
from weightsurgery.kernels import count_different
from weightsurgery.stream import Engine

_HASH_DEPTH = 4  # blocks that may wait to be hashed


def save(
    checkpoint: Checkpoint,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    max_shard_size: int | str | None = None,
    max_memory: int | str | None = None,
    hashes: bool = True,
    resume: bool = False,
    engine: Engine | None = None,
    check_inputs: Callable[[dict[str, str]], None] | None = None,
) -> dict[str, Any]:
    """Write a checkpoint: a directory where it came from one, else a file. All of it, or nothing.

    The data are written beside `out`, made durable, and moved there in one step; an interrupted
    run leaves nothing, but with `resume` what another run can go on with. The shard layout is the
    checkpoint's unless `max_shard_size` is given.

    Args:
        checkpoint: What to write; lazy edits are computed here, block by block.
        out: Destination, a directory or a name ending in .safetensors.
        overwrite: Replace what is there.
        max_shard_size: Bytes of tensors in a file at most (a larger tensor has a file of its
            own), or a size such as "5GB".
        max_memory: Bytes, or a size such as "1GB"; fewer workers are used to stay under it.
        hashes: Take the SHA-256 of every input and output file and tensor.
        resume: Go on with what an interrupted run left of a sharded output: files whose SHA-256
            is as it was noted are kept, and the rest is made. What is of other inputs, settings
            or versions is not used. If this run is cut off in its turn, by a full disk, Ctrl-C
            or SIGTERM, its finished files stay for the next.
        engine: Workers and progress.
        check_inputs: Given the path and SHA-256 of every input file, taken of the very reads that
            the work was done with (none without `hashes`), before the output appears; what it
            raises keeps it from appearing.

    Returns:
        The record, as written to wsurg-record.json.

    Raises:
        PolicyError: `out` exists, or touches an input.
        StorageError: There is no room, a write failed, or an input changed meanwhile.
        BusyError: Another run is writing `out`.
        SettingError: A size or the kind of `out` does not fit; `resume` is asked without hashes,
            or for what was trained or made in this process and is in no file.
        NonFiniteError: A computed value is NaN or infinite.
    """
    require_checkpoints(checkpoint)
    out, engine = os.fspath(out), engine or Engine()
    if resume:
        check_resumable(checkpoint, hashes)
    plan = make_plan(
        checkpoint,
        out,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        max_memory=max_memory,
        engine=engine,
    )
    engine = replace(engine, workers=plan.workers)
    output = Output(
        out,
        is_directory=plan.is_directory,
        overwrite=overwrite,
        inputs=input_paths(checkpoint),
        resume=resume,
    )
    with output, ExitStack() as stack:
        for file in checkpoint.input_files() if hashes else ():
            stack.callback(file.begin_hash())
        journal = Journal(output, checkpoint, plan, engine, hashes=hashes, resume=resume)
        tensors, outputs = _write_shards(output, plan, engine, hashes, journal)
        taken = _input_hashes(checkpoint) if hashes else None
        if check_inputs is not None:
            check_inputs(taken or {})
        record = _write_rest(output, checkpoint, plan, tensors, outputs, taken)
        checkpoint.check_unchanged()
        output.commit()
    return record


def _input_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """Finish the hashes of the input files; little is left of those that were read whole."""
    stop = threading.Event()
    with ThreadPoolExecutor() as pool:
        futures = {f.path: pool.submit(f.sha256, stop) for f in checkpoint.input_files()}
        try:
            return {path: future.result() for path, future in futures.items()}
        finally:
            stop.set()  # after an error or Ctrl-C the others need not go on


def _write_shards(
    output: Output, plan: Plan, engine: Engine, hashes: bool, journal: Journal
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write all weight files; gives the record's entries for tensors and files."""
    items = [
        (view, start, stop)
        for shard in plan.shards
        if shard.name not in journal.finished
        for view in shard.views
        for start, stop in view.blocks()
    ]
    tensors: dict[str, Any] = {}
    outputs: dict[str, Any] = {}
    done, total = 0, plan.nbytes
    with ExitStack() as stack:
        file_digest, tensor_digest = (
            Digest(stack, _HASH_DEPTH) if hashes else NoDigest() for _ in range(2)
        )
        # Closed here: an error's traceback would keep it, and the garbage collector then join its
        # threads at any place, also within the start of a thread, which never ends.
        blocks = stack.enter_context(closing(engine.run(_compute, items)))
        for shard in plan.shards:
            if shard.name in journal.finished:
                before = journal.finished[shard.name]
                tensors |= before["tensors"]
                outputs[shard.name] = before["output"]
                done += sum(view.nbytes for view in shard.views)
                continue
            file = output.create(shard.name)
            file.write(shard.header)
            file_digest.update(shard.header)
            for view in shard.views:
                changed = 0
                for _ in view.blocks():
                    _, (data, different) = next(blocks)
                    file.write(data)
                    file_digest.update(data)
                    tensor_digest.update(data)
                    changed += different
                    done += len(data)
                    journal.settle()
                    engine.report("writing", done, total)
                tensors[view.name] = _entry(view, shard, changed, tensor_digest.finish())
            outputs[shard.name] = {"size": shard.nbytes, "sha256": file_digest.finish()}
            journal.note(shard, outputs[shard.name], {v.name: tensors[v.name] for v in shard.views})
    tensors = {name: resolved(entry) for name, entry in tensors.items()}
    return tensors, {name: resolved(entry) for name, entry in outputs.items()}


def _compute(item: tuple[TensorView, int, int]) -> tuple[memoryview, int]:
    view, start, stop = item
    stored, result = view.read_both(start, stop)
    same_type = stored.dtype == result.dtype
    return result.view("u1").data, count_different(stored, result) if same_type else result.size


def _entry(
    view: TensorView, shard: Shard, changed: int, sha256: Future[str] | None
) -> dict[str, Any]:
    return {
        "file": shard.name,
        "dtype": view.dtype.name,
        "shape": list(view.shape),
        "status": view.status,
        "changed": changed,
        "sha256": sha256,
    }


def _write_rest(
    output: Output,
    checkpoint: Checkpoint,
    plan: Plan,
    tensors: dict[str, Any],
    outputs: dict[str, Any],
    input_hashes: Mapping[str, str] | None,
) -> dict[str, Any]:
    """Side files, index, card and record: small, and last."""
    read = [w for source in checkpoint.sources() for w in source.warnings]
    warnings = list(dict.fromkeys([*read, *checkpoint.warnings]))  # the operators' own come last
    warnings += filter(None, [license_warning(cards_of(checkpoint))])
    small, removed = small_files(checkpoint, plan.shards) if plan.is_directory else ({}, [])
    warnings += removed

    def write(name: str, content: bytes) -> None:
        output.write(name, content)
        digest = hashlib.sha256(content).hexdigest() if input_hashes is not None else None
        outputs[name] = {"size": len(content), "sha256": digest}

    for name, content in small.items():
        write(name, content)
    record = make_record(
        checkpoint,
        outputs=outputs,
        tensors=tensors,
        inputs=[describe_input(source, input_hashes or {}) for source in checkpoint.sources()],
        warnings=warnings,
        left_out=checkpoint.left_out,
    )
    if plan.is_directory:
        write(CARD, make_card(checkpoint, record))
    record = sealed(record)
    output.write(record_name(plan.out, is_directory=plan.is_directory), dump(record))
    return record
