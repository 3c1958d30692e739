"""Hostile PyTorch files: refused by name, in a second, in little memory, and nothing runs."""

from __future__ import annotations

import argparse
import math
import pickle
import re
import struct
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import hostile
from tests.bombs import measure
from tests.test_torch_files import NEW, state
from weightsurgery.errors import FormatError, PolicyError, SurgeryError
from weightsurgery.formats import open_checkpoint, torch_zip
from weightsurgery.formats.files import InputFile

EMPTY = b"\x80\x02}."
DATA = {"data.pkl": EMPTY, "version": b"3\n"}
MOST = 200_000_000  # bytes that a hostile file may cost
SECONDS = 5  # a hostile file takes less than one on an idle machine


def zipped(records: Mapping[str, bytes], *, root: str = "x/", **options: Any) -> bytes:
    """An archive of these records, as the standard library writes it."""
    with tempfile.TemporaryFile() as file:
        with zipfile.ZipFile(file, "w", **options) as archive:
            for name, data in records.items():
                archive.writestr(zipfile.ZipInfo(root + name), data)
        file.seek(0)
        return file.read()


def written(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


# --- the archive ------------------------------------------------------------------------------


def patched(old: bytes, new: bytes, *, count: int = 1) -> bytes:
    """The plain archive with some of its bytes changed."""
    data = zipped(DATA)
    assert old in data
    return data.replace(old, new, count)


def recompressed() -> bytes:
    with tempfile.TemporaryFile() as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x/data.pkl", b"\0" * 10_000_000)  # a bomb that need not go off
        file.seek(0)
        return file.read()


def in_directory(offset: int, form: str, value: int) -> bytes:
    """The plain archive with another number in the central directory's first entry."""
    data = bytearray(zipped(DATA))
    struct.pack_into(form, data, data.index(b"PK\x01\x02") + offset, value)
    return bytes(data)


def at_end(offset: int, form: str, value: int) -> bytes:
    data = bytearray(zipped(DATA))
    struct.pack_into(form, data, len(data) - 22 + offset, value)
    return bytes(data)


BAD: dict[str, tuple[Callable[[], bytes], type[SurgeryError], str]] = {
    "protocol 0": (lambda: b"(dp0\n.", FormatError, "neither a zip archive nor a pickle"),
    "empty": (lambda: b"", FormatError, "not a PyTorch file"),
    "HTML": (lambda: b"<html>", FormatError, "expected a PyTorch file, found an HTML page"),
    "LFS": (lambda: b"version https://git-lfs", FormatError, "found a Git LFS pointer"),
    "cut": (lambda: zipped(DATA)[:-30], FormatError, "does not end with an end record"),
    "only a magic": (lambda: b"PK\3\4", FormatError, "too few"),
    "trailing": (lambda: zipped(DATA) + b"\0", FormatError, "does not end with an end record"),
    "comment": (
        lambda: at_end(20, "<H", 2) + b"hi",
        FormatError,
        "does not end with an end record",
    ),
    "before": (lambda: b"PK\3\4" + zipped(DATA), FormatError, "not where the end record says"),
    "several disks": (lambda: at_end(4, "<H", 1), FormatError, "several parts"),
    "too many": (lambda: at_end(8, "<I", 0x30003), FormatError, "directory is cut"),
    "two roots": (
        lambda: zipped({"x/data.pkl": EMPTY, "y/version": b"3"}, root=""),
        FormatError,
        "several roots: x, y",
    ),
    "names that differ in case": (
        lambda: zipped({"x/data.pkl": EMPTY, "X/data.pkl": EMPTY}, root=""),
        FormatError,
        "two of this name",
    ),
    "absolute": (lambda: zipped(DATA, root="/x/"), FormatError, "not a name"),
    "dotted": (lambda: zipped(DATA, root="../"), FormatError, "not a name"),
    "dotted inside": (lambda: zipped({**DATA, "../e": b""}), FormatError, "not a name"),
    "backslash": (lambda: zipped({**DATA, "data\\0": b""}), FormatError, "not a name"),
    "drive": (lambda: zipped(DATA, root="C:x/"), FormatError, "not a name"),
    "nested zip": (lambda: zipped({**DATA, "in.zip": zipped(DATA)}), FormatError, "not a name"),
    "folder": (lambda: zipped({**DATA, "data/": b""}), FormatError, "not a name"),
    "program": (
        lambda: zipped({**DATA, "code/__torch__.py": b"1", "constants.pkl": EMPTY}),
        PolicyError,
        "TorchScript",
    ),
    "no pickle": (lambda: zipped({"version": b"3"}), FormatError, r"no data\.pkl"),
    "compressed": (recompressed, FormatError, "compressed"),
    "checksum": (lambda: patched(EMPTY, b"\x80\x02]."), FormatError, "its checksum is"),
    "local name": (
        lambda: patched(b"x/version", b"x/hidden!"),
        FormatError,
        "local header says something else",
    ),
    "local flags": (
        lambda: patched(b"PK\x03\x04\x14\x00\x00", b"PK\x03\x04\x14\x00\x01"),
        FormatError,
        "local header says something else",
    ),
    "local size": (
        lambda: patched(b"\x04\0\0\0\x04\0\0\0\x0a", b"\x04\0\0\0\x05\0\0\0\x0a"),
        FormatError,
        "local header says something else",
    ),
    "encrypted": (lambda: in_directory(8, "<H", 1), FormatError, "flags 0x1"),
    "a folder": (lambda: in_directory(38, "<I", 0x10), FormatError, "marked as a folder"),
    "sizes differ": (lambda: in_directory(20, "<I", 3), FormatError, "3 bytes stored for 4"),
    "size of 4 GB": (
        lambda: in_directory(20, "<Q", 0xFFFFFFF0FFFFFFF0),
        FormatError,
        "4,294,967,280 bytes; the limit is",
    ),
    "longer than the file": (
        lambda: in_directory(20, "<Q", 0x0000100000001000),
        FormatError,
        "longer than the archive",
    ),
    "64-bit size without its field": (
        lambda: in_directory(20, "<Q", 2**64 - 1),
        FormatError,
        "extra fields are wrong",
    ),
    "offset": (lambda: in_directory(42, "<I", 5), FormatError, "at offset 5; expected 0"),
    "byte order": (
        lambda: zipped({**DATA, "byteorder": b"middle"}),
        FormatError,
        "byteorder is 'middle'",
    ),
    "not UTF-8": (
        lambda: zipped(DATA).replace(b"x/version", b"\xff/version"[:9]),
        FormatError,
        "UTF-8",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_archive_is_refused(name: str, tmp_path: Path) -> None:
    make, kind, reason = BAD[name]
    (tmp_path / "m.bin").write_bytes(make())
    with hostile.deadline(), pytest.raises(kind, match=reason) as caught:
        open_checkpoint(tmp_path / "m.bin")
    assert type(caught.value) is kind
    hostile.check_told(caught.value, file=tmp_path / "m.bin")


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.bin", "w") as archive:
        for data in (EMPTY, b"\x80\x02]."):
            archive.writestr("x/data.pkl", data)
    with pytest.raises(FormatError, match="there are two of this name"):
        open_checkpoint(tmp_path / "m.bin")


@pytest.mark.parametrize(
    ("limit", "value", "reason"),
    [
        ("MAX_PICKLE", 3, "4 bytes; the limit is 3"),
        ("MAX_RECORDS", 1, "2 records in a directory of .* bytes are too many"),
        ("MAX_DIRECTORY", 10, "are too many"),
    ],
)
def test_budgets(
    limit: str, value: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_zip, limit, value)
    (tmp_path / "m.bin").write_bytes(zipped(DATA))
    with pytest.raises(FormatError, match=reason):
        open_checkpoint(tmp_path / "m.bin")


def test_any_changed_byte_of_an_archive_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    """But for those of the numbers, whose checksum would cost as much as reading them all."""
    path = written(tmp_path / "m.bin", {"w": torch.arange(3.0)})
    good, torn = path.read_bytes(), tmp_path / "torn.bin"
    numbers = good.index(struct.pack("<3f", 0, 1, 2))
    passed = 0
    for place in range(len(good)):
        torn.write_bytes(good[:place] + bytes([good[place] ^ 0x41]) + good[place + 1 :])
        try:
            archive = torch_zip.read_archive(InputFile(str(torn)))
        except SurgeryError:
            continue
        before = torch_zip.read_archive(InputFile(str(path)))
        assert archive.pickle == before.pickle
        assert archive.storages == before.storages == {"0": (numbers, 12)}
        passed += not numbers <= place < numbers + 12
    assert 0 < passed < len(good) / 2  # times, versions, padding


# --- the pickle -------------------------------------------------------------------------------

TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
FLOATS = b"ctorch\nFloatStorage\n"


def integer(value: int) -> bytes:
    data = value.to_bytes(9, "little", signed=True)
    return b"\x8a\x09" + data


def storage(count: int = 4, kind: bytes = FLOATS, key: bytes = b"U\x010") -> bytes:
    return b"(U\x07storage" + kind + key + b"U\x03cpu" + integer(count) + b"tQ"


def tensor(
    offset: int = 0, shape: tuple[int, ...] = (2, 2), strides: tuple[int, ...] = (2, 1), **of: Any
) -> bytes:
    """The opcodes of a tensor of the archive's one storage, of four numbers."""
    numbers = [b"(" + b"".join(map(integer, each)) + b"t" for each in (shape, strides)]
    return TENSOR + b"(" + storage(**of) + integer(offset) + b"".join(numbers) + b"\x89}tR"


def state_dict(*tensors: bytes) -> bytes:
    pairs = (b"U\x01" + bytes((97 + i,)) + each for i, each in enumerate(tensors))
    return b"\x80\x02}(" + b"".join(pairs) + b"u."


def archive_of(content: bytes) -> bytes:
    return zipped({**DATA, "data.pkl": content, "data/0": struct.pack("<4f", 1, 2, 3, 4)})


def opened(folder: Path, content: bytes) -> SurgeryError:
    """The error for an archive with this pickle."""
    (folder / "m.bin").write_bytes(archive_of(content))
    with hostile.deadline(SECONDS), pytest.raises(SurgeryError) as caught:
        open_checkpoint(folder / "m.bin")
    hostile.check_told(caught.value, file=folder / "m.bin", tensor=caught.value.tensor)
    return caught.value


def test_these_opcodes_make_a_tensor(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(archive_of(state_dict(tensor(), tensor(1, (3,), (1,)))))
    found = open_checkpoint(tmp_path / "m.bin")
    assert {name: view.read(0, view.size).tolist() for name, view in found.items()} == {
        "a": [1, 2, 3, 4],
        "b": [2, 3, 4],
    }


WRONG: dict[str, tuple[bytes, str, str]] = {
    "beyond its storage": (state_dict(tensor(1)), "E-PICKLE-LOAD", "outside its storage of 4"),
    "a far stride": (
        state_dict(tensor(0, (2,), (1 << 40,))),
        "E-PICKLE-LOAD",
        "outside its storage",
    ),
    "negative offset": (state_dict(tensor(-1)), "E-PICKLE-LOAD", "an offset that cannot be"),
    "negative size": (state_dict(tensor(0, (-2, 2))), "E-PICKLE-LOAD", "shape holds what is not"),
    "negative stride": (state_dict(tensor(3, (4,), (-1,))), "E-PICKLE-LOAD", "stride holds what"),
    "strides of another rank": (state_dict(tensor(0, (2,))), "E-PICKLE-LOAD", "more or fewer"),
    "2**60 elements": (
        state_dict(tensor(0, (1 << 30, 1 << 30), (0, 0))),
        "E-PICKLE-LOAD",
        r"2\*\*60 elements",
    ),
    "2**60 by 0": (
        state_dict(tensor(0, (1 << 40, 1 << 40, 0), (0, 0, 0))),
        "E-PICKLE-LOAD",
        r"2\*\*60 elements",
    ),
    "65 dimensions": (
        state_dict(tensor(0, (1,) * 65, (1,) * 65)),
        "E-PICKLE-LOAD",
        "at most 64 integers",
    ),
    "expanded beyond reason": (
        state_dict(tensor(0, (1 << 20, 1 << 20), (0, 0))),
        "E-PICKLE-LIMIT",
        "would take 4,398,046,511,104 bytes; the limit is",
    ),
    "a storage of another size": (
        state_dict(tensor(count=5)),
        "E-PICKLE-LOAD",
        "storage 0 has 16 bytes; expected 20",
    ),
    "a storage that is not there": (
        state_dict(tensor(key=b"U\x011")),
        "E-PICKLE-LOAD",
        "storage 1 is missing",
    ),
    "a storage of two types": (
        state_dict(tensor(), tensor(kind=b"ctorch\nIntStorage\n")),
        "E-PICKLE-UNFIT",
        "storage 0 is saved as float32 and as int32",
    ),
    "a storage that is not one": (b"\x80\x02U\x01aQ.", "E-PICKLE-LOAD", "not a storage"),
    "bytes behind the pickle": (EMPTY + b"}.", "E-PICKLE-LOAD", "2 bytes follow its pickle"),
    "cut": (b"\x80\x02}", "E-PICKLE-LOAD", "cut or damaged"),
    "cut in a text": (b"\x80\x02X\xff\0\0\0abc", "E-PICKLE-LOAD", "cut or damaged"),
    "an empty stack": (b"\x80\x02R.", "E-PICKLE-LOAD", "cut or damaged"),
    "no mark": (b"\x80\x02u.", "E-PICKLE-LOAD", "cut or damaged"),
    "an empty memo": (b"\x80\x02h\x05.", "E-PICKLE-LOAD", "cut or damaged"),
    "not UTF-8": (b"\x80\x02U\x01\xff.", "E-PICKLE-LOAD", "cut or damaged"),
    "a call of a number": (b"\x80\x02K\x01)R.", "E-PICKLE-LOAD", "not a function"),
    "a call of what is opaque": (
        b"\x80\x02cargparse\nNamespace\n)R)R.",
        "E-PICKLE-LOAD",
        "not a function",
    ),
    "state of a number": (b"\x80\x02K\x01}b.", "E-PICKLE-LOAD", "a state for what has none"),
    "items of a number": (b"\x80\x02K\x01K\x01a.", "E-PICKLE-LOAD", "not a list"),
    "half an item": (b"\x80\x02}(K\x01u.", "E-PICKLE-LOAD", "not a dictionary"),
    "protocol 1": (pickle.dumps({"a": 1}, 1), "E-PICKLE-LOAD", "protocol 0 or 1; expected 2"),
    "protocol 6": (b"\x80\x06}.", "E-PICKLE-LOAD", "protocol 6"),
    "an instance of protocol 0": (b"\x80\x02(iposix\nsystem\n.", "E-PICKLE-LOAD", "opcode b'i'"),
    "an extension": (b"\x80\x02\x82\x01.", "E-PICKLE-LOAD", "opcode b'.x82'"),
    "a program": (
        b"\x80\x02}X\x01\x00\x00\x00wcposix\nsystem\nX\x0e\x00\x00\x00touch code-ran\x85Rs.",
        "E-PICKLE-REFUSED",
        r"needs posix\.system",
    ),
    "a program of protocol 4": (
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0etouch code-ran\x85R.",
        "E-PICKLE-REFUSED",
        r"needs posix\.system",
    ),
    "a getter": (b"\x80\x02cbuiltins\ngetattr\n.", "E-PICKLE-REFUSED", r"needs builtins\.getattr"),
    "a nested pickle": (
        b"\x80\x02ctorch.storage\n_load_from_bytes\n.",
        "E-PICKLE-REFUSED",
        "_load_from_bytes",
    ),
    "a control character": (b"\x80\x02ca\nb\x1b[31m\n.", "E-PICKLE-REFUSED", r"a\.b.x1b"),
    "an endless name": (b"\x80\x02c" + b"a" * 9999, "E-PICKLE-LOAD", "cut or damaged"),
    "an integer without end": (b"\x80\x02\x8b\xff\xff\xff\x7f", "E-PICKLE-LOAD", "at most 255"),
    "nested marks": (b"\x80\x02" + b"(" * 9999, "E-PICKLE-LOAD", "1,000 levels"),
    "a size of something else": (b"\x80\x02ctorch\nSize\n(K\x01tR.", "E-PICKLE-LOAD", "torch.Size"),
    "pairs that are none": (
        b"\x80\x02ccollections\nOrderedDict\n(](K\x01et\x85R.",
        "E-PICKLE-LOAD",
        "",
    ),
    "a parameter of nothing": (
        b"\x80\x02ctorch._utils\n_rebuild_parameter\nK\x01\x85R.",
        "E-PICKLE-LOAD",
        "not a tensor",
    ),
    "tensors of tensors of tensors": (
        b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\nq\x05ctorch\nTensor\nq\x06)q\x07"
        + b"0(h\x05h\x06h\x07Ntq\x07" * 5000
        + b"0U\x01ah\x05h\x07Rs.",
        "E-PICKLE-LOAD",
        "a tensor of class torch.Tensor, made by torch._tensor._rebuild_from_type_v2",
    ),
    "a tensor that is a dictionary": (
        state_dict(
            b"ctorch._tensor\n_rebuild_from_type_v2\n(ccollections\nOrderedDict\n"
            b"ctorch\nTensor\n)NtR"
        ),
        "E-PICKLE-LOAD",
        "a tensor of class torch.Tensor, made by collections.OrderedDict",
    ),
    "a name that is an object": (
        b"\x80\x02}cargparse\nNamespace\n)R" + tensor() + b"s.",
        "E-PICKLE-LOAD",
        "name is 'argparse.Namespace'; expected text",
    ),
    "a name that is a number": (
        b"\x80\x02}K\x03" + tensor() + b"s.",
        "E-PICKLE-LOAD",
        "name is '3'; expected text",
    ),
    "the name of the metadata": (
        b"\x80\x02}U\x0c__metadata__" + tensor() + b"s.",
        "E-PICKLE-LOAD",
        "name is '__metadata__'",
    ),
    "a list": (b"\x80\x02]K\x01a.", "E-PICKLE-LOAD", "no dictionary of tensors, but list"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_pickle_is_refused_by_a_rule(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content, code, reason = WRONG[name]
    error = opened(tmp_path, content)
    assert error.code == code
    assert not reason or re.search(reason, str(error))
    assert list(tmp_path.rglob("code-ran")) == []


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.ones(2).to_sparse(), "a sparse tensor"),
        (lambda: torch.ones(2, 2).to_sparse_csr(), "a sparse tensor"),
        (lambda: torch.ones(2, device="meta"), "on the meta device"),
        (lambda: torch.ones(2).to(torch.complex128), "its dtype is complex128"),
        (
            lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
            "a quantized tensor",
        ),
    ],
    ids=["sparse", "rows of sparse", "meta", "complex128", "quantized"],
)
def test_what_safetensors_cannot_hold_is_refused_by_name(
    make: Callable[[], torch.Tensor], reason: str, tmp_path: Path
) -> None:
    value = {"w": make()}
    with pytest.raises(PolicyError, match=f"tensor 'w': {reason}") as told:
        open_checkpoint(written(tmp_path / "m.bin", value))
    assert told.value.code == "E-PICKLE-UNFIT"
    beside = written(tmp_path / "m.bin", {"state_dict": {"a": torch.ones(1)}, "other": [value]})
    assert list(open_checkpoint(beside)) == ["a"]


def test_one_storage_under_two_dtypes_is_refused(tmp_path: Path) -> None:
    value = torch.ones(8, dtype=torch.uint8)
    path = written(tmp_path / "m.pt", {"a": value, "b": value.view(torch.float8_e5m2)})
    with pytest.raises(PolicyError, match="storage 0 is saved as uint8 and as untyped bytes"):
        open_checkpoint(path)


def test_a_whole_model_is_refused_with_what_to_save(tmp_path: Path) -> None:
    path = written(tmp_path / "m.pt", torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(PolicyError, match=r"container\.Sequential.*model\.state_dict\(\)"):
        open_checkpoint(path)


def test_a_distributed_tensor_is_data(tmp_path: Path) -> None:
    """One process saves its part alone; beside the weights that is no matter."""
    spec = b"ctorch.distributed.tensor._dtensor_spec\nDTensorSpec\n)\x81}U\x04meshNsb"
    part = (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_wrapper_subclass\n"
        b"ctorch.distributed.tensor\nDTensor\n(K\x01t}(U\x0d_local_tensor" + tensor()
    ) + (b"U\x05_spec" + spec + b"utR")
    error = opened(tmp_path, state_dict(part))
    assert error.code == "E-PICKLE-UNFIT"
    assert "tensor 'a': a DTensor" in str(error)
    beside = b"\x80\x02}(U\x05model}U\x01w" + tensor() + b"sU\x01o]" + part + b"au."
    (tmp_path / "m.bin").write_bytes(archive_of(beside))
    assert list(open_checkpoint(tmp_path / "m.bin")) == ["w"]


# --- files before PyTorch 1.6 -----------------------------------------------------------------


def old(folder: Path) -> bytes:
    value = {"w": torch.arange(4.0)}
    path = written(folder / "good.pt", value, _use_new_zipfile_serialization=False)
    return path.read_bytes()


OLD: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a plain pickle": (lambda _: pickle.dumps({"w": 1}, 2), "not one that torch.save wrote"),
    "another version": (lambda b: b.replace(b"M\xe9\x03.", b"M\xea\x03.", 1), "not one that torch"),
    "cut": (lambda b: b[:-1], "its storages end at byte"),
    "cut before the numbers": (lambda b: b[:-24], "is beyond its end"),
    "trailing": (lambda b: b + b"\0", "its storages end at byte"),
    "another size": (lambda b: b[:-24] + struct.pack("<q4f", 5, 1, 2, 3, 4), "expected 16"),
    "a size beyond all": (lambda b: b[:-24] + b"\xff" * 24, "expected 16"),
    "a key that takes 2**70 steps to print": (
        lambda b: b[: b.rindex(b"\x80\x02]")] + b"\x80\x02])" + b"q\1h\1\x86" * 70 + b"a.",
        "a storage whose key is not text",
    ),
}


@pytest.mark.parametrize("name", OLD)
def test_a_bad_file_from_before_1_6(name: str, tmp_path: Path) -> None:
    change, reason = OLD[name]
    content = change(old(tmp_path))
    assert content != old(tmp_path)
    (tmp_path / "m.pth").write_bytes(content)
    with hostile.deadline(), pytest.raises(FormatError, match=reason) as caught:
        open_checkpoint(tmp_path / "m.pth")
    hostile.check_told(caught.value, file=tmp_path / "m.pth")


# --- what a hostile file may cost -------------------------------------------------------------

MANY = 10_000_000
FEWER = range(1_000_000)
PRIME = (1 << 61) - 1  # its multiples have the same hash


def numbered(each: bytes, count: int) -> bytes:
    return b"".join(b"J" + struct.pack("<i", i) + each for i in range(count))


BOMBS: dict[str, Callable[[], bytes]] = {
    "dictionaries": lambda: b"}" * MANY,
    "sets": lambda: b"\x8f" * MANY,
    "memo": lambda: b"N" + b"\x94" * MANY,
    "scattered memo": lambda: b"N" + b"".join(b"r" + struct.pack("<I", i * 977) for i in FEWER),
    "the same again": lambda: b"]" + b"2" * MANY,
    "nested tuples": lambda: b")" + b"\x85" * MANY,
    "a tuple of itself twice": lambda: b")" + b"q\x01h\x01\x86" * (MANY // 5),
    "which is a key": lambda: b"})" + b"q\x01h\x01\x86" * 70 + b"K\x01s.",
    "a list of itself": lambda: b"]q\x01" + b"h\x01a" * (MANY // 3),
    "a wide text": lambda: b"X" + struct.pack("<I", MANY) + b"\xf0\x9f\x98\x80" + b"a" * MANY,
    "short texts": lambda: b"U\x01a" * (MANY // 3),
    "long integers": lambda: (b"\x8a\xff" + b"\x7f" * 255) * (MANY // 257),
    "keys": lambda: b"}(" + numbered(b"N", 600_000) + b"u",
    "colliding keys": lambda: (
        b"}("
        + b"".join(b"\x8a\x0b" + (PRIME * i).to_bytes(11, "little") + b"N" for i in FEWER)
        + b"u"
    ),
    "dictionaries of one": lambda: b"}NNs" * (MANY // 4),
    "objects": lambda: b"cargparse\nNamespace\nq\0" + b"h\0)\x81" * (MANY // 4),
    "a call of many pairs": lambda: (
        b"ccollections\nOrderedDict\nq\0(](U\x01aN\x86"
        + b"2" * 500_000
        + b"e\x85q\1"
        + b"h\0h\1R" * 1_000_000
    ),
    "tensors": lambda: (
        b"}("
        + b"".join(
            b"X\x09\0\0\0%09d" % i + (tensor() if not i else b"h\1") + (b"q\1" if not i else b"")
            for i in range(MANY // 20)
        )
    ),
}


def test_no_pickle_costs_much(tmp_path: Path) -> None:
    good = written(tmp_path / "good.pt", {"w": torch.ones(2)})

    def files() -> Any:
        for name, make in BOMBS.items():
            path = tmp_path / f"{name}.pt"
            path.write_bytes(archive_of(b"\x80\x04" + make()[:MANY]))
            yield "open", path

    for name, (peak, told) in zip(BOMBS, measure(good, files()), strict=True):
        assert told.startswith("E-PICKLE-"), name
        assert peak < MOST, (name, peak)


def test_a_bomb_is_refused_in_a_second(tmp_path: Path) -> None:
    for name in ("short texts", "a tuple of itself twice"):
        (tmp_path / "m.pt").write_bytes(archive_of(b"\x80\x04" + BOMBS[name]()[:MANY]))
        began = time.process_time()
        with pytest.raises(PolicyError, match="more than 150,000,000 bytes of memory"):
            open_checkpoint(tmp_path / "m.pt")
        assert time.process_time() - began < 2, name


def test_an_archive_of_many_records_costs_little(tmp_path: Path) -> None:
    good = written(tmp_path / "good.pt", {"w": torch.ones(2)})
    path = tmp_path / "many.pt"
    records = {f"data/{i}": b"" for i in range(torch_zip.MAX_RECORDS - 2)}
    path.write_bytes(zipped({**DATA, **records}))
    ((peak, told),) = measure(good, [("open", path)])
    assert told.startswith("E-PICKLE-LOAD: ")
    assert peak < MOST


# --- what torch makes of the same file --------------------------------------------------------

WORDS = (
    *(TENSOR, FLOATS, storage(), tensor(), tensor(1, (3,), (1,)), tensor(0, (4,), (0,))),
    *(b"ctorch\nLongStorage\n", b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\nSize\n"),
    *(b"ccollections\nOrderedDict\n", b"U\x01a", b"U\x01b", b"q\x01", b"h\x01", b"q\x02", b"h\x02"),
    *(
        b"\x80\x02",
        b"K\x01",
        b"}",
        b"]",
        b")",
        b"(",
        b"t",
        b"u",
        b"s",
        b"a",
        b"e",
        b"R",
        b"b",
        b"N",
    ),
    *(b"\x85", b"\x86", b"\x87", b"\x88", b"\x89", b"\x81", b".", b"Q", b"\x8a\x01\x05"),
)
GOOD = state_dict(tensor(), tensor(1, (3,), (1,)))


@st.composite
def pickles(draw: st.DrawFn) -> bytes:
    """Nearly right pickles: opcodes and words of right ones, put together, cut, or changed."""
    if draw(st.booleans()):
        return b"\x80\x02" + b"".join(draw(st.lists(st.sampled_from(WORDS), max_size=12))) + b"."
    blob = bytearray(GOOD)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(blob)))
        new = draw(st.sampled_from(WORDS) | st.binary(max_size=2))
        blob[at : at + draw(st.integers(0, 3))] = new
    return bytes(blob)


@settings(max_examples=400, deadline=None)
@given(content=pickles())
def test_what_we_accept_torch_reads_the_same(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.pt"
    path.write_bytes(archive_of(content))
    try:
        found = open_checkpoint(path)
    except SurgeryError as error:
        hostile.check_told(error, file=path, tensor=error.tensor)
        return
    try:
        loaded = torch.load(path, weights_only=True)
    except Exception:
        return  # what it does not load at all does no harm
    while not any(isinstance(value, torch.Tensor) for value in loaded.values()):
        (loaded,) = [v for v in loaded.values() if isinstance(v, dict) and v]
    for name, view in found.items():
        values = view.read(0, view.size).reshape(view.shape)
        assert values.tolist() == loaded[name].tolist()
        assert math.prod(view.shape) == loaded[name].numel()


def mutated(random: Random, data: bytes) -> bytes:
    """A file with a few of its bytes changed, cut out, repeated or put elsewhere."""
    blob = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        at, source, count = (random.randrange(n) for n in (len(blob), len(blob), 40))
        part = bytes(blob[source : source + count])
        edits = (
            (1, bytes([blob[at] ^ 1 << random.randrange(8)])),
            (1, random.randbytes(1)),
            (count // 3, b""),
            (0, random.randbytes(4)),
            (0, part),
            (count, part),
        )
        width, new = random.choice(edits)
        blob[at : at + width] = new
    return bytes(blob)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("layout", ["zip", "its pickle", "before 1.6"])
def test_a_mutated_file_is_refused_or_read_as_torch_reads_it(
    layout: str, protocol: int, tmp_path: Path
) -> None:
    tensors = {n: t for n, t in state().items() if layout[0] != "b" or t.dtype not in NEW}
    value = {"model": tensors, "args": argparse.Namespace(a=1), "n": 2**70}
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": layout[0] != "b"}
    path = written(tmp_path / "m.pt", value, **options)
    good, random, read = path.read_bytes(), Random(protocol), 0
    with zipfile.ZipFile(path) if layout[0] != "b" else nullcontext() as archive:
        records = {i.filename: archive.read(i) for i in archive.infolist()} if archive else {}
    end = good.rindex(b"e.") + 2 if layout[0] == "b" else 0  # of a file's pickles
    for _ in range(250):
        if layout == "its pickle":
            changed = mutated(random, records["m/data.pkl"])
            path.write_bytes(zipped({**records, "m/data.pkl": changed}, root=""))
        elif layout == "zip":
            path.write_bytes(mutated(random, good))
        else:
            path.write_bytes(mutated(random, good[:end]) + good[end:])
        try:
            found = open_checkpoint(path)
            blocks = {name: view.read(0, view.size) for name, view in found.items()}
        except SurgeryError as error:
            hostile.check_told(error, file=path, tensor=error.tensor)
            continue
        try:
            loaded = torch.load(path, weights_only=False)["model"]
        except Exception:
            continue  # what it does not load at all does no harm
        read += 1
        for name, block in blocks.items():
            expected = loaded[name].detach().resolve_conj().resolve_neg().contiguous()
            raw = expected.reshape(-1).view(torch.uint8) if expected.numel() else expected
            assert found[name].shape == tuple(expected.shape)
            assert block.tobytes() == bytes(raw.flatten().tolist())
    assert read
