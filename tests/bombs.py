"""JSON made to exhaust who parses it, the dearest that still passes, and the largest real ones."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.hostile import raw

LARGEST = 99_000_000  # bytes; a header may have 100,000,000
ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
SMILE = "\U0001f600"


def packed(item: str, size: int = LARGEST, start: str = '{"a":[', end: str = "0]}") -> bytes:
    """As much of one text as there is room for."""
    return (start + item * (size // len(item.encode())) + end).encode()


def numbered(item: str, size: int = LARGEST) -> bytes:
    """An object of as many keys as there is room for, all different."""
    count = size // (len(item) + 13)
    return ("{" + ",".join(f'"{i:09x}":{item}' for i in range(count)) + "}").encode()


def tensors(count: int, name: str = "t%d", rows: int = 1) -> bytes:
    """The header of so many float32 tensors, each of so many elements."""
    step = 4 * rows
    entry = ENTRY.replace("[1]", f"[{rows}]")
    each = (f'"{name}":' % i + entry % (step * i, step * i + step) for i in range(count))
    return ("{" + ",".join(each) + "}").encode()


# What has the size of a header, and is made of what costs most.
BOMBS: Mapping[str, Any] = {
    "empty lists": lambda size: packed("[],", size),
    "empty objects": lambda size: packed("{},", size),
    "objects of one key": lambda size: packed('{"a":1},', size),
    "lists of one number": lambda size: packed("[1],", size),
    "lists in lists": lambda size: packed("[[[[]]]],", size),
    "empty texts": lambda size: packed('"",', size),
    "short texts": lambda size: packed('"ab",', size),
    "texts of four bytes": lambda size: packed(f'"{SMILE}",', size),
    "small numbers": lambda size: packed("1,", size),
    "larger numbers": lambda size: packed("12345,", size),
    "fractions": lambda size: packed("1.5,", size),
    "null": lambda size: packed("null,", size),
    "keys of empty objects": lambda size: numbered("{}", size),
    "keys of numbers": lambda size: numbered("1", size),
    "keys of keys": lambda size: numbered('{"a":{}}', size),
    "tensors": lambda size: tensors(size // 80),
    "tensors without size": lambda size: tensors(size // 80, rows=0),
    "one key again and again": lambda size: packed('"a":1,', size, "{", '"a":1}'),
    "nested lists": lambda size: packed("[", size),
    "nested objects": lambda size: packed('{"a":', size, "", "1"),
    "a long text": lambda size: packed("x", size, '{"a":"', '"}'),
    "a long text, one letter wide": lambda size: packed("x", size, f'{{"a":"{SMILE}', '"}'),
    "a long name": lambda size: packed("x", size, '{"', '":1}'),
    "a long escape": lambda size: packed("\\u0041", size, '{"a":"', '"}'),
    "a long integer": lambda size: packed("9", size, '{"a":', "}"),
    "a long fraction": lambda size: packed("9", size, '{"a":0.', "}"),
    "commas in a text": lambda size: packed(",", size, '{"a":"', '"}'),
    "commas": lambda size: packed(",", size),
    "quotes": lambda size: packed('"', size),
    "colons": lambda size: packed(":", size),
    "backslashes": lambda size: packed("\\", size, '{"a":"', '"}'),
}


def header(text: bytes) -> bytes:
    """A safetensors file of this header, and no data."""
    return raw(text, b"")


MEASURE = """
import json, sys
from weightsurgery import open_checkpoint
from weightsurgery.errors import SurgeryError
from weightsurgery.formats.recorded import read_record
from weightsurgery.formats.vocabulary import read_special, read_vocabulary

def tokens(path):
    checkpoint = open_checkpoint(path)
    return (len(read_vocabulary(checkpoint)), len(read_special(checkpoint)))

HOW = {"open": open_checkpoint, "record": read_record, "tokens": tokens}

def bytes_of(word):
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith(word))

def measured(how, path):
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the peak is the present size again
    before = bytes_of("VmHWM:")
    try:
        HOW[how](path)
        told = ""
    except SurgeryError as error:
        told = f"{error.code}: {error}"
    return bytes_of("VmHWM:") - before, told

for path in sys.argv[1:]:  # what is imported and made at first use
    measured("open", path)
for line in sys.stdin:
    print(json.dumps(measured(*json.loads(line))), flush=True)
"""


def measure(good: Path, given: Iterable[tuple[str, Path]]) -> list[tuple[int, str]]:
    """Open files one after another in a process of its own, each removed when it was opened.

    Args:
        good: A model, to be opened first.
        given: How (open, record, tokens) and what; may be made on the way.

    Returns:
        For each the bytes of memory that the process took more than before, and what it said: the
        code and the message, or "".
    """
    found: list[tuple[int, str]] = []
    with subprocess.Popen(
        [sys.executable, "-c", MEASURE, str(good)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        for how, path in given:
            print(json.dumps([how, str(path)]), file=child.stdin, flush=True)
            peak, told = json.loads(child.stdout.readline())
            found.append((peak, told))
            if path.is_file():
                path.unlink()
            else:
                shutil.rmtree(path)
        child.stdin.close()
    assert child.returncode == 0
    return found
