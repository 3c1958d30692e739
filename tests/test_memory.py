"""Peak memory does not grow with the model: measured in fresh processes, on sparse files."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

TINY, SMALL, LARGE = 64 << 10, 40 << 20, 320 << 20  # bytes of weights
GROWTH = 1.1
SCRIPT = """
import sys
from weightsurgery.cli import main

try:
    main(sys.argv[1:])
finally:
    peak = [line for line in open("/proc/self/status") if line.startswith("VmHWM:")]
    print(peak[0].split()[1], file=sys.stderr)
"""


def sparse_model(path: Path, size: int, *, last: float = 0) -> Path:
    """Zeros that take no disk, but for the last: half of them an embedding, the rest eight layers.

    A vocabulary with a token for each row of the embedding lies beside them.
    """
    names = ["wte.weight", *(f"h.{i}.weight" for i in range(8))]
    header, begin = {}, 0
    for name, part in zip(names, [size // 2] + [size // 16] * 8, strict=True):
        header[name] = {
            "dtype": "F32",
            "shape": [part // 4096, 1024],
            "data_offsets": [begin, begin + part],
        }
        begin += part
    text = json.dumps(header).encode()
    path.mkdir()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size - 4)
        file.seek(0, os.SEEK_END)
        file.write(struct.pack("<f", last))
    (path / "vocab.txt").write_text("".join(f"token{i}\n" for i in range(size // 8192)))
    return path


def peak_of(*arguments: object) -> int:
    """Kilobytes of resident memory at the most."""
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments), "--workers", "2"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return int(finished.stderr.split()[-1])


@pytest.mark.parametrize(
    ("command", "writes"),
    [
        (["diff"], False),
        (["mix", "--no-hash"], True),
        (["mix", "--no-hash", "--select", "drift"], True),
        (["purify", "--no-hash", "--score", "drift"], True),
        (["purify", "--no-hash", "--fisher", "FISHER"], True),
        (["purify", "--no-hash", "--fisher", "FISHER", "--embeddings", "pool"], True),
        (["epur", "--no-hash", "--counts", "COUNTS"], True),
    ],
    ids=["diff", "mix", "mix by drift", "purify by drift", "purify", "purify all", "epur"],
)
def test_memory_does_not_grow_with_the_model(
    command: list[str], writes: bool, tmp_path: Path
) -> None:
    counts = tmp_path / "counts.json"
    counts.write_text('{"token0": 100}')
    peaks = []
    for size in (TINY, SMALL, LARGE):  # the first compiles the kernels if nothing has yet
        models = [sparse_model(tmp_path / f"{i}-{size}", size) for i in range(2)]
        # A fisher of zeros alone is refused.
        given = {"COUNTS": counts, "FISHER": sparse_model(tmp_path / f"f-{size}", size, last=1)}
        out = tmp_path / f"out-{size}"
        words = [str(given.get(word, word)) for word in command]
        peaks.append(peak_of(*words, *models, *(["-o", out] if writes else [])))
        assert out.exists() == writes
        shutil.rmtree(out, ignore_errors=True)
    _, small, large = peaks
    assert 20_000 < large < small * GROWTH


def test_memory_of_verify_does_not_grow(tmp_path: Path) -> None:
    hashed, compared = [], []
    for size in (TINY, SMALL, LARGE):
        base, tuned = (sparse_model(tmp_path / f"{i}-{size}", size, last=i) for i in range(2))
        out = tmp_path / f"out-{size}"
        peak_of("mix", base, tuned, "-o", out)
        hashed.append(peak_of("verify", out))
        compared.append(peak_of("verify", out, "--base", base, "--tuned", tuned))
        shutil.rmtree(out)
    for _, small, large in (hashed, compared):
        assert 20_000 < large < small * GROWTH
