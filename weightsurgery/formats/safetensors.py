"""The safetensors file format: a strict reader of headers, and the header we write.

Layout: 8 bytes little-endian length, a JSON header of that length, then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from weightsurgery.buffers import empty
from weightsurgery.checkpoint import Checkpoint, TensorView
from weightsurgery.dtypes import DTYPES, DType
from weightsurgery.errors import FormatError, counted, shown
from weightsurgery.formats.files import InputFile
from weightsurgery.formats.json_cost import collector_paused
from weightsurgery.formats.placeholders import refuse_placeholder
from weightsurgery.formats.strict_json import parse_object
from weightsurgery.kernels import Block

MAX_HEADER = 100_000_000  # bytes; the library's own limit
MAX_RANK = 64
MAX_DIMENSION = 1 << 48
MAX_ELEMENTS = 1 << 60
_Entry = tuple[DType, tuple[int, ...], tuple[int, int]]  # its offsets are the last two
_FIELDS = {"dtype", "shape", "data_offsets"}
_INTEGERS = {int}  # types, not isinstance: True is an int too
_DIRECTORY = "give the model's directory, or the .safetensors file in it"
_RENAME = "if it is a PyTorch checkpoint, give it the ending .bin or .pt"
_OTHER_KINDS = {  # first bytes, in lower case, to: what it is, what to do
    b"{": ("JSON", _DIRECTORY),
    b"gguf": ("a GGUF file", "convert it to safetensors first"),
    b"pk\x03\x04": ("a zip archive", _RENAME),
    **{bytes((0x80, protocol)): ("a Python pickle", _RENAME) for protocol in range(2, 6)},
}


def open_safetensors(file: InputFile) -> tuple[dict[str, TensorView], dict[str, str]]:
    """Read and check a file's header; no weights are read.

    Returns:
        The tensors in the order of their bytes, and the header's metadata.

    Raises:
        FormatError: A rule of the format is broken, or the file is something else.
    """
    with collector_paused():
        return _open(file)


def _open(file: InputFile) -> tuple[dict[str, TensorView], dict[str, str]]:
    header, start = _read_header(file)
    metadata = header.pop("__metadata__", {})
    if not _is_text_map(metadata):
        raise FormatError(
            "__metadata__ is not a map of strings to strings",
            file=file.path,
            code="E-HEADER-METADATA",
        )
    entries: dict[str, _Entry] = header  # each is replaced where it stands: no two are held
    for name, entry in header.items():
        entries[name] = _check_entry(file, name, entry)
    ordered = sorted(entries, key=lambda name: entries[name][2])
    _check_layout(file, ((name, *entries[name][2]) for name in ordered), file.size - start)
    views = {}
    for name in ordered:
        dtype, shape, (begin, _) = entries.pop(name)
        views[name] = _view(file, name, dtype, shape, start + begin)
    return views, metadata


def open_file(file: InputFile, *, label: str) -> Checkpoint:
    """A single safetensors file as a checkpoint without side files."""
    tensors, metadata = open_safetensors(file)
    return Checkpoint(tensors, label=label, metadata=metadata, files=(file.ref(),))


def _read_header(file: InputFile) -> tuple[dict[str, Any], int]:
    start = file.read_bytes(0, min(file.size, 32)).lower()
    # Not where a header begins: a header of 640 bytes has a pickle's first two bytes as its length.
    if start[8:9] != b"{":
        _refuse_other_kinds(file, start)
    if file.size < 8:
        raise FormatError(
            f"{counted(file.size, 'byte')}; a safetensors file has at least 8",
            file=file.path,
            hint="the download may be incomplete",
            code="E-HEADER-SHORT",
        )
    length = int.from_bytes(file.read_bytes(0, 8), "little")
    if length > MAX_HEADER and _is_text(start):
        raise FormatError(
            "expected a safetensors file, found text",
            file=file.path,
            hint="give a .safetensors file or a model's directory",
            code="E-FILE-OTHER",
        )
    if length > MAX_HEADER:
        raise FormatError(
            f"not a safetensors file, or damaged: its first 8 bytes tell of a header of {length:,} "
            f"bytes; the limit is {MAX_HEADER:,}",
            file=file.path,
            code="E-HEADER-LENGTH",
        )
    if 8 + length > file.size:
        raise FormatError(
            f"header of {length:,} bytes in a file of {file.size:,}",
            file=file.path,
            hint="the download may be incomplete",
            code="E-HEADER-LENGTH",
        )
    data = file.read_bytes(8, length)
    if not data.startswith(b"{"):
        raise FormatError(
            "the header does not begin with '{'", file=file.path, code="E-HEADER-START"
        )
    return parse_object(data, file=file.path, what="header"), 8 + length


def _refuse_other_kinds(file: InputFile, start: bytes) -> None:
    expected = "a safetensors file"
    refuse_placeholder(start, file=file.path, expected=expected)
    for magic, (what, hint) in _OTHER_KINDS.items():
        if start.lstrip().startswith(magic):
            reason = f"expected {expected}, found {what}"
            raise FormatError(reason, file=file.path, hint=hint, code="E-FILE-OTHER")


def _is_text(start: bytes) -> bool:
    """Whether a file begins like UTF-8 text, perhaps cut within a character."""
    for cut in range(4):
        try:
            # Not utf-8-sig: Python would import it now, while a hostile file is open.
            text = start[: len(start) - cut].decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError:
            continue
        return bool(text) and all(c.isprintable() or c in "\t\r\n" for c in text)
    return False


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _check_entry(file: InputFile, name: str, entry: Any) -> _Entry:
    def bad(code: str, reason: str) -> FormatError:
        return FormatError(reason, file=file.path, tensor=name, code=code)

    if not isinstance(entry, dict):
        raise bad("E-HEADER-ENTRY", f"the entry is a JSON {type(entry).__name__}, not an object")
    if entry.keys() != _FIELDS:
        raise bad("E-HEADER-ENTRY", f"fields {shown(sorted(entry))}; expected {sorted(_FIELDS)}")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        reason = f"unknown dtype {shown(entry['dtype'])}; expected one of {', '.join(DTYPES)}"
        raise bad("E-HEADER-DTYPE", reason)
    shape, offsets = entry["shape"], entry["data_offsets"]
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or set(map(type, numbers)) - _INTEGERS:
            reason = f"{what} {shown(numbers)}; expected a list of integers"
            raise bad("E-HEADER-INTEGER", reason)
    if len(shape) > MAX_RANK:
        raise bad("E-HEADER-RANK", f"{len(shape)} dimensions; the limit is {MAX_RANK}")
    if shape and not (min(shape) >= 0 and max(shape) < MAX_DIMENSION):
        reason = f"shape {shown(shape)}; expected dimensions from 0 to 2**48 - 1"
        raise bad("E-HEADER-SHAPE", reason)
    if len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1]:
        reason = f"data_offsets {shown(offsets)}; expected [begin, end] with 0 <= begin <= end"
        raise bad("E-HEADER-OFFSETS", reason)
    elements = math.prod(shape)
    # [2**47, 2**47, 0] too, as the library
    if (elements or math.prod(n or 1 for n in shape)) >= MAX_ELEMENTS:
        raise bad("E-HEADER-SHAPE", f"shape {shown(shape)}; expected fewer than 2**60 elements")
    bits, given = elements * dtype.bits, offsets[1] - offsets[0]
    if bits != 8 * given:
        reason = f"{dtype.name} of shape {shown(shape)} takes {bits:,} bits, not {8 * given:,}"
        raise bad("E-HEADER-SIZE", reason)
    return dtype, tuple(shape), (offsets[0], offsets[1])


def _check_layout(file: InputFile, spans: Iterable[tuple[str, int, int]], size: int) -> None:
    position = 0
    for name, begin, end in spans:
        if begin != position:
            overlaps = begin < position
            what = "overlaps the tensor before it" if overlaps else "leaves a hole before it"
            raise FormatError(
                f"{what}: expected offset {position:,}, got {begin:,}",
                file=file.path,
                tensor=name,
                code="E-DATA-OVERLAP" if overlaps else "E-DATA-HOLE",
            )
        position = end
    if position != size:
        what = "the download may be incomplete" if position > size else "trailing bytes"
        raise FormatError(
            f"the header describes {counted(position, 'byte')} of data, the file has {size:,} "
            f"({what})",
            file=file.path,
            code="E-DATA-CUT" if position > size else "E-DATA-TRAILING",
        )


def _view(
    file: InputFile, name: str, dtype: DType, shape: tuple[int, ...], begin: int
) -> TensorView:
    def read_both(start: int, stop: int) -> tuple[Block, Block]:
        # A block of F4 or F6 may begin within a byte; rounding both ends loses and repeats none.
        first, last = dtype.nbytes(start), dtype.nbytes(stop)
        block = empty((last - first) // dtype.numpy.itemsize, dtype.numpy)
        file.read_into(block.view(np.uint8).data, begin + first)
        return block, block

    return TensorView(name, shape, dtype, read_both)


def file_order(views: Mapping[str, TensorView]) -> list[TensorView]:
    """Tensors as the library lays them out: larger dtypes first, then by name."""
    return sorted(views.values(), key=lambda view: (-view.dtype.order, view.name))


def header_bytes(views: list[TensorView], metadata: Mapping[str, str]) -> bytes:
    """Length and header of a file that holds `views` in this order, as the library writes it.

    With at most one metadata key the bytes equal the library's; with more, the library's order
    is random and ours is sorted.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for view in views:
        end = position + view.nbytes
        header[view.name] = {
            "dtype": view.dtype.name,
            "shape": list(view.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
