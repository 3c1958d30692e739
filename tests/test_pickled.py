"""Pickled checkpoints: refused without the flag, checked byte by byte, loaded in confinement."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests import hostile
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.cli import cli, main
from weightsurgery.errors import FormatError, PolicyError, SettingError, StorageError, SurgeryError
from weightsurgery.formats import hub, open_checkpoint, pickled, save, torch_zip
from weightsurgery.formats.files import InputFile

EMPTY = b"\x80\x02}."
DATA = {"data.pkl": EMPTY, "version": b"3\n"}
SYSTEM = b"\x80\x02}X\x01\x00\x00\x00wcposix\nsystem\nX\x0e\x00\x00\x00touch code-ran\x85Rs."


def zipped(records: Mapping[str, bytes], *, root: str = "x/", **options: Any) -> bytes:
    """An archive of these records, as the standard library writes it."""
    with tempfile.TemporaryFile() as file:
        with zipfile.ZipFile(file, "w", **options) as archive:
            for name, data in records.items():
                archive.writestr(zipfile.ZipInfo(root + name), data)
        file.seek(0)
        return file.read()


def state() -> dict[str, torch.Tensor]:
    """Tensors of all kinds: dtypes, views, empty ones, shared ones."""
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(6, 4, generator=generator)
    plain = {
        str(dtype).rpartition(".")[2]: (base * 9).to(dtype)
        for dtype in (
            *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
            *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool),
            *(torch.float8_e4m3fn, torch.float8_e5m2),
        )
    }
    return {
        **plain,
        "uint8": torch.arange(5, dtype=torch.uint8),
        "shared": base,
        "shared.transposed": base.t(),
        "shared.part": base[1:3],
        "strided": torch.arange(20.0)[::3],
        "expanded": torch.ones(1).expand(7),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
        "odd name/é": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def written(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def assert_equal(found: Checkpoint, expected: Mapping[str, torch.Tensor], folder: Path) -> None:
    """What the safetensors library makes of the tensors is what we read."""
    cloned = {n: t.detach().clone().contiguous() for n, t in expected.items()}
    save_file(cloned, folder / "expected.safetensors")
    assert hostile.stored(found) == hostile.stored_by_library(
        (folder / "expected.safetensors").read_bytes()
    )


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go: nothing may be left there, whatever a test does."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setenv("TMPDIR", str(place))
    return place


@pytest.fixture(autouse=True)
def nothing_left(temporary: Path) -> Any:
    yield
    assert list(temporary.iterdir()) == []


# --- what is readable -------------------------------------------------------------------------


def test_a_state_dict_is_read_as_the_library_would_write_it(tmp_path: Path) -> None:
    path = written(tmp_path / "m.pt", state())
    found = open_checkpoint(path, allow_pickle=True)
    assert_equal(found, state(), tmp_path)
    assert not found.is_directory
    assert [file.path for file in found.files] == [str(path)]
    (told,) = found.warnings
    assert told == (
        "m.pt: shared, shared.part, shared.transposed share memory; each is read as a tensor of "
        "its own"
    )


def test_the_record_names_the_pickle_and_its_hash(tmp_path: Path) -> None:
    path = written(tmp_path / "m.ckpt", {"w": torch.arange(4.0)})
    found = open_checkpoint(path, allow_pickle=True)
    record = save(found, tmp_path / "out.safetensors")
    (file,) = record["inputs"][0]["files"]
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert file == {"name": "m.ckpt", "size": path.stat().st_size, "sha256": sha256}
    assert_equal(open_checkpoint(tmp_path / "out.safetensors"), {"w": torch.arange(4.0)}, tmp_path)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"state_dict": {"w": torch.ones(2)}, "epoch": 3}, "only its entry 'state_dict' was read"),
        ({"w": torch.ones(2), "step": 3}, "entries that are no tensors were left out: 'step'"),
    ],
    ids=["nested", "others"],
)
def test_what_is_left_out_is_told(value: Any, told: str, tmp_path: Path) -> None:
    found = open_checkpoint(written(tmp_path / "m.pth", value), allow_pickle=True)
    assert list(found) == ["w"]
    assert told in found.warnings[0]


def sharded(path: Path, **changed: Any) -> Path:
    """A model directory of two pickled shards."""
    hostile.folder(path, {"config.json": {"model_type": "bert"}})
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    written(path / names[0], {"a": torch.ones(3)})
    written(path / names[1], {"b": torch.zeros(2, 2, dtype=torch.bfloat16)})
    weight_map = {"a": names[0], "b": names[1], **changed}
    hostile.folder(path, {"pytorch_model.bin.index.json": hostile.index(weight_map, 20)})
    return path


def test_a_sharded_directory_is_read_and_written_as_safetensors(tmp_path: Path) -> None:
    found = open_checkpoint(sharded(tmp_path / "model"), allow_pickle=True)
    assert found.warnings == ()
    save(found, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *hostile.SHARDS,
        *(hostile.INDEX, "config.json", "README.md", "wsurg-record.json"),
    }
    expected = {"a": torch.ones(3), "b": torch.zeros(2, 2, dtype=torch.bfloat16)}
    assert_equal(open_checkpoint(tmp_path / "out"), expected, tmp_path)


def test_one_pickle_in_a_directory(tmp_path: Path) -> None:
    hostile.folder(tmp_path / "model", {"config.json": {"model_type": "bert"}})
    written(tmp_path / "model" / "pytorch_model.bin", {"w": torch.ones(2)})
    with pytest.raises(PolicyError, match=r"pytorch_model\.bin: a PyTorch pickle"):
        open_checkpoint(tmp_path / "model")
    found = open_checkpoint(tmp_path / "model", allow_pickle=True)
    assert dict(found.layout) == {"w": "model.safetensors"}


def test_an_adapter_with_pickled_weights(tmp_path: Path) -> None:
    hostile.folder(tmp_path / "a", {"adapter_config.json": {"peft_type": "LORA"}})
    written(tmp_path / "a" / "adapter_model.bin", {"w.lora_A.weight": torch.ones(1, 2)})
    with pytest.raises(PolicyError, match="allow-pickle"):
        open_checkpoint(tmp_path / "a")
    found = open_checkpoint(tmp_path / "a", allow_pickle=True)
    assert dict(found.layout) == {"w.lora_A.weight": "adapter_model.safetensors"}


@pytest.mark.parametrize("name", ["../a.bin", "/a.bin", "a.safetensors", "x\\a.bin", ".bin"])
def test_an_index_names_plain_files(name: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"plain name ending in \.bin"):
        open_checkpoint(sharded(tmp_path / "m", a=name), allow_pickle=True)


@pytest.mark.parametrize(
    "told", ["", "[1]", "{}", '{"shared": 5, "warnings": []}', '{"shared": [[]], "warnings": "x"}']
)
def test_what_the_child_tells_is_not_believed(told: str, tmp_path: Path) -> None:
    path = written(tmp_path / "m.bin", {"w": torch.ones(2)})
    with pytest.raises(FormatError):
        pickled._told({"told": told}, InputFile(str(path)))
    with pytest.raises(FormatError):
        pickled._told({}, InputFile(str(path)))


def test_two_answers_are_refused_with_the_flag_too(tmp_path: Path) -> None:
    hostile.sharded(tmp_path / "m")
    written(tmp_path / "m" / "pytorch_model.bin", {"w": torch.ones(2)})
    for allowed in (False, True):
        with pytest.raises(PolicyError, match="ambiguous"):
            open_checkpoint(tmp_path / "m", allow_pickle=allowed)
    chosen = {"weights": "pytorch_model.bin", "allow_pickle": True}
    assert list(open_checkpoint(tmp_path / "m", **chosen)) == ["w"]
    with pytest.raises(PolicyError, match="pass --allow-pickle"):
        open_checkpoint(tmp_path / "m", weights="pytorch_model.bin")


def test_torch_stays_out_of_this_process(tmp_path: Path) -> None:
    path = written(tmp_path / "m.bin", {"w": torch.ones(2)})
    program = (
        "import sys; from weightsurgery import open_checkpoint as o; "
        f"o({str(path)!r}, allow_pickle=True)['w'].read(0, 2); print('torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", program]) == b"False\n"


# --- what is refused before anything is unpickled ---------------------------------------------


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
    "legacy": (lambda: pickle.dumps({"w": 1}, 2), PolicyError, "before PyTorch 1.6"),
    "protocol 0": (lambda: b"(dp0\n.", PolicyError, "before PyTorch 1.6"),
    "empty": (lambda: b"", FormatError, "not a PyTorch zip archive"),
    "HTML": (lambda: b"<html>", FormatError, "not a PyTorch zip archive"),
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
    "not UTF-8": (
        lambda: zipped(DATA).replace(b"x/version", b"\xff/version"[:9]),
        FormatError,
        "UTF-8",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_archive_is_refused_unread(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def popen(*_: Any, **__: Any) -> None:
        raise AssertionError("a child was started")

    monkeypatch.setattr(subprocess, "Popen", popen)
    make, kind, reason = BAD[name]
    (tmp_path / "m.bin").write_bytes(make())
    with hostile.deadline(), pytest.raises(kind, match=reason) as caught:
        open_checkpoint(tmp_path / "m.bin", allow_pickle=True)
    assert type(caught.value) is kind
    hostile.check_told(caught.value, file=tmp_path / "m.bin")


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.bin", "w") as archive:
        for data in (EMPTY, SYSTEM):
            archive.writestr("x/data.pkl", data)
    with pytest.raises(FormatError, match="there are two of this name"):
        open_checkpoint(tmp_path / "m.bin", allow_pickle=True)


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
        open_checkpoint(tmp_path / "m.bin", allow_pickle=True)


def test_any_changed_byte_of_an_archive_is_an_error_or_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is checked is all there is: no flipped byte gets as far as torch and matters."""
    monkeypatch.setattr(zipfile, "MAX_EXTRACT_VERSION", 255)  # which torch does not look at
    path = written(tmp_path / "m.bin", {"w": torch.arange(3.0)})
    good, torn = path.read_bytes(), tmp_path / "torn.bin"
    passed = 0
    for place in range(len(good)):
        torn.write_bytes(good[:place] + bytes([good[place] ^ 0x41]) + good[place + 1 :])
        try:
            torch_zip.check_archive(pickled.InputFile(str(torn)))
        except SurgeryError:
            continue
        with zipfile.ZipFile(torn) as now, zipfile.ZipFile(path) as before:
            assert {n: now.read(n) for n in now.namelist()} == {
                n: before.read(n) for n in before.namelist()
            }
        passed += 1
    assert 0 < passed < len(good) / 2  # times, versions, padding


