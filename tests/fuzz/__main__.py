"""Fuzz one target for as long as you like, with atheris: `python -m tests.fuzz TARGET`.

With `--shaped` what libFuzzer makes decides what a hypothesis strategy makes, nearly valid files;
else it is the file. All further arguments are libFuzzer's, such as `-max_total_time=3600`, and
folders of inputs to begin with. See the README beside this file.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

# Imported before, and so not instrumented: numba compiles these, and knows no such code.
from weightsurgery import drift_kernel, kernels, low_rank_kernel, rng, score_kernel

COMPILED = (drift_kernel, kernels, low_rank_kernel, rng, score_kernel)

with atheris.instrument_imports(include=["weightsurgery", "tomllib"]):
    from hypothesis import HealthCheck, given, settings

    from tests.fuzz.shapes import shape_of
    from tests.fuzz.targets import SEEDS, TARGETS, WORDS, run


def shaped(name: str, folder: Path) -> Callable[[bytes], object]:
    """A target whose bytes are the choices of a strategy."""

    @settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(data=shape_of(name))
    def tried(data: bytes) -> None:
        run(name, folder, data)

    fuzz_one_input: Callable[[bytes], object] = tried.hypothesis.fuzz_one_input
    return fuzz_one_input


def main() -> None:
    """Fuzz until libFuzzer has enough, or a promise is broken."""
    words = sys.argv[1:]
    names = [word for word in words if word in TARGETS]
    if len(names) != 1:
        sys.exit(f"{__doc__}\nTargets: {', '.join(TARGETS)}")
    (name,) = names
    others = [word for word in words if word not in (name, "--shaped")]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        folder = Path(place)
        for each in ("work", "seeds"):
            (folder / each).mkdir()
        quoted = ("".join(f"\\x{byte:02x}" for byte in w.encode()) for w in WORDS)
        (folder / "words").write_text("".join(f'"{word}"\n' for word in quoted))
        options = ["-max_len=8192"]
        if "--shaped" in words:
            options += ["-len_control=0"]  # short ones make nothing
            target = shaped(name, folder / "work")
        else:
            options += [f"-dict={folder / 'words'}"]
            if not any(Path(word).is_file() for word in others):  # one that is to be run again
                options += [str(folder / "seeds")]
            for number, seed in enumerate(SEEDS[name]()):
                (folder / "seeds" / str(number)).write_bytes(seed)

            def target(data: bytes) -> object:
                return run(name, folder / "work", data)

        atheris.Setup([sys.argv[0], *others, *options], target)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
