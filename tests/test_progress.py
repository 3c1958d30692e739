"""Progress where stderr is no terminal: lines come while the work goes on, and not too many."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests import tiny_models
from weightsurgery.cli import progress as drawn
from weightsurgery.stream import Progress


@pytest.fixture
def seconds() -> list[float]:
    """A clock's only hand."""
    return [0.0]


@pytest.fixture
def tell(seconds: list[float]) -> Progress:
    """A callback that prints a line every ten seconds."""
    return drawn.printing(lambda what: what.partition(",")[0], 10.0, clock=lambda: seconds[0])


def read_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What stderr got."""
    found = capsys.readouterr()
    assert found.out == ""
    return found.err.splitlines()


def test_the_first_the_last_and_one_in_a_while(
    tell: Progress, seconds: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    for step in range(1, 1001):
        seconds[0] += 0.5
        tell(f"training, loss {1 / step:.1f}", step, 1000)
    lines = read_lines(capsys)
    assert [lines[0], lines[-1]] == ["training, loss 1.0: 1 of 1,000", "training, loss 0.0: 1,000 of 1,000"]  # fmt: skip  # noqa: E501
    steps = [int(line.split(": ")[1].split()[0].replace(",", "")) for line in lines]
    assert steps[:4] == [1, 21, 41, 61]
    assert len(lines) == 51


def test_each_piece_of_work_begins_anew(tell: Progress, capsys: pytest.CaptureFixture[str]) -> None:
    for what in ("erase: training", "perplexity", "perplexity", "recover: training"):
        for step in range(1, 4):
            tell(f"{what}, loss 1", step, 3)
    ends = [f"{what}, loss 1: {step} of 3"
            for what in ("erase: training", "perplexity", "perplexity", "recover: training")
            for step in (1, 3)]  # fmt: skip
    assert read_lines(capsys) == ends


def test_work_that_was_stopped_and_begins_again_is_told(
    tell: Progress, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2, 1, 2):
        tell("training", step, 3)
    assert read_lines(capsys) == ["training: 1 of 3"] * 2


def test_every_step_of_a_sweep_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with drawn.drawing(key=lambda what: what.partition(",")[0], lines="steps") as tell:
        assert tell is not None
        for what, done in (("a, b", 0), ("a, c", 0), ("a", 1), ("a, d", 1), ("a", 2)):
            tell(what, done, 3)
    assert read_lines(capsys) == ["a: 1 of 3", "a: 2 of 3"]


def test_where_nothing_is_to_be_printed_there_is_no_callback() -> None:
    with drawn.drawing(key=str) as tell:
        assert tell is None


def test_a_training_in_a_pipe_tells_how_it_goes(tmp_path: Path) -> None:
    """The first line is there while nearly all of a long training is still to be done."""
    model = tiny_models.llama(tmp_path / "model")
    data = tiny_models.write_questions(tmp_path / "data.jsonl")
    out = tmp_path / "adapter"
    command = [sys.executable, "-m", "weightsurgery", "--no-config", "train-adapter", str(model),
               "--data", str(data), "--epochs", "1000000", "-o", str(out)]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stderr is not None
        try:
            first = process.stderr.readline().decode()
            assert process.poll() is None
        finally:
            process.terminate()
            rest = process.communicate(timeout=60)[1].decode()
    assert first.startswith("training, loss ")
    assert first.endswith(" tokens/s: 1 of 1,000,000\n")
    assert "terminated; nothing is left half-written" in rest
    assert not out.exists()


# --- a terminal -------------------------------------------------------------------------------

DRAWS = """
import sys, time
from weightsurgery.cli.progress import drawing

with drawing(*sys.argv[1].split(), key=lambda what: what.partition(",")[0]) as tell:
    for share in (0.02, 0.95):
        for what in ("checking what is there", "recover: training, loss 0.1234, 12,345 tokens/s"):
            tell(what, int(share * int(sys.argv[2])), int(sys.argv[2]))
        time.sleep(0.4)  # longer than from one drawing to the next
"""
BYTES, COUNTS = "DownloadColumn TransferSpeedColumn 640000000", "MofNCompleteColumn 12345"


def drawn_lines(columns: int, amounts: str) -> list[str]:
    """What a terminal of that width is sent, line by line, without control codes."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {n: v for n, v in os.environ.items() if n not in ("COLUMNS", "LINES")}
    *names, total = amounts.split()
    command = [sys.executable, "-c", DRAWS, " ".join(names), total]
    with subprocess.Popen(command, stderr=theirs, env={**environment, "TERM": "xterm"}) as run:
        os.close(theirs)
        sent = b""
        while block := _read(ours):
            sent += block
    os.close(ours)
    assert run.returncode == 0, sent
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent.decode())
    return [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.strip()]


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # Linux tells the other side's end so
        return b""


@pytest.mark.parametrize("columns", [24, 30, 40, 50, 80, 120])
@pytest.mark.parametrize("amounts", [BYTES, COUNTS])
def test_a_bar_gets_shorter_and_nothing_else_is_cut(columns: int, amounts: str) -> None:
    lines = drawn_lines(columns, amounts)
    assert max(map(len, lines)) <= columns
    bars = [line for line in lines if "━" in line or "╸" in line]
    assert len(bars) >= 4
    number = r"[\d.]+/640\.0 MB" if amounts == BYTES else r"\d+/12345"
    speed = r" +(\?|[\d.]+ [kMG]B/s)" if amounts == BYTES else ""
    left = r" +(\d|-):[\d-]{2}:[\d-]{2}"
    whole = rf" {number}{speed}{left}$" if columns >= 40 else rf" {number}({left})?$"
    assert [line for line in bars if not re.search(whole, line)] == []
    assert "…" not in "".join(lines)
    told = " ".join(" ".join(lines).split())
    assert "checking what is there" in told
    assert "recover: training, loss 0.1234, 12,345 tokens/s" in told
    assert any(line.startswith("recover") for line in bars) == (columns > 90)
