"""Every command that writes, on the least that it takes; and those that write nothing."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

from tests import cases, tiny_models
from tests.test_contract import folders_for
from weightsurgery.cli import Commands, operator_summaries
from weightsurgery.datasets.read import Sentence
from weightsurgery.registry import OPERATORS

READS = {"evaluate", "inspect", "verify", "verify-adapter"}


@dataclass(frozen=True)
class Command:
    """A command that writes into `place/`.

    Attributes:
        line: What is typed, in a folder that `prepare` made.
        remembered: Functions, as module.name, that are run once for all runs of the command: what
            trains or reads, never what writes.
        piecewise: Whether it leaves the whole files that it made before it failed.
    """

    line: str
    remembered: tuple[str, ...] = ()
    piecewise: bool = False

    @property
    def words(self) -> list[str]:
        """The line, cut."""
        return self.line.split()


_CLI = "weightsurgery.cli"
_EXTRA = {
    "epur": "--counts counts.json ",
    "purify": "--score random --mask place/mask.safetensors ",
}
OWN = {
    "demo": Command("demo --quick -o place/demo", piecewise=True),
    "diff": Command("diff mix/base mix/tuned --drift place/drift.safetensors"),
    "extract-adapter": Command("extract-adapter mix/base mix/tuned --rank 2 -o place/out"),
    "finetune": Command(
        "finetune bert --data data.tsv --epochs 1 -o place/out",
        ("weightsurgery.models.load_model", f"{_CLI}.finetune_command.finetune"),
    ),
    "fisher": Command(
        "fisher bert --data data.tsv --standard-error place/error.safetensors "
        "-o place/fisher.safetensors",
        (f"{_CLI}.fisher_command._estimates", "weightsurgery.models.load_model"),
    ),
    "meraser": Command(
        "meraser llama --erase qa.jsonl --erase-setting epochs=1 -o place/out",
        ("weightsurgery.models.load_model", f"{_CLI}.meraser_command.meraser"),
    ),
    "mismatch": Command("mismatch qa.jsonl --size 3 -o place/out.jsonl"),
    "replay": Command(
        "replay mixed/wsurg-record.json --input base=mix/base --input tuned=mix/tuned -o place/out"
    ),
    "sweep": Command(
        "sweep bert bert --data data.tsv --held-out data.tsv --ratios 0.5 --operator mix "
        "--no-finetune --plot place/plot.svg",
        ("weightsurgery.models.load_model", "weightsurgery.evaluation.sweep.sweep"),
    ),
    "train-adapter": Command(
        "train-adapter llama --data qa.jsonl --epochs 1 -o place/out",
        ("weightsurgery.models.load_model", f"{_CLI}.train_adapter_command.train_adapter"),
    ),
}


def operator_command(name: str) -> Command:
    """The command of an operator, on models of two shards."""
    op = OPERATORS[name]
    inputs = [f"{name}/{n.removesuffix('s') if n == op.variadic else n}" for n in op.inputs]
    return Command(f"{name} {' '.join(inputs)} {_EXTRA.get(name, '')}-o place/out")


WRITERS = {**OWN, **{name: operator_command(name) for name in sorted(operator_summaries())}}


def all_commands() -> list[str]:
    """From the command line itself."""
    group = Commands()
    return group.list_commands(click.Context(group))


def prepare(root: Path, name: str) -> None:
    """Make what a command reads, and an empty `place/`."""
    (root / "place").mkdir(parents=True)
    words = WRITERS[name].words
    for op in {n: OPERATORS[n] for n in ("mix", name) if n in OPERATORS}.values():
        if any(f"{op.name}/" in word for word in words):
            folders_for(op, root / op.name, shards=2)
    if name == "replay":
        pair = (root / "mix/base", root / "mix/tuned")
        assert cases.wsurg("mix", *pair, "-o", root / "mixed") == 0
    if "bert" in words:
        tiny_models.bert(root / "bert")
    if "llama" in words:
        tiny_models.llama(root / "llama")
    tiny_models.write_sentences(root / "data.tsv")
    tiny_models.write_questions(root / "qa.jsonl")
    (root / "counts.json").write_text(json.dumps(dict.fromkeys(cases.WORDS, 5)))


def remember(patch: pytest.MonkeyPatch, name: str) -> None:
    """From now on a command trains once; the demo makes its data of nothing and runs nothing."""
    for path in WRITERS[name].remembered:
        module, _, function = path.rpartition(".")
        really = _found(module, function)
        patch.setattr(__import__(module, fromlist=[function]), function, _once(really))
    if name != "demo":
        return
    from weightsurgery.demo import run

    reviews = [Sentence((f"review {i}",), str(i % 2), i + 2) for i in range(1200)]
    share = {"share": 0.5, "low": 0.4, "high": 0.6}
    found = json.dumps({**dict.fromkeys(("accuracy", "asr", "floor"), share), "loss": 0.5})
    patch.setattr(run, "time", SimpleNamespace(monotonic=lambda: 0.0))  # the report has seconds
    patch.setattr(run, "movie_reviews", lambda *_, **__: reviews)
    patch.setattr(run, "copy_minilm", lambda folder: folder)
    patch.setattr(run, "new_classifier", lambda *_: None)
    patch.setattr(run, "_wsurg", lambda *_, **__: SimpleNamespace(stdout=found))


def _found(module: str, name: str) -> Any:
    return getattr(__import__(module, fromlist=[name]), name)


def _once(really: Any) -> Any:
    made: list[Any] = []

    @functools.wraps(really)
    def call(*arguments: Any, **settings: Any) -> Any:
        if not made:
            made.append(really(*arguments, **settings))
        return made[0]

    return call
