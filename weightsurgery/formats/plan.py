"""The plan of an output: which tensors go into which file, known before a weight is read."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightsurgery.checkpoint import BLOCK, Checkpoint, TensorView
from weightsurgery.errors import SettingError, StorageError, conflict, shown
from weightsurgery.formats.code_keys import is_config, travelling
from weightsurgery.formats.destination import check_destination, check_file_name
from weightsurgery.formats.json_cost import MEMORY, parsing_cost
from weightsurgery.formats.layout import (
    ADAPTER,
    CARD,
    MODULES,
    index_name,
    is_adapter_layout,
    joined,
    stem_of,
)
from weightsurgery.formats.place import left_over, record_name
from weightsurgery.formats.safetensors import file_order, header_bytes
from weightsurgery.formats.strict_json import dump
from weightsurgery.stream import Engine

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
INTERPRETER = 128 << 20  # bytes that Python, numpy and numba take before any weights
_SLACK = 16 << 20  # bytes for index, card and record


@dataclass(frozen=True)
class Shard:
    """One output file: its name, its tensors in their order on disk, its header.

    Attributes:
        name: File name.
        views: The tensors, in their order on disk.
        header: Length and JSON header, the first bytes of the file.
    """

    name: str
    views: tuple[TensorView, ...]
    header: bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(view.nbytes for view in self.views)


@dataclass(frozen=True)
class Plan:
    """What `save` would write.

    Attributes:
        out: The destination as the user gave it.
        is_directory: Whether it is a model directory.
        shards: The weight files.
        beside: The other files to their bytes, None where those depend on the work: the card and
            the record.
        free: Bytes free on the destination's file system.
        memory: Estimated peak memory in bytes.
        workers: Blocks worked on at a time.
    """

    out: str
    is_directory: bool
    shards: tuple[Shard, ...]
    beside: Mapping[str, int | None]
    free: int
    memory: int
    workers: int

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(shard.nbytes for shard in self.shards)

    def to_json(self) -> dict[str, Any]:
        """The plan as `--dry-run --json` prints it."""
        statuses = [view.status for shard in self.shards for view in shard.views]
        return {
            "schema": "wsurg.plan/1",
            "out": self.out,
            "files": {shard.name: shard.nbytes for shard in self.shards},
            "side_files": dict(self.beside),
            "bytes": self.nbytes,
            "bytes_free": self.free,
            "memory": self.memory,
            "workers": self.workers,
            "tensors": {status: statuses.count(status) for status in sorted(set(statuses))},
        }


def parse_size(text: str | int) -> int:
    """Bytes from `5GB`, `512MiB`, `1000`; decimal units unless written with an i, as on the hub.

    Raises:
        SettingError: It is not a size.

    Example:
        >>> parse_size("5GB"), parse_size("1.5KiB")
        (5000000000, 1536)
    """
    found = _SIZE.fullmatch(str(text).strip())
    if not found:
        raise SettingError(f"'{text}' is not a size", hint="write 5GB, 512MiB or a number of bytes")
    power = " kmgt".index(found[2].lower() or " ")
    try:
        return int(float(found[1]) * (1024 if found[3] else 1000) ** power)
    except OverflowError:
        raise SettingError(f"'{shown(text)}' is more bytes than there can be") from None


def make_plan(
    checkpoint: Checkpoint,
    out: str,
    *,
    overwrite: bool = False,
    max_shard_size: int | str | None = None,
    max_memory: int | str | None = None,
    engine: Engine,
) -> Plan:
    """Decide on files and check destination, disk space and memory; no weight is read.

    Raises:
        SettingError: The destination is of the wrong kind, a size is impossible, a file would have
            too many tensors.
        PolicyError: The destination exists or touches an input.
        StorageError: There is no room for it.
        FormatError: A config to be copied is malformed.
    """
    limit = None if max_shard_size is None else parse_size(max_shard_size)
    memory_limit = None if max_memory is None else parse_size(max_memory)
    _check_kind(checkpoint, out, limit)
    check_destination(
        out,
        is_directory=checkpoint.is_directory,
        overwrite=overwrite,
        inputs=input_paths(checkpoint),
    )
    shards = shards_of(checkpoint, out, limit)
    _check_headers(shards, out)
    workers, memory = fit_workers(checkpoint.sources(), engine.width, memory_limit)
    statistics = os.statvfs(os.path.dirname(os.path.abspath(out)))
    free = statistics.f_bavail * statistics.f_frsize
    beside = _beside(checkpoint, shards, out)
    plan = Plan(out, checkpoint.is_directory, shards, beside, free, memory, workers)
    need = plan.nbytes + sum(file.size for file in checkpoint.side_files) + _SLACK
    if need > free + left_over(out):
        raise StorageError(
            f"{need:,} bytes to write, {free:,} free",
            file=out,
            hint="make room first",
            code="E-OUTPUT-SPACE",
        )
    return plan


def shards_of(checkpoint: Checkpoint, out: str, limit: int | None = None) -> tuple[Shard, ...]:
    """The weight files of an output, with their headers.

    Args:
        checkpoint: What is to be written.
        out: Where.
        limit: Bytes of tensors in a file at most; None keeps the checkpoint's own layout.
    """
    metadata = {**checkpoint.metadata, "format": checkpoint.metadata.get("format", "pt")}
    parts = checkpoint.split() if checkpoint.is_directory else {"": checkpoint}
    return tuple(
        Shard(
            joined(folder, name),
            tuple(checkpoint[joined(folder, view.name)] for view in views),
            header_bytes(views, metadata),
        )
        for folder, part in parts.items()
        for name, views in _groups(part, out, limit if _may_split(part, checkpoint) else None)
    )


def _may_split(part: Checkpoint, whole: Checkpoint) -> bool:
    """Whether the library opens several files: not for sentence-transformers' own modules."""
    is_sentences = any(file.name == MODULES for file in whole.side_files)
    return "model_type" in part.config or not is_sentences