# --- what only the child can refuse -----------------------------------------------------------


def hashed_for_ever(depth: int = 70) -> bytes:
    """A tuple of itself twice, 70 times over, as a key: hashing it takes 2**70 steps, in C."""
    return b"\x80\x02})" + b"q\x01h\x01\x86" * depth + b"K\x01s."


def opened(folder: Path, content: bytes) -> SurgeryError:
    """The error for an archive with this pickle."""
    (folder / "m.bin").write_bytes(zipped({**DATA, "data.pkl": content}))
    with pytest.raises(SurgeryError) as caught:
        open_checkpoint(folder / "m.bin", allow_pickle=True)
    hostile.check_told(caught.value, file=folder / "m.bin")
    return caught.value


def test_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = opened(tmp_path, SYSTEM)
    assert type(error) is PolicyError
    assert error.code == "E-PICKLE-REFUSED"
    assert "posix.system" in str(error)
    assert "weights_only" not in str(error)  # torch's own advice is to run it
    assert list(tmp_path.rglob("code-ran")) == []


def test_a_hang_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickled, "SECONDS", 1)
    began = time.monotonic()
    error = opened(tmp_path, hashed_for_ever())
    assert type(error) is PolicyError
    assert error.code == "E-PICKLE-LIMIT"
    assert "took longer than 1 seconds, and was stopped" in str(error)
    assert time.monotonic() - began < 60


