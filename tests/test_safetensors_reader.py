"""The reader of safetensors headers: what it refuses, what it accepts, and that it is the stricter.

The oracle is the safetensors library: whatever we accept, it accepts too, with the same bytes. More
of the same, with files that were changed at random, is in test_fuzz.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings

from tests import hostile
from tests.fuzz.shapes import valid_files
from tests.fuzz.targets import weights_file
from tests.hostile import entry, raw
from weightsurgery.checkpoint import BLOCK
from weightsurgery.dtypes import DTYPES
from weightsurgery.errors import FormatError
from weightsurgery.formats import open_checkpoint, save

ONE = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
HOSTILE_NAME = "w\n\x1b[31m\u202e" + "x" * 300


def text(header: str) -> bytes:
    return raw(header.encode())


def refused(name: str, blob: bytes, reason: str, tensor: str | None = None) -> Any:
    return pytest.param(blob, reason, tensor, id=name)


def shape(value: Any) -> bytes:
    return raw({"w": entry(shape=value)})


def offsets(value: str) -> bytes:
    return text('{"w":{"dtype":"F32","shape":[1],"data_offsets":' + value + "}}")


REFUSED = [
    refused("empty file", b"", "0 bytes; a safetensors file has at least 8"),
    refused("seven bytes", bytes(7), "7 bytes; a safetensors file has at least 8"),
    refused("length beyond the file", raw({}, b"", length=3), "header of 3 bytes in a file of 10"),
    refused("length over the limit", raw({}, length=10**8 + 1), "100,000,001 bytes; the limit"),
    refused("length of all ones", b"\xff" * 16, "header of 18,446,744,073,709,551,615 bytes"),
    refused("length 0", bytes(8), "does not begin with '{'"),
    # the JSON
    refused("not UTF-8", raw(b'{"\xff": 1}'), "not UTF-8 (byte 2)"),
    refused("UTF-16", raw(f'{{"w":{ONE}}}'.encode("utf-16-le")), "not valid JSON"),
    refused("byte-order mark", raw(b"\xef\xbb\xbf{}", b""), "does not begin with '{'"),
    refused("space first", raw(b" {}", b""), "does not begin with '{'"),
    refused("a list", raw(b"[]", b""), "does not begin with '{'"),
    refused("cut short", raw(b'{"w":', b""), "not valid JSON: Expecting value"),
    refused("trailing garbage", raw(b"{} x", b""), "not valid JSON: Extra data"),
    refused("zeros as padding", raw(b"{}\0\0", b""), "not valid JSON: Extra data"),
    refused("two objects", raw(b"{}{}", b""), "not valid JSON: Extra data"),
    refused("raw control character", raw(b'{"a\nb":1}'), "not valid JSON: Invalid control"),
    refused("nesting bomb, lists", raw(b'{"w":' + b"[" * 10**5), "nested too deeply"),
    refused("nesting bomb, objects", raw(b'{"w":' * 10**5), "nested too deeply"),
    refused("nested 128 deep", shape(json.loads("[" * 128 + "]" * 128)), "nested too deeply"),
    refused("half a surrogate pair", text(f'{{"\\ud800":{ONE}}}'), "half a surrogate pair"),
    refused("half in metadata", text('{"__metadata__":{"a":"\\uDFFF"}}'), "half a surrogate pair"),
    # duplicate keys
    refused("name twice", text(f'{{"w":{ONE},"w":{ONE}}}'), "key 'w' occurs twice"),
    refused("escaped twin", text(f'{{"w":{ONE},"\\u0077":{ONE}}}'), "key 'w' occurs twice"),
    refused(
        "field twice",
        text('{"w":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
        "key 'dtype' occurs twice",
    ),
    refused("metadata twice", text('{"__metadata__":{"a":"","a":""}}'), "key 'a' occurs twice"),
    # the entry
    refused("entry a list", raw({"w": ["F32", [1], [0, 4]]}), "JSON list, not an object", "w"),
    refused("entry null", raw({"w": None}), "JSON NoneType, not an object", "w"),
    refused("field missing", raw({"w": {"dtype": "F32", "shape": [1]}}), "fields", "w"),
    refused("field too many", raw({"w": entry(x=1)}), "fields ['data_offsets', 'dtype'", "w"),
    refused(
        "field misspelt", raw({"w": {"dtype": "F32", "shape": [1], "offs": []}}), "expected", "w"
    ),
    # the dtype
    refused("unknown dtype", raw({"w": entry(dtype="F33")}), "unknown dtype F33; expected", "w"),
    refused("lower case dtype", raw({"w": entry(dtype="f32")}), "unknown dtype f32", "w"),
    refused("dtype a list", raw({"w": entry(dtype=["F32"])}), "unknown dtype ['F32']", "w"),
    refused("dtype null", raw({"w": entry(dtype=None)}), "unknown dtype None", "w"),
    # the shape
    refused("shape a number", shape(1), "shape 1; expected a list of integers", "w"),
    refused("shape null", shape(None), "shape None; expected a list of integers", "w"),
    refused("dimension 1.0", shape([1.0]), "shape [1.0]; expected a list of integers", "w"),
    refused("dimension true", shape([True]), "shape [True]; expected a list of integers", "w"),
    refused("dimension '1'", shape(["1"]), "shape ['1']; expected a list of integers", "w"),
    refused("dimension NaN", shape([float("nan")]), "NaN is not JSON"),
    refused("dimension -Infinity", shape([-float("inf")]), "-Infinity is not JSON"),
    refused("dimension negative", shape([-1]), "expected dimensions from 0 to 2**48 - 1", "w"),
    refused("dimension 2**48", shape([2**48]), "expected dimensions from 0 to 2**48 - 1", "w"),
    refused("2**64 wraps to 1", shape([2**32, 2**32, 1]), "fewer than 2**60 elements", "w"),
    refused(
        "overflow on the way to zero",
        raw({"w": entry(0, 0, shape=[2**47, 2**47, 0])}, b""),
        "fewer than 2**60 elements",
        "w",
    ),
    refused("rank 65", shape([1] * 65), "65 dimensions; the limit is 64", "w"),
    refused("too many bytes", raw({"w": entry(0, 8)}, bytes(8)), "takes 32 bits, not 64", "w"),
    refused("too few bytes", shape([2]), "takes 64 bits, not 32", "w"),
    refused("odd F4", raw({"w": entry(0, 1, dtype="F4")}, bytes(1)), "takes 4 bits, not 8", "w"),
    refused("zero-size with bytes", shape([0]), "takes 0 bits, not 32", "w"),
    # the offsets
    refused("three offsets", offsets("[0,2,4]"), "expected [begin, end]", "w"),
    refused("no offsets", offsets("[]"), "expected [begin, end]", "w"),
    refused("offsets an object", offsets("{}"), "data_offsets {}; expected a list", "w"),
    refused("offset negative", offsets("[-4,0]"), "expected [begin, end] with 0 <= begin", "w"),
    refused("offset -0", offsets("[-0,4]"), "data_offsets [-0.0, 4]; expected a list of int", "w"),
    refused("offset 4.0", offsets("[0,4.0]"), "data_offsets [0, 4.0]; expected a list of int", "w"),
    refused("offset 4e0", offsets("[0,4e0]"), "data_offsets [0, 4.0]; expected a list of int", "w"),
    refused("offset false", offsets("[false,4]"), "[False, 4]; expected a list of integers", "w"),
    refused("offset 1e999", offsets("[0,1e999]"), "1e999 is out of range"),
    refused("offset 2**64 + 4", offsets(f"[0,{2**64 + 4}]"), "takes 32 bits, not 147,573", "w"),
    refused("offset of 4,300 digits", offsets(f"[0,{'9' * 4300}]"), "integer of 4,300 digits"),
    refused("offset of 5,000 digits", offsets(f"[0,{'9' * 5000}]"), "integer of 5,000 digits"),
    refused("offset 010", offsets("[0,04]"), "not valid JSON"),
    refused("offsets reversed", offsets("[4,0]"), "expected [begin, end] with 0 <= begin", "w"),
    # the layout
    refused(
        "overlap", raw({"a": entry(), "b": entry()}, bytes(8)), "overlaps the tensor before it", "b"
    ),
    refused(
        "zero-size inside another",
        raw({"a": entry(), "b": entry(2, 2, shape=[0])}),
        "overlaps the tensor before it: expected offset 4, got 2",
        "b",
    ),
    refused("hole first", raw({"w": entry(4, 8)}, bytes(8)), "leaves a hole before it", "w"),
    refused(
        "hole between",
        raw({"a": entry(), "b": entry(8, 12)}, bytes(12)),
        "leaves a hole before it: expected offset 4, got 8",
        "b",
    ),
    refused("trailing bytes", raw({"w": entry()}, bytes(5)), "5 (trailing bytes)"),
    refused("data cut short", raw({"w": entry()}, bytes(3)), "the download may be incomplete"),
    refused("nothing described", raw({}, bytes(1)), "0 bytes of data, the file has 1"),
    # the metadata
    refused(
        "metadata a number", raw({"__metadata__": {"a": 1}}), "not a map of strings to strings"
    ),
    refused("metadata nested", raw({"__metadata__": {"a": {}}}), "not a map of strings to strings"),
    refused("metadata a list", raw({"__metadata__": []}), "not a map of strings to strings"),
    refused("metadata null", raw({"__metadata__": None}), "not a map of strings to strings"),
    # the message
    refused("hostile name", raw({HOSTILE_NAME: 1}), "not an object", HOSTILE_NAME),
    refused("hostile dtype", raw({"w": entry(dtype="\x1b" * 999)}), r"dtype \x1b\x1b", "w"),
]


@pytest.mark.parametrize(("blob", "reason", "tensor"), REFUSED)
def test_must_refuse(tmp_path: Path, blob: bytes, reason: str, tensor: str | None) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(blob)
    with pytest.raises(FormatError, match=re.escape(reason)) as told:
        open_checkpoint(path)
    hostile.check_told(told.value, file=path, tensor=tensor)
    assert told.value.exit_code == 3


def test_a_long_header_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw(b"{", b"", length=10**8 + 1))
    os.truncate(path, 1 << 30)  # sparse; the header would fit
    read = hostile.count_reads(monkeypatch)
    with pytest.raises(FormatError, match="the limit is 100,000,000"):
        open_checkpoint(path)
    assert 0 < sum(read) < 100


EACH_DTYPE = {
    name: entry(0, dtype.bits, dtype=name, shape=[2, 4]) for name, dtype in DTYPES.items()
}
NUMBERED = {f"w{i}": entry(4 * i, 4 * i + 4) for i in range(4)}
ACCEPTED = {
    "no tensors": raw({}, b""),
    "no tensors, metadata": raw({"__metadata__": {"format": "pt", "": ""}}, b""),
    "scalar": raw({"w": entry(shape=[])}),
    "zero-size": raw({"w": entry(0, 0, shape=[0])}, b""),
    "zero-size, many dimensions": raw({"w": entry(0, 0, shape=[3, 0, 2**30])}, b""),
    "zero-size at both ends": raw(
        {"z": entry(4, 4, shape=[0]), "w": entry(), "a": entry(0, 0, shape=[0, 2])}
    ),
    "rank 64": raw({"w": entry(shape=[1] * 64)}),
    "entries unordered": raw(dict(reversed(NUMBERED.items())), bytes(range(16))),
    "offsets unordered": raw({"a": entry(4, 8), "b": entry(0, 4)}, bytes(range(8))),
    "offsets unaligned": raw(
        {"a": entry(0, 1, dtype="U8"), "b": entry(1, 5), "c": entry(5, 13, dtype="F64")},
        bytes(range(13)),
    ),
    "header unaligned": raw(json.dumps({"w": entry()}).encode() + b" ", b"\1\2\3\4"),
    "spaces as padding": raw(json.dumps({"w": entry()}).encode() + b" " * 64, b"\1\2\3\4"),
    "header of 640 bytes": raw(json.dumps({"w": entry()}).encode().ljust(640), b"\1\2\3\4"),
    "header of 1,152 bytes": raw(json.dumps({"w": entry()}).encode().ljust(1152), b"\1\2\3\4"),
    "fields in another order": text('{"w":{"data_offsets":[0,4],"shape":[1],"dtype":"F32"}}'),
    "white space within": text('{ "w" :\n{"dtype":"F32",\t"shape":[ 1 ],"data_offsets":[0, 4]}}'),
    "escapes": text('{"\\u0077\\/\\ud83d\\ude00":' + ONE + "}"),
    "empty name": raw({"": entry()}),
    "unicode names": raw({"schicht.ä": entry(), "層\u202e\U0001f600": entry(4, 8)}, bytes(8)),
    "odd names": raw({'"\\/\n\x00': entry(), "../../etc/passwd": entry(4, 8)}, bytes(8)),
    "long name": raw({"x" * 10_000: entry()}),
    "name of a field": raw({"dtype": entry(), "shape": entry(4, 8)}, bytes(8)),
    **{
        f"dtype {name}": raw({"w": EACH_DTYPE[name]}, bytes(range(dtype.bits)))
        for name, dtype in DTYPES.items()
    },
}


@pytest.mark.parametrize("blob", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_must_accept(tmp_path: Path, blob: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(blob)
    found = open_checkpoint(path)
    assert hostile.stored(found) == hostile.stored_by_library(blob)
    with safetensors.safe_open(path, framework="np") as library:
        assert list(found) == sorted(library.keys())
        assert found.metadata == (library.metadata() or {})


def test_there_are_22_dtypes() -> None:
    assert len(DTYPES) == 22
    assert {"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "C64", "BOOL"} <= DTYPES.keys()


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("F4", (BLOCK * 2 // 3 + 2, 3)),
        ("F4", (2, BLOCK + 1)),
        ("F6_E2M3", (BLOCK * 2 // 3 + 2, 3)),
        ("F6_E3M2", (2, BLOCK + 2)),
    ],
    ids=str,
)
def test_packed_tensors_whose_blocks_begin_within_a_byte(
    tmp_path: Path, rng: np.random.Generator, dtype: str, shape: tuple[int, ...]
) -> None:
    size = DTYPES[dtype].nbytes(shape[0] * shape[1])
    blob = raw({"w": entry(0, size, dtype=dtype, shape=shape)}, rng.bytes(size))
    path = tmp_path / "x.safetensors"
    path.write_bytes(blob)
    found = open_checkpoint(path)
    assert len(list(found["w"].blocks())) > 1
    assert hostile.stored(found) == hostile.stored_by_library(blob)
    save(found, str(tmp_path / "y.safetensors"), hashes=False)
    assert (tmp_path / "y.safetensors").read_bytes()[-size:] == blob[-size:]


@pytest.mark.parametrize("cut", range(7))
@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3"])
def test_packed_tensors_cut_anywhere_lose_no_byte(tmp_path: Path, dtype: str, cut: int) -> None:
    size = DTYPES[dtype].nbytes(8)
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw({"w": entry(0, size, dtype=dtype, shape=[8])}, bytes(range(size))))
    view = open_checkpoint(path)["w"]
    parts = [view.read(0, cut), view.read(cut, cut + 1), view.read(cut + 1, 8)]
    assert b"".join(part.tobytes() for part in parts) == bytes(range(size))


# --- any file ---------------------------------------------------------------------------------


@settings(max_examples=400, deadline=None, database=None, derandomize=True)
@given(valid=valid_files())
def test_valid_files_are_accepted(
    tmp_path_factory: pytest.TempPathFactory, valid: tuple[dict[str, Any], bytes]
) -> None:
    assert weights_file(tmp_path_factory.getbasetemp(), raw(*valid))
