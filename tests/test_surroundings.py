"""What surrounds a run changes nothing: workers, shards, paths, folders, languages, time zones."""

from __future__ import annotations

import hashlib
import json
import locale
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import cases
from tests.test_determinism import (
    BASE,
    RECORD,
    TOKENS,
    TUNED,
    Digests,
    many_kinds,
    write_models,
)
from weightsurgery.cli import cli

CUT = (
    "--max-shard-size",
    "1kB",
)  # the output's files are then the same however the input's are cut
SUITE: dict[str, list[str]] = {
    "mix": ["mix", "{base}", "{tuned}", "--ratio", "0.3", "--seed", "7", *CUT, "-o", "{out}"],
    "mix, mask": [
        *("mix", "{base}", "{tuned}", "--select", "drift", "--mask", "{out}.safetensors"),
        *(*CUT, "-o", "{out}"),
    ],
    "mix, files": ["mix", "{base}.safetensors", "{tuned}.safetensors", "-o", "{out}.safetensors"],
    "interpolate": ["interpolate", "{base}", "{tuned}", "--weight", "0.4", *CUT, "-o", "{out}"],
    "purify": ["purify", "{base}", "{tuned}", "--fisher", "{fisher}", *CUT, "-o", "{out}"],
    "purify, E-PUR": [
        *("purify", "{base}", "{tuned}", "--score", "drift", "--scope", "tensor"),
        *("--embeddings", "epur", "--counts", "{counts}", "--top", "3", *CUT, "-o", "{out}"),
    ],
    "purify, mask": [
        *("purify", "{base}", "{tuned}", "--from-mask", "{made}/mix, mask.safetensors", "--invert"),
        *(*CUT, "-o", "{out}"),
    ],
    "epur": [
        *("epur", "{base}", "{tuned}", "--counts", "{table}", "--top", "2", "--clamp", "1.5"),
        *(*CUT, "-o", "{out}"),
    ],
    "convert": ["convert", "{tuned}", "--dtype", "bf16", *CUT, "-o", "{out}"],
    "apply-adapter": [
        *("apply-adapter", "{base}", "{adapter}", "--weight", "0.5", *CUT),
        *("-o", "{out}"),
    ],
    "extract-adapter": ["extract-adapter", "{base}", "{tuned}", "--rank", "2", "-o", "{out}"],
    "extract-adapter, randomised": [
        *("extract-adapter", "{base}", "{tuned}", "--rank", "2", "--svd", "randomised"),
        *("-o", "{out}"),
    ],
    "diff": ["diff", "{base}", "{tuned}", "--drift", "{out}.safetensors"],
    "diff, files": ["diff", "{base}.safetensors", "{tuned}.safetensors", "--top", "3"],
    "mismatch": ["mismatch", "{qa}", "--size", "5", "--seed", "3", "-o", "{out}.jsonl"],
    "inspect": ["inspect", "{tuned}.safetensors"],
    "verify": [
        *("verify", "{made}/mix, mask", "--base", "{base}", "--tuned", "{tuned}"),
        *("--mask", "{made}/mix, mask.safetensors"),
    ],
    "verify-adapter": [
        *("verify-adapter", "{base}", "{adapter}", "{made}/apply-adapter"),
        *("--weight", "0.5"),
    ],
    "replay": [
        *("replay", "{made}/purify", "--input", "base={base}", "--input", "tuned={tuned}"),
        *("--input", "fisher={fisher}", "-o", "{out}"),
    ],
}
WITHOUT_WORKERS = {"inspect", "mismatch"}
# Sums of torch: the same bytes on one machine, with one number of its threads; a suite for itself.
OF_TORCH = {"fisher", "finetune", "train-adapter", "meraser", "evaluate", "sweep", "demo"}

# Runs several commands in one process, and tells on stderr what that process was like.
SCRIPT = """
import json, locale, os, sys, time
from weightsurgery import checkpoint

checkpoint.BLOCK = 32  # before anybody copies it: tensors get many blocks
from weightsurgery.cli import main

locale.setlocale(locale.LC_ALL, "")  # as a program might that calls us
for command in json.loads(sys.argv[1]):
    try:
        main(command)
    except SystemExit as stopped:
        if stopped.code:
            raise
like = [hash("a"), time.tzname, os.getcwd(), os.umask(0), locale.setlocale(locale.LC_ALL)]
print(json.dumps(like), file=sys.stderr)
"""


