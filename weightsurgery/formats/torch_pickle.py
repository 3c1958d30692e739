"""PyTorch's checkpoints (.bin, .pt, .pth, .ckpt), read as data: no code runs, nothing is copied.

`torch.save` writes a pickle that says where each tensor's numbers lie, and the numbers. The pickle
is interpreted by `unpickle`, and the tensors are views of the file, as those of a safetensors file.
Since PyTorch 1.6 the file is a zip archive; before, it was five pickles and the storages, one after
the other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from weightsurgery.buffers import empty
from weightsurgery.checkpoint import TensorView
from weightsurgery.dtypes import DType
from weightsurgery.errors import FormatError, PolicyError, SurgeryError, counted, shown
from weightsurgery.formats.files import InputFile
from weightsurgery.formats.json_cost import collector_paused
from weightsurgery.formats.pickle_values import Budget, Charge, DamagedError, Global
from weightsurgery.formats.placeholders import LONGEST_LOOK, refuse_placeholder
from weightsurgery.formats.state_dicts import choose
from weightsurgery.formats.strided import gather, is_contiguous
from weightsurgery.formats.torch_globals import (
    GLOBALS,
    Foreign,
    Part,
    Storage,
    Tensor,
    TorchType,
)
from weightsurgery.formats.torch_zip import MAX_PICKLE, read_archive
from weightsurgery.formats.unpickle import unpickle
from weightsurgery.kernels import Block

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001  # of files before PyTorch 1.6
_LARGEST = 1 << 60  # bytes of a storage
_LOOSE = 16 << 20  # bytes of tensors that any file may have, besides four times its size
_Place = tuple[int, int]  # of a storage: offset in the file, and bytes


def open_torch(file: InputFile, key: str | None) -> tuple[dict[str, TensorView], list[str]]:
    """The tensors of a file that `torch.save` wrote; their numbers are not read.

    Args:
        file: The file.
        key: Name of the state dict to take, where the file holds several.

    Returns:
        The tensors, and warnings: which share memory, what was skipped.

    Raises:
        FormatError: It is cut, damaged, or holds no tensors.
        PolicyError: It needs what is not on the list, holds several state dicts, or tensors that
            safetensors cannot hold.
        SettingError: It has no state dict of that name.
        StorageError: It cannot be read.
    """
    with collector_paused():
        return _open(file, key)


def _open(file: InputFile, key: str | None) -> tuple[dict[str, TensorView], list[str]]:
    start = file.read_bytes(0, min(file.size, LONGEST_LOOK))
    refuse_placeholder(start, file=file.path, expected="a PyTorch file")
    if start.startswith(b"PK\x03\x04"):
        root, places, swapped = _open_zip(file)
    elif start.startswith(b"\x80"):
        root, places = _open_old(file)
        swapped = False
    else:
        raise FormatError(
            "not a PyTorch file: neither a zip archive nor a pickle of protocol 2 to 5",
            file=file.path,
            code="E-PICKLE-ARCHIVE",
        )
    entries, warnings = choose(root, key, file.path)
    views = {name: _view(file, name, entry, places, swapped) for name, entry in entries.items()}
    total, most = sum(view.nbytes for view in views.values()), 4 * file.size + _LOOSE
    if total > most:
        raise PolicyError(
            f"its tensors would take {total:,} bytes; the limit is {most:,}",
            file=file.path,
            hint="they repeat few numbers many times; the file may be made to fill a disk",
            code="E-PICKLE-LIMIT",
        )
    told = shown(os.path.basename(file.path))
    return views, [f"{told}: {warning}" for warning in (*_shared(entries), *warnings)]


# --- the two layouts ---


class _Storages:
    """The storages that a pickle names, each once."""

    def __init__(self, file: InputFile) -> None:
        self.file = file
        self.found: dict[str, Storage] = {}

    def load(self, given: Any, charge: Charge) -> Part:
        """What stands for a persistent id: ("storage", type, key, location, count[, view]).

        Raises:
            PolicyError: The storage is saved under two types.
        """
        if type(given) is not tuple or not 5 <= len(given) <= 6 or given[0] != "storage":
            raise DamagedError("a persistent id that is not a storage")
        kind, key, location, count = given[1:5]
        type_ = kind.value if isinstance(kind, Global) else None
        texts = type(key) is str and type(location) is str
        if not isinstance(type_, TorchType) or not texts or type(count) is not int:
            raise DamagedError("a storage without a type, a key or a size")
        if not 0 <= count * type_.width < _LARGEST:
            raise DamagedError(f"a storage of {shown(count)} elements")
        storage = self.found.get(key)
        if storage is None:
            charge(200)
            storage = self.found[key] = Storage(key, type_, count, location)
        if storage.type != type_:
            raise PolicyError(
                f"storage {shown(key)} is saved as {storage.type.name} and as {type_.name}",
                file=self.file.path,
                hint="expected one dtype; clone tensors that are views of others before saving",
                code="E-PICKLE-UNFIT",
            )
        if storage.count != count:
            raise DamagedError(f"storage {shown(key)} has two sizes")
        view = given[5] if len(given) == 6 else None
        if view is None:
            return Part(storage, 0)
        if type(view) is not tuple or len(view) != 3 or type(view[1]) is not int or view[1] < 0:
            raise DamagedError("a part of a storage without a place")
        return Part(storage, view[1])


def _open_zip(file: InputFile) -> tuple[Any, dict[str, _Place], bool]:
    archive, storages = read_archive(file), _Storages(file)
    budget = Budget(file.path)
    budget.charge(len(archive.pickle))
    root, end = unpickle(archive.pickle, known=GLOBALS, load=storages.load, budget=budget)
    if end != len(archive.pickle):
        raise _bad(file, f"{len(archive.pickle) - end:,} bytes follow its pickle")
    places = {}
    for key, storage in storages.found.items():
        if storage.location == "meta":
            continue
        if key not in archive.storages:
            raise _bad(file, f"storage {shown(key)} is missing")
        places[key] = archive.storages[key]
        _check_size(file, storage, places[key][1])
    return root, places, archive.swapped


def _open_old(file: InputFile) -> tuple[Any, dict[str, _Place]]:
    data = file.read_bytes(0, min(file.size, MAX_PICKLE))
    storages, budget = _Storages(file), Budget(file.path)
    budget.charge(len(data))
    found: list[Any] = []
    at = 0
    for _ in range(5):  # magic, version, the system, what was saved, keys of the storages
        value, at = unpickle(data, at, known=GLOBALS, load=storages.load, budget=budget)
        found.append(value)
        if found[0] != _MAGIC or (len(found) > 1 and found[1] != _VERSION):
            raise FormatError(
                "a pickle, but not one that torch.save wrote",
                file=file.path,
                hint="save a state dict with torch.save or safetensors",
                code="E-PICKLE-ARCHIVE",
            )
    keys, places = found[4], {}
    if type(keys) is not list:
        raise _bad(file, "it does not list its storages")
    for key in keys:
        if type(key) is not str:  # whose text could be of any length
            raise _bad(file, "it lists a storage whose key is not text")
        storage = storages.found.get(key)
        if storage is None or key in places:
            raise _bad(file, f"it lists storage {shown(key)}, which it does not have, or twice")
        if at + 8 > file.size:
            raise _bad(file, f"storage {shown(key)} is beyond its end")
        count = int.from_bytes(file.read_bytes(at, 8), "little")
        places[key] = (at + 8, count * storage.type.width)
        _check_size(file, storage, places[key][1])
        at += 8 + places[key][1]
    if at != file.size or places.keys() != storages.found.keys():
        raise _bad(file, f"its storages end at byte {at:,} of {file.size:,}, or some are missing")
    return found[3], places


def _check_size(file: InputFile, storage: Storage, size: int) -> None:
    need = storage.count * storage.type.width
    if size != need:
        raise _bad(file, f"storage {shown(storage.key)} has {size:,} bytes; expected {need:,}")


def _bad(file: InputFile, reason: str) -> FormatError:
    hint = "the download may be incomplete"
    return FormatError(reason, file=file.path, hint=hint, code="E-PICKLE-LOAD")


# --- the tensors ---


def _view(
    file: InputFile,
    name: Any,
    entry: Tensor | Foreign,
    places: Mapping[str, _Place],
    swapped: bool,
) -> TensorView:
    def bad(kind: type[SurgeryError], reason: str, code: str) -> SurgeryError:
        return kind(reason, file=file.path, tensor=str(name), code=code)

    if type(name) is not str or name == "__metadata__":
        reason = f"a tensor's name is '{shown(name)}'; expected text"
        raise FormatError(reason, file=file.path, code="E-PICKLE-LOAD")
    if isinstance(entry, Foreign):
        raise bad(PolicyError, f"{entry.name}; expected plain numbers", "E-PICKLE-UNFIT")
    if len(entry.storage.used) > 1:
        kinds = " and as ".join(entry.storage.used)
        raise bad(PolicyError, f"its storage is read as {kinds}", "E-PICKLE-UNFIT")
    if entry.type.dtype is None:
        reason = f"its dtype is {entry.type.name}, which safetensors cannot hold"
        raise bad(PolicyError, reason, "E-PICKLE-UNFIT")
    begin, size = places[entry.storage.key]
    ends = [(n - 1) * step for n, step in zip(entry.shape, entry.strides, strict=True)]
    elements = size // entry.type.width
    if 0 not in entry.shape and entry.offset + sum(ends) >= elements:
        reason = f"it ends outside its storage of {counted(elements, 'element')}"
        raise bad(FormatError, reason, "E-PICKLE-LOAD")
    read = _reader(file, entry, entry.type.dtype, begin, swapped)

    def read_both(start: int, stop: int) -> tuple[Block, Block]:
        block = read(start, stop)
        return block, block

    return TensorView(name, entry.shape, entry.type.dtype, read_both)


def _reader(
    file: InputFile, entry: Tensor, dtype: DType, begin: int, swapped: bool
) -> Callable[[int, int], Block]:
    """(start, stop) to those elements of a tensor, in row-major order."""
    width = entry.type.width
    component = np.dtype(f"u{width // 2 if dtype.name == 'C64' else width}")

    def run(first: int, count: int) -> Block:
        block = empty(count, dtype.numpy)
        file.read_into(block.view(np.uint8).data, begin + first * width)
        if swapped:
            block.view(component).byteswap(inplace=True)
        return block

    def rows(start: int, stop: int) -> Block:
        if is_contiguous(entry.shape, entry.strides):
            return run(entry.offset + start, stop - start)
        box = (entry.offset, entry.shape, entry.strides)
        return gather(run, box, start, stop, dtype.numpy)

    if not entry.conjugated and not entry.negated:
        return rows

    def lazily(start: int, stop: int) -> Block:
        block = rows(start, stop)
        block = np.conjugate(block) if entry.conjugated else block
        return np.negative(block) if entry.negated else block

    return lazily


def _shared(entries: Mapping[str, Tensor | Foreign]) -> list[str]:
    """Warnings of tensors that lie in one storage."""
    found: dict[str, list[str]] = {}
    for name, entry in sorted(entries.items()):
        if isinstance(entry, Tensor) and 0 not in entry.shape:
            found.setdefault(entry.storage.key, []).append(name)
    return [
        f"{', '.join(map(shown, names[:5]))}{', …' if len(names) > 5 else ''} share memory; "
        "each is read as a tensor of its own"
        for names in found.values()
        if len(names) > 1
    ]
