"""Peak memory does not grow with the model: measured in fresh processes, on sparse files."""

from __future__ import annotations

import json
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


def sparse_model(path: Path, size: int) -> Path:
    """Zeros that take no disk: half of them in one tensor, the rest in eight."""
    header, begin = {}, 0
    for i, part in enumerate([size // 2] + [size // 16] * 8):
        header[f"layers.{i}.weight"] = {
            "dtype": "F32",
            "shape": [part // 4096, 1024],
            "data_offsets": [begin, begin + part],
        }
        begin += part
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
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
    ],
    ids=["diff", "mix", "mix by drift"],
)
def test_memory_does_not_grow_with_the_model(
    command: list[str], writes: bool, tmp_path: Path
) -> None:
    peaks = []
    for size in (TINY, SMALL, LARGE):  # the first compiles the kernels if nothing has yet
        models = [sparse_model(tmp_path / f"{i}-{size}.safetensors", size) for i in range(2)]
        out = tmp_path / f"out-{size}.safetensors"
        peaks.append(peak_of(*command, *models, *(["-o", out] if writes else [])))
        assert out.exists() == writes
        out.unlink(missing_ok=True)
    _, small, large = peaks
    assert 20_000 < large < small * GROWTH