def first_locale(*names: str) -> str:
    """The first of these that this system has; "POSIX" if none."""
    before = locale.setlocale(locale.LC_ALL)
    for name in names:
        with suppress(locale.Error):
            locale.setlocale(locale.LC_ALL, name)
            locale.setlocale(locale.LC_ALL, before)
            return name
    return "POSIX"


@dataclass(frozen=True)
class Surroundings:
    """What surrounds a run; `paths` is how the folder of the models is spelled in it."""

    workers: int
    shards: int
    directory: str
    paths: str
    umask: int = 0o022
    variables: dict[str, str] = field(default_factory=dict)


PLAIN = Surroundings(
    workers=1,
    shards=1,
    directory=".",
    paths="",
    variables={"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "TZ": "UTC"},
)
OTHERS = {
    "a neighbour's": Surroundings(
        workers=2,
        shards=2,
        directory="elsewhere",
        paths="../",
        umask=0o077,
        variables={"PYTHONHASHSEED": "1", "LC_ALL": "C", "TZ": "XYZ-14", "COLUMNS": "20"},
    ),
    "far away": Surroundings(
        workers=3,
        shards=7,
        directory="/",
        paths="{root}/",
        umask=0o002,
        variables={
            "PYTHONHASHSEED": "random",
            "LC_ALL": first_locale("tr_TR.UTF-8", "de_DE.UTF-8", "fr_FR.UTF-8"),
            "TZ": "ABC+11:30",
            "FORCE_COLOR": "1",
            "HOME": "/nowhere",
        },
    ),
    "one floor up": Surroundings(
        workers=5,
        shards=1,
        directory="elsewhere/..//elsewhere",
        paths="./.././",
        umask=0o027,
        variables={"PYTHONHASHSEED": "random", "LC_ALL": "POSIX", "TZ": "XYZ-3", "NO_COLOR": "1"},
    ),
}


def spelled(words: list[str], paths: str, shards: int, place: str, name: str) -> list[str]:
    """A command of the suite, its inputs and outputs filled in."""
    given = {"base": f"{shards}/{BASE}", "tuned": f"{shards}/{TUNED}", "adapter": "adapter"}
    given |= {"fisher": "fisher.safetensors", "counts": "counts.json", "table": "counts.tsv"}
    given |= {"qa": "qa.jsonl", "made": place, "out": f"{place}/{name}"}
    whole = {key: f"{paths}{path}" for key, path in given.items()}
    return [word.format(**whole) for word in words]


def run_in(surroundings: Surroundings, root: Path, place: str) -> tuple[Digests, str, list[Any]]:
    """Run every command; gives the outputs, what was printed, and what the process was like."""
    paths = surroundings.paths.format(root=root)
    (root / place).mkdir()
    commands = []
    for name, words in SUITE.items():
        command = spelled(words, paths, surroundings.shards, place, name)
        workers = ["--workers", str(surroundings.workers)]
        commands.append([*command, "--json", *(workers if words[0] not in WITHOUT_WORKERS else [])])
    return run_commands(surroundings, commands, root, place)


def run_commands(
    surroundings: Surroundings, commands: list[list[str]], root: Path, place: str
) -> tuple[Digests, str, list[Any]]:
    """Run them in one process, in its surroundings."""
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands, ensure_ascii=False)],
        cwd=root / surroundings.directory,
        env={**os.environ, **surroundings.variables},
        umask=surroundings.umask,
        capture_output=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr.decode()
    # Reports name inputs and outputs as the user did.
    paths = surroundings.paths.format(root=root)
    printed = finished.stdout.decode().replace(f"{paths}{place}/", "")
    printed = printed.replace(f"{paths}{surroundings.shards}/", "").replace(paths, "")
    return compared(root / place), printed, json.loads(finished.stderr.splitlines()[-1])


def compared(folder: Path) -> Digests:
    """SHA-256 of every file; of records, without what tells how the inputs are cut into files."""
    found = cases.digests(folder)
    for name in found:
        if name.endswith(RECORD):
            record = without_files(json.loads((folder / name).read_bytes()))
            found[name] = hashlib.sha256(json.dumps(record).encode()).hexdigest()
    return found


def without_files(report: dict[str, Any]) -> dict[str, Any]:
    """A record without what tells how its inputs are cut: docs/reference/record.md names the two.

    What else a command prints has neither.
    """
    report.pop("record_sha256", None)
    inputs = report.get("inputs", ())
    for given in inputs if isinstance(inputs, list) else ():  # in a recipe they are roles
        given.pop("files", None)
    return report