def small_files(
    checkpoint: Checkpoint, shards: Sequence[Shard]
) -> tuple[dict[str, bytes], list[str]]:
    """The side files and indexes of a directory, and what was removed from configurations.

    Args:
        checkpoint: What is to be written.
        shards: Its weight files.

    Raises:
        FormatError: A config is malformed.
        ChangedError: A side file changed since it was opened.
    """
    found: dict[str, bytes] = {}
    warnings = []
    for side in checkpoint.side_files:
        found[side.name], removed = travelling(side)
        warnings += [f"{side.name}: removed {', '.join(removed)}"] if removed else []
    return found | _indexes(shards), warnings


def _beside(checkpoint: Checkpoint, shards: tuple[Shard, ...], out: str) -> dict[str, int | None]:
    """What is written besides the weights: side files and index, card and record."""
    if not checkpoint.is_directory:
        return {record_name(out, is_directory=False): None}
    found: dict[str, int | None] = {
        # Configs are small, and may lose keys or tell another dtype; nothing else is read for it.
        side.name: len(travelling(side)[0]) if is_config(side.name) else side.size
        for side in checkpoint.side_files
    }
    found |= {name: len(content) for name, content in _indexes(shards).items()}
    return {**found, CARD: None, record_name(out, is_directory=True): None}


def _indexes(shards: Sequence[Shard]) -> dict[str, bytes]:
    """The index of each folder that has several weight files, as the hub has it."""
    folders: dict[str, list[Shard]] = {}
    for shard in shards:
        folders.setdefault(os.path.dirname(shard.name), []).append(shard)
    found = {}
    for folder, files in folders.items():
        views = [view for shard in files for view in shard.views]
        content = {
            "metadata": {
                "total_parameters": sum(view.size for view in views),
                "total_size": sum(view.nbytes for view in views),
            },
            "weight_map": {
                view.name.removeprefix(joined(folder, "")): os.path.basename(shard.name)
                for shard in files
                for view in shard.views
            },
        }
        if len(files) > 1:
            found[joined(folder, index_name(shard.name for shard in files))] = dump(content)
    return found


def _check_headers(shards: tuple[Shard, ...], out: str) -> None:
    """Refuse to write a file that the strict reader would refuse to open."""
    for shard in shards:
        if parsing_cost(shard.header) > MEMORY:
            raise SettingError(
                f"{shown(shard.name)} would hold {len(shard.views):,} tensors; expected about "
                "120,000 at most",
                file=out,
                hint="write more files, with max_shard_size",
            )


