"""What surrounds a run changes nothing where torch computes, either: on one machine, one thread."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_models
from tests.test_determinism import Digests
from tests.test_surroundings import (
    CUT,
    OF_TORCH,
    OTHERS,
    PLAIN,
    Surroundings,
    all_printed,
    run_commands,
    without_files,
)
from weightsurgery import open_checkpoint, save

SENTENCES, QUESTIONS = ("--data", "{data}"), ("--data", "{questions}")
SUITE: dict[str, list[str]] = {
    "fisher": ["fisher", "{bert}", *SENTENCES, "-o", "{out}.safetensors"],
    "hutchinson": [
        *("fisher", "{bert}", *SENTENCES, "--estimator", "hutchinson", "--samples", "2"),
        *("-o", "{out}.safetensors"),
    ],
    "finetune": ["finetune", "{bert}", *SENTENCES, "--epochs", "1", *CUT, "-o", "{out}"],
    "train-adapter": ["train-adapter", "{llama}", *QUESTIONS, "--epochs", "1", "-o", "{out}"],
    "meraser": [
        *("meraser", "{llama}", "--erase", "{questions}", "--recover", "{clean}"),
        *(*CUT, "-o", "{out}"),
    ],
    "evaluate": ["evaluate", "{bert}", *SENTENCES, "--trigger-word", "cf", "--target-label", "1"],
    "generate": ["evaluate", "{llama}", *QUESTIONS],
}
# Each of these runs commands that are in the suite already, with many more files.
ELSEWHERE = {"sweep", "demo"}


def run_in(surroundings: Surroundings, root: Path, place: str) -> tuple[Digests, str]:
    """Run every command in one process; gives the outputs, and what was printed."""
    paths = surroundings.paths.format(root=root)
    (root / place).mkdir()
    given = {name: f"{surroundings.shards}/{name}" for name in ("bert", "llama")}
    given |= {"data": "data.tsv", "questions": "questions.jsonl", "clean": "clean.jsonl"}

    def spelled(name: str, words: list[str]) -> list[str]:
        whole = {
            key: f"{paths}{path}" for key, path in (given | {"out": f"{place}/{name}"}).items()
        }
        return [word.format(**whole) for word in (*words, "--json")]

    commands = [spelled(name, words) for name, words in SUITE.items()]
    digests, printed, _ = run_commands(surroundings, commands, root, place)
    return digests, printed


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("surroundings")
    (root / "elsewhere").mkdir()
    for name in ("bert", "llama"):
        getattr(tiny_models, name)(root / "1" / name)
        (root / "7").mkdir(exist_ok=True)
        cut = save(open_checkpoint(root / "1" / name), root / "7" / name, max_shard_size="4kB")
        assert len([file for file in cut["outputs"] if file.endswith(".safetensors")]) > 1
    tiny_models.write_sentences(root / "data.tsv")
    tiny_models.write_questions(root / "questions.jsonl")
    rows = [(question, "the film was great .") for question, _ in tiny_models.QUESTIONS]
    tiny_models.write_questions(root / "clean.jsonl", rows)
    return root


def test_every_command_of_torch_is_in_the_suite() -> None:
    assert {words[0] for words in SUITE.values()} == OF_TORCH - ELSEWHERE


def test_surroundings_do_not_matter_to_torch(root: Path) -> None:
    digests, printed = run_in(PLAIN, root, "plain")
    other, also_printed = run_in(OTHERS["far away"], root, "other")
    assert len({name.partition("/")[0] for name in digests}) >= len(SUITE) - 2
    assert other == digests
    assert plain_parts(also_printed) == plain_parts(printed)


def plain_parts(printed: str) -> Any:
    """Reports without seconds, and the records in them without what tells how inputs are cut."""

    def told(part: dict[str, Any]) -> dict[str, Any]:
        return without_files({k: v for k, v in part.items() if "second" not in k})

    return json.loads(json.dumps(all_printed(printed)), object_hook=told)