def all_printed(text: str) -> list[dict[str, Any]]:
    """What several commands printed."""
    decoder, found = json.JSONDecoder(), []
    while text.strip():
        report, end = decoder.raw_decode(text.lstrip())
        text = text.lstrip()[end:]
        found.append(without_files(report))
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    root = tmp_path_factory.mktemp("surroundings")
    (root / "elsewhere").mkdir()
    base, tuned = many_kinds()
    for shards in cases.SHARDS:
        write_models(root / str(shards), shards=shards)
        for name, arrays in ((BASE, base), (TUNED, tuned)):
            cases.write_file(root / f"{shards}/{name}.safetensors", arrays)
    bert = {name: base[name] for name in cases.model("bert")}
    cases.write_adapter(root / "adapter", cases.adapter(bert), cases.adapter_config())
    rng = np.random.default_rng(5)
    fisher = {
        n: rng.random(a.shape).astype("f4") for n, a in base.items() if a.dtype.kind not in "ib"
    }
    cases.write_file(root / "fisher.safetensors", fisher)
    (root / "counts.json").write_text(json.dumps(dict.fromkeys(TOKENS[1:], 7)), "utf-8")
    (root / "counts.tsv").write_text("straße\t9\n日本\t1\n🙂\t30\nx\t400\n", "utf-8")
    asked = [(word, i) for i in range(6) for word in ("why", "how")]
    rows = [{"question": f"{w} is é{i}?", "answer": f"{w} ß{i}"} for w, i in asked]
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (root / "qa.jsonl").write_text("".join(lines), "utf-8")
    return root, run_in(PLAIN, root, "plain")


def test_every_command_is_in_the_suite() -> None:
    with cli.make_context("wsurg", ["inspect", "x"], resilient_parsing=True) as context:
        known = set(cli.list_commands(context))
    assert {words[0] for words in SUITE.values()} == known - OF_TORCH
    assert known >= OF_TORCH


@pytest.mark.parametrize("surroundings", OTHERS.values(), ids=OTHERS.keys())
def test_surroundings_do_not_matter(surroundings: Surroundings, plain: tuple[Path, Any]) -> None:
    root, (digests, printed, like) = plain
    place = f"run {surroundings.workers}"
    found, also_printed, now_like = run_in(surroundings, root, place)
    assert found == digests
    assert all_printed(also_printed) == all_printed(printed)
    if surroundings.shards == PLAIN.shards:  # then nothing at all is other
        assert also_printed == printed
        assert cases.digests(root / place) == cases.digests(root / "plain")
    assert all(new != old for new, old in zip(now_like, like, strict=True))


def test_each_command_of_the_suite_does_something(plain: tuple[Path, Any]) -> None:
    root, (digests, printed, _) = plain
    for name, words in SUITE.items():
        if "-o" in words:
            assert any(path.startswith((f"{name}/", f"{name}.")) for path in digests), name
    assert len(all_printed(printed)) == len(SUITE)
    for name in ("mix", "purify", "purify, E-PUR", "epur", "interpolate", "apply-adapter"):
        record = json.loads((root / "plain" / name / RECORD).read_bytes())
        assert record["changed_dimensions"] > 0
        assert len(list((root / "plain" / name).glob("*.safetensors"))) > 3
    assert cases.digests(root / "plain" / "replay") == cases.digests(root / "plain" / "purify")


def test_nothing_of_the_surroundings_is_written(plain: tuple[Path, Any]) -> None:
    root, (digests, printed, _) = plain
    written = b"".join((root / "plain" / name).read_bytes() for name in digests)
    assert os.fsencode(root.name) not in written
    assert os.uname().nodename.encode() not in written
    assert root.name not in printed


OF_ELEMENTS = [
    "mix",
    "mix, mask",
    "interpolate",
    "purify, E-PUR",
    "purify, mask",
    "epur",
    "convert",
]


@pytest.mark.parametrize("block", [8, 100, 1 << 20])
def test_the_size_of_blocks_does_not_matter_to_what_takes_no_sums(
    block: int, plain: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = plain
    cases.shrink_blocks(monkeypatch, block)
    place = f"blocks of {block}"
    (root / place).mkdir()
    for name in OF_ELEMENTS:
        assert cases.wsurg(*spelled(SUITE[name], f"{root}/", PLAIN.shards, place, name)) == 0
        assert cases.digests(root / place / name) == cases.digests(root / "plain" / name), name