def input_paths(checkpoint: Checkpoint) -> list[str]:
    """Files, or for model directories the directories, that a checkpoint reads.

    Also what links of a directory lead to: it must not be overwritten either.
    """
    found = [
        os.path.dirname(file.path) if source.is_directory else file.path
        for source in checkpoint.sources()
        for file in source.files
    ]
    links = [file.path for file in checkpoint.input_files() if os.path.islink(file.path)]
    return list(dict.fromkeys([*found, *links]))


def fit_workers(
    inputs: Sequence[Checkpoint], workers: int, max_memory: int | None
) -> tuple[int, int]:
    """The largest number of workers, and its peak memory, that a memory limit allows.

    Args:
        inputs: The opened checkpoints that are read side by side.
        workers: Blocks worked on at a time, at most.
        max_memory: Bytes; None sets no limit.

    Raises:
        SettingError: Even one worker needs more.
    """
    bits = max((view.dtype.bits for given in inputs for view in given.values()), default=32)
    block = BLOCK * max(bits, 32) // 8
    depth = len(inputs) + 4  # blocks: the inputs', temporaries, and the result

    def need(count: int) -> int:
        return INTERPRETER + (2 * count + 1) * depth * block

    if max_memory is not None:
        while workers > 1 and need(workers) > max_memory:
            workers -= 1
        if need(workers) > max_memory:
            raise SettingError(
                f"a memory limit of {max_memory:,} bytes is too small; one worker needs "
                f"{need(1):,}",
                hint="raise the limit",
                code="E-MEMORY-LIMIT",
            )
    return workers, need(workers)


def _check_kind(checkpoint: Checkpoint, out: str, max_shard_size: int | None) -> None:
    try:
        out.encode()
    except UnicodeEncodeError:  # the record could not name it
        raise SettingError(
            f"the output's name is not UTF-8: {shown(out)}", code="E-OUTPUT-NAME"
        ) from None
    if not checkpoint.is_directory:
        check_file_name(out)
    if max_shard_size is not None and not checkpoint.is_directory:
        raise conflict("a single file cannot be sharded", "give a model directory")
    if max_shard_size is not None and is_adapter_layout(checkpoint.layout):
        raise conflict("an adapter cannot be sharded")


def _groups(
    checkpoint: Checkpoint, out: str, max_shard_size: int | None
) -> list[tuple[str, list[TensorView]]]:
    if not checkpoint.is_directory:
        return [(os.path.basename(os.path.abspath(out)), file_order(checkpoint))]
    if is_adapter_layout(checkpoint.layout):
        return [(ADAPTER, file_order(checkpoint))]
    stem = stem_of(checkpoint.layout.values())
    single = f"{stem}.safetensors"
    if max_shard_size is not None:
        return _named(_split(list(checkpoint.values()), max_shard_size), stem)
    shards: dict[str, dict[str, TensorView]] = {}
    # A new tensor joins the last shard: model.safetensors beside an index would be two answers.
    last = max(checkpoint.layout.values(), default=single)
    for name, view in checkpoint.items():
        shards.setdefault(checkpoint.layout.get(name, last), {})[name] = view
    if len(shards) < 2 or single in shards:  # beside an index that name would mean all weights
        return _named([shards[name] for name in sorted(shards)], stem)
    return [(name, file_order(shards[name])) for name in sorted(shards)]


def _split(views: Sequence[TensorView], limit: int) -> list[dict[str, TensorView]]:
    """Fill shards in the order of names; a tensor larger than the limit has one to itself."""
    if limit < 1:
        raise SettingError(f"max_shard_size is {limit}; expected at least 1 byte")
    groups: list[dict[str, TensorView]] = [{}]
    filled = 0
    for view in views:
        if groups[-1] and filled + view.nbytes > limit:
            groups.append({})
            filled = 0
        groups[-1][view.name] = view
        filled += view.nbytes
    return groups


def _named(groups: list[dict[str, TensorView]], stem: str) -> list[tuple[str, list[TensorView]]]:
    if len(groups) == 1:
        return [(f"{stem}.safetensors", file_order(groups[0]))]
    return [
        (f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors", file_order(group))
        for i, group in enumerate(groups, 1)
    ]
