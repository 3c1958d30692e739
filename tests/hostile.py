"""Hostile files, byte by byte: safetensors, model directories, indexes, hub caches."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from safetensors.numpy import save

from weightsurgery.checkpoint import Checkpoint
from weightsurgery.errors import SurgeryError, shown
from weightsurgery.formats.files import InputFile

COMMIT = "0123456789abcdef0123456789abcdef01234567"
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def entry(
    begin: int = 0, end: int = 4, *, dtype: Any = "F32", shape: Any = (1,), **extra: Any
) -> dict[str, Any]:
    """A tensor's entry in a header; by default one float at the beginning."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **extra}


def raw(header: Any, data: bytes = bytes(4), *, length: int | None = None) -> bytes:
    """A safetensors file of any header (bytes are taken as they are) and any data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def arrays(*names: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Small float32 tensors of these names."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(3, 4)).astype(np.float32) for name in names}


def weights(*names: str, seed: int = 0) -> bytes:
    """A valid safetensors file of small tensors, as the library writes it."""
    return save(arrays(*names, seed=seed), metadata={"format": "pt"})


def folder(path: Path, files: Mapping[str, Any]) -> Path:
    """A directory of these files; values are bytes, or what to write as JSON."""
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (path / name).write_bytes(data)
    return path


def index(weight_map: Any, total_size: Any = None) -> dict[str, Any]:
    """An index file's content."""
    metadata = {} if total_size is None else {"total_size": total_size}
    return {"metadata": metadata, "weight_map": weight_map}


def sharded(path: Path, changed: Mapping[str, Any] | None = None) -> Path:
    """A model of tensors `a` and `b` in two shards, with a config; files may be changed."""
    files = {
        "config.json": {"model_type": "bert"},
        SHARDS[0]: weights("a"),
        SHARDS[1]: weights("b"),
        INDEX: index({"a": SHARDS[0], "b": SHARDS[1]}, 96),
    }
    return folder(path, files | dict(changed or {}))


def hub_cache(root: Path, repo: str, files: Mapping[str, Any]) -> Path:
    """A repository as huggingface_hub keeps it; gives the snapshot: links into blobs/."""
    home = root / f"models--{repo.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    snapshot = home / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for number, (name, content) in enumerate(files.items()):
        folder(home / "blobs", {f"{number:064x}": content})
        (snapshot / name).symlink_to(Path("../../blobs") / f"{number:064x}")
    return snapshot


def stored(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor, as we read them."""
    return {
        name: (
            view.dtype.name,
            view.shape,
            b"".join(view.read(start, stop).tobytes() for start, stop in view.blocks()),
        )
        for name, view in checkpoint.items()
    }


def stored_by_library(blob: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The same as the safetensors library reads it."""
    return {
        name: (found["dtype"], tuple(found["shape"]), bytes(found["data"]))
        for name, found in safetensors.deserialize(blob)
    }


def contents(path: Path) -> dict[str, bytes | str | None]:
    """Everything under a directory: bytes of files, targets of links, None for the rest."""
    found: dict[str, bytes | str | None] = {}
    for place in sorted(path.rglob("*")):
        name = str(place.relative_to(path))
        if place.is_symlink():
            found[name] = os.readlink(place)
        else:
            found[name] = place.read_bytes() if place.is_file() else None
    return found


def check_told(error: SurgeryError, *, file: str | Path, tensor: str | None = None) -> None:
    """The error is one printable line that names the file and the tensor."""
    message = str(error)
    assert message.isprintable()
    assert message.startswith(f"{shown(file) or repr('')}: ")
    assert error.tensor == tensor
    assert tensor is None or f": tensor '{shown(tensor)}': " in message


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of bytes of every read of an input file from now on."""
    read: list[int] = []
    really = InputFile.read_into

    def read_into(file: InputFile, buffer: Any, offset: int) -> None:
        read.append(memoryview(buffer).nbytes)
        really(file, buffer, offset)

    monkeypatch.setattr(InputFile, "read_into", read_into)
    return read


@contextmanager
def deadline(seconds: float = 5.0) -> Iterator[None]:
    """Fail instead of hanging, as a naive reader does on a FIFO."""

    def too_late(_signal: int, _frame: Any) -> None:
        raise TimeoutError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