def test_a_memory_bomb_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickled, "_MEMORY", 64 << 20)
    error = opened(tmp_path, b"\x80\x02" + b"]" * 3_000_000 + b".")
    assert type(error) is PolicyError
    assert error.code == "E-PICKLE-LIMIT"
    assert "bytes of memory" in str(error)


def test_a_claimed_size_is_not_believed(tmp_path: Path) -> None:
    path = written(tmp_path / "m.bin", {"w": torch.ones(1).expand(1 << 20, 1 << 20)})
    with pytest.raises(PolicyError, match="would take 4,398,046,511,104 bytes; the limit is"):
        open_checkpoint(path, allow_pickle=True)


def test_a_storage_that_is_longer_than_its_record(tmp_path: Path) -> None:
    path = written(tmp_path / "m.bin", {"w": torch.arange(100.0)})
    with zipfile.ZipFile(path) as archive:
        records = {i.filename: archive.read(i) for i in archive.infolist()}
    records["m/data.pkl"] = records["m/data.pkl"].replace(b"Kd", b"K\xff")
    path.write_bytes(zipped(records, root=""))
    with pytest.raises(FormatError, match="torch cannot load it"):
        open_checkpoint(path, allow_pickle=True)


@pytest.mark.parametrize(
    ("value", "kind", "reason"),
    [
        ([1, 2], FormatError, "no dictionary of tensors"),
        ({}, FormatError, "no dictionary of tensors"),
        ({3: torch.ones(1)}, FormatError, "a tensor's name is 3"),
        ({"__metadata__": torch.ones(1)}, FormatError, "name is '__metadata__'"),
        ({"w": torch.ones(2).to_sparse()}, PolicyError, "plain tensors only"),
        ({"w": torch.ones(2, device="meta")}, PolicyError, "plain tensors only"),
        ({"w": torch.ones(2, dtype=torch.complex128)}, PolicyError, "'w' is complex128"),
        (
            {"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}},
            PolicyError,
            "ambiguous tensors: those of 'a' and those of 'b'",
        ),
        (
            {"best": torch.ones(()), "state_dict": {"w": torch.ones(1)}},
            PolicyError,
            "ambiguous tensors: its own and those of 'state_dict'",
        ),
    ],
    ids=["list", "empty", "number", "metadata", "sparse", "meta", "complex128", "two", "own"],
)
def test_what_is_no_state_dict_is_refused(
    value: Any, kind: type[SurgeryError], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=reason):
        open_checkpoint(written(tmp_path / "m.bin", value), allow_pickle=True)


def test_a_cut_pickle_is_malformed(tmp_path: Path) -> None:
    error = opened(tmp_path, b"\x80\x02}")
    assert type(error) is FormatError
    assert error.code == "E-PICKLE-LOAD"
    assert "torch cannot load it: EOFError" in str(error)


# --- whatever the child does ------------------------------------------------------------------


def replaced(monkeypatch: pytest.MonkeyPatch, folder: Path, program: str) -> Path:
    """Let another program stand in for the child; gives a good archive."""
    script = folder / "child.py"
    script.write_text(program)
    monkeypatch.setattr(pickled.confined, "__file__", str(script))
    return written(folder / "m.bin", {"w": torch.ones(1)})


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_a_child_that_sleeps_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = f"""
import subprocess, time
other = subprocess.Popen(["sleep", "100"])
open({str(tmp_path / "pid")!r}, "w").write(str(other.pid))
time.sleep(100)
"""
    path = replaced(monkeypatch, tmp_path, program)
    monkeypatch.setattr(pickled, "SECONDS", 1)
    monkeypatch.setattr(pickled, "_IMPORT", 3)
    with hostile.deadline(60), pytest.raises(PolicyError, match="took longer than 1 seconds"):
        open_checkpoint(path, allow_pickle=True)
    pid = int((tmp_path / "pid").read_text())
    while is_alive(pid):  # the deadline of the test run ends this
        time.sleep(0.01)


ENDS: dict[str, tuple[str, type[SurgeryError], str]] = {
    "crash": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", FormatError, "code -11"),
    "killed": ("import os; os.kill(os.getpid(), 9)", PolicyError, "killed, perhaps for its memory"),
    "code 1": ("raise SystemExit(1)", FormatError, "ended with code 1"),
    "no torch": (
        "import sys; sys.stderr.write('noise\\n\"no torch here\"'); sys.exit(2)",
        SettingError,
        "no torch here",
    ),
    "no room": ("import sys; sys.stderr.write('\"full\"'); sys.exit(6)", StorageError, "TMPDIR"),
    "noise": ("import sys; sys.stderr.write('[1]'); sys.exit(3)", FormatError, "code 3"),
    "hostile words": (
        "import sys; sys.stderr.write('\"\\\\u001b[31m\"'); sys.exit(5)",
        PolicyError,
        r"\\x1b\[31m",
    ),
    "bad product": (
        "import sys; open(sys.argv[2], 'wb').write(b'x' * 9)",
        FormatError,
        "found text",
    ),
    "no product": ("", FormatError, "wrote no valid safetensors file: cannot open"),
    "pickle as product": (
        "import sys; open(sys.argv[2], 'wb').write(b'PK\\3\\4' * 9)",
        FormatError,
        "zip archive",
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_however_the_child_ends_there_is_one_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, kind, reason = ENDS[name]
    path = replaced(monkeypatch, tmp_path, program)
    with pytest.raises(kind, match=reason) as caught:
        open_checkpoint(path, allow_pickle=True)
    assert str(caught.value).isprintable()


def test_the_child_is_told_little_and_may_do_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    confined = Path(pickled.confined.__file__)
    program = f"""
import json, os, resource, runpy, sys
main = runpy.run_path({str(confined)!r})["_confine"]
main(*map(int, sys.argv[3:]))
names = ("AS", "CPU", "FSIZE", "NOFILE", "CORE")
limits = {{n: resource.getrlimit(getattr(resource, "RLIMIT_" + n))[0] for n in names}}
told = [limits, dict(os.environ), os.getcwd(), os.getsid(0) == os.getpid(), sys.flags.isolated]
json.dump(told, open({str(tmp_path / "told")!r}, "w"))
"""
    monkeypatch.setenv("SECRET", "token")
    path = replaced(monkeypatch, tmp_path, program)
    with pytest.raises(FormatError, match="wrote no valid"):
        open_checkpoint(path, allow_pickle=True)
    limits, environment, folder, leads, isolated = json.loads((tmp_path / "told").read_text())
    size = path.stat().st_size
    assert limits["AS"] < 3 * size + pickled._MEMORY + (1 << 30)
    assert limits["FSIZE"] == 4 * size + pickled._MOST
    assert limits["CORE"] == 0
    assert limits["NOFILE"] == 64
    assert pickled.SECONDS <= limits["CPU"] <= pickled.SECONDS + 10
    assert environment.keys().isdisjoint({"SECRET", "PYTHONPATH", "HF_TOKEN"})
    assert Path(folder).parent == tmp_path / "temporary"
    assert (leads, isolated) == (True, 1)


def test_no_room_is_told_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "m.bin", {"w": torch.ones(1)})
    full = os.statvfs_result((4096, 4096, 1, 0, 0, 1, 1, 1, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _path: full)
    with pytest.raises(StorageError, match="0 are free; set TMPDIR"):
        open_checkpoint(path, allow_pickle=True)


def refused(**_: object) -> None:
    """Where nothing can be made: no permission, no room, no inode."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["TMPDIR", "TEMP"])
@pytest.mark.parametrize("kind", ["nothing", "a file", "closed"])
def test_a_temporary_directory_that_cannot_be_used_is_told(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python would pass it over without a word, and fill the disk that was to be spared."""
    path, given = written(tmp_path / "m.bin", {"w": torch.ones(1)}), tmp_path / "given"
    if kind == "a file":
        given.write_bytes(b"")
    if kind == "closed":
        given.mkdir()
        monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    monkeypatch.delenv("TMPDIR")
    monkeypatch.setenv(name, str(given))
    reason = "nothing can be written there" if kind == "closed" else "it is no directory"
    with pytest.raises(StorageError, match=f"/given: {name} names it .* {reason}; set {name}"):
        open_checkpoint(path, allow_pickle=True)


def test_a_temporary_directory_that_the_program_chose_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, given = written(tmp_path / "m.bin", {"w": torch.ones(1)}), tmp_path / "given"
    given.mkdir()
    monkeypatch.setenv("TMPDIR", str(given))
    assert list(open_checkpoint(path, allow_pickle=True)) == ["w"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_nothing(number: int, code: int, tmp_path: Path, temporary: Path) -> None:
    (tmp_path / "m.bin").write_bytes(zipped({**DATA, "data.pkl": hashed_for_ever()}))
    arguments = [sys.executable, "-m", "weightsurgery", "inspect", "m.bin", "--allow-pickle"]
    run = subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (children := _children(run.pid)):
        time.sleep(0.02)
    run.send_signal(number)
    _, said = run.communicate(timeout=60)
    assert (run.returncode, said.count("\n")) == (code, 1)
    assert list(temporary.iterdir()) == []
    assert not any(map(is_alive, children))


@pytest.mark.parametrize("paused", [False, True], ids=["loading", "starting"])
def test_a_killed_run_takes_its_child_along(paused: bool, tmp_path: Path, temporary: Path) -> None:
    """Also one that had not come as far as to ask for it; what lies there the next run removes."""
    (tmp_path / "m.bin").write_bytes(zipped({**DATA, "data.pkl": hashed_for_ever()}))
    run, child = started(tmp_path)
    if paused:
        os.kill(child, signal.SIGSTOP)
    else:
        with hostile.deadline(60):
            while not is_asynchronous(child):
                time.sleep(0.02)
    run.kill()
    run.wait(timeout=60)
    if paused:
        os.kill(child, signal.SIGCONT)
    with hostile.deadline(20):  # by itself it would go on for a minute
        while is_alive(child):
            time.sleep(0.01)
    (left,) = temporary.iterdir()
    assert (left / "said").exists()
    (temporary / "wsurg-benchmarks-0").mkdir()  # others' folders stay
    (temporary / "wsurg-private-aaaaaaaa").symlink_to(tmp_path)
    assert list(
        open_checkpoint(written(tmp_path / "w.pt", {"w": torch.ones(1)}), allow_pickle=True)
    )
    others = sorted(path.name for path in temporary.iterdir())
    assert others == ["wsurg-benchmarks-0", "wsurg-private-aaaaaaaa"]
    (temporary / others[0]).rmdir()
    (temporary / others[1]).unlink()


def test_the_folder_of_a_run_that_goes_on_stays(tmp_path: Path, temporary: Path) -> None:
    (tmp_path / "m.bin").write_bytes(zipped({**DATA, "data.pkl": hashed_for_ever()}))
    run, _ = started(tmp_path)
    (folder,) = temporary.iterdir()
    assert list(
        open_checkpoint(written(tmp_path / "w.pt", {"w": torch.ones(1)}), allow_pickle=True)
    )
    assert list(temporary.iterdir()) == [folder]
    run.terminate()
    run.wait(timeout=60)


def started(folder: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A run that opens m.bin, and its confined child."""
    arguments = [sys.executable, "-m", "weightsurgery", "inspect", "m.bin", "--allow-pickle"]
    run = subprocess.Popen(arguments, cwd=folder, stderr=subprocess.DEVNULL)
    while not (children := _children(run.pid)):
        time.sleep(0.02)
    return run, children[0]


def is_asynchronous(pid: int) -> bool:
    """Whether a process has asked to be told of the end of its stdin."""
    flags = Path(f"/proc/{pid}/fdinfo/0").read_text().splitlines()[1].split()[1]
    return bool(int(flags, 8) & os.O_ASYNC)


def _children(pid: int) -> list[int]:
    """The confined children of a process."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [p for p in map(int, found) if b"confined" in Path(f"/proc/{p}/cmdline").read_bytes()]


# --- the flag ---------------------------------------------------------------------------------


def test_whoever_opens_models_may_be_allowed_to() -> None:
    with cli.make_context("wsurg", ["inspect", "x"], resilient_parsing=True) as context:
        commands = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    having = {
        flag: {n for n, c in commands.items() if c and any(flag in p.opts for p in c.params)}
        for flag in ("--weights", "--allow-pickle")
    }
    assert having["--weights"] == having["--allow-pickle"]
    assert {"inspect", "diff", "mix", "fisher", "evaluate"} <= having["--allow-pickle"]


@pytest.mark.parametrize("name", ["m.bin", "m.pt", "m.pth", "m.ckpt", "m.pkl"])
def test_the_refusal_says_how(name: str, tmp_path: Path) -> None:
    path = written(tmp_path / name, {"w": torch.ones(1)})
    with pytest.raises(PolicyError, match=r"pass --allow-pickle .*wsurg convert --allow-pickle"):
        open_checkpoint(path)
    (tmp_path / "x.safetensors").write_bytes(path.read_bytes())
    for allowed in (False, True):
        with pytest.raises(PolicyError, match=r"call it \.bin and pass --allow-pickle"):
            open_checkpoint(tmp_path / "x.safetensors", allow_pickle=allowed)


def test_a_settings_file_cannot_allow_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One may lie in the folder of a model that somebody looks at."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "m.bin", {"w": torch.ones(1)})
    (tmp_path / "wsurg.toml").write_text("[inspect]\nallow-pickle = true\n")
    for typed, code in ((["--allow-pickle"], 0), ([], 2)):
        with pytest.raises(SystemExit) as ended:
            main(["inspect", "m.bin", *typed])
        assert ended.value.code == code
    assert "type --allow-pickle; wsurg.toml cannot give it" in capsys.readouterr().err


# --- the hub ----------------------------------------------------------------------------------


def test_pickles_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    content = written(tmp_path / "m.bin", {"w": torch.ones(2)}).read_bytes()
    files = {"pytorch_model.bin": content, "config.json": {"model_type": "bert"}}
    hostile.hub_cache(tmp_path / "hub", "org/name", files)
    with pytest.raises(PolicyError, match="pass --allow-pickle"):
        open_checkpoint("org/name")
    found = open_checkpoint("org/name", allow_pickle=True)
    assert found.hub_id == f"org/name@{hostile.COMMIT}"
    assert_equal(found, {"w": torch.ones(2)}, tmp_path)


def test_pickles_are_fetched_only_where_allowed_and_last(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[list[str]] = []

    def fetch(_repo: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.append(allow_patterns)
        return "snapshot"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert len(list(hub.snapshots("org/name"))) == 2
    assert len(list(hub.snapshots("org/name", pickles=True))) == 3
    assert ["pytorch_model.bin" in patterns for patterns in asked] == [False] * 4 + [True]
