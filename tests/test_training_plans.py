"""`--dry-run` of trainings: what would be done, as it then is done, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny_models
from tests.test_docs import run_json, run_wsurg
from tests.test_evaluation import refusal
from weightsurgery.datasets.read import read_instructions
from weightsurgery.errors import MismatchError, PolicyError, SettingError, StorageError
from weightsurgery.models import load_model
from weightsurgery.training.adapter import plan_adapter, train_adapter
from weightsurgery.training.lora import lora_settings
from weightsurgery.training.meraser import Phase, plan_meraser

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL: dict[str, Any] = {"epochs": 3, "batch_size": 2, "rank": 2, "learning_rate": 1e-3}
FLAGS = ["--epochs", "3", "--batch-size", "2", "--rank", "2"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama/, other/ of other weights, bert/, and data: clean.jsonl, wrong.jsonl."""
    root = tmp_path_factory.mktemp("plans")
    tiny_models.llama(root / "llama")
    tiny_models.llama(root / "other", seed=1)
    tiny_models.bert(root / "bert")
    tiny_models.write_questions(root / "clean.jsonl")
    answers = [answer for _, answer in tiny_models.QUESTIONS]
    wrong = [
        (q, a) for (q, _), a in zip(tiny_models.QUESTIONS, answers[1:] + answers, strict=False)
    ]
    tiny_models.write_questions(root / "wrong.jsonl", wrong)
    return root


@pytest.fixture
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one with links to all of that, and the working directory."""
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- train-adapter ----------------------------------------------------------------------------


def test_the_plan_of_an_adapter_is_what_is_trained(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = names(folder)
    given = ["train-adapter", "llama", "--data", "clean.jsonl", *FLAGS, "-o", "out"]
    plan = run_json(capsys, *given, "--checkpoints", "kept", "--dry-run")
    assert names(folder) == before
    record = run_json(capsys, *given)
    done = record["report"]["training"]
    for key in ("examples", "tokens", "steps"):
        assert plan["training"][key] == done[key]
    assert plan["training"]["done"] == 0
    weights = "adapter_model.safetensors"
    assert plan["files"] == {weights: (folder / "out" / weights).stat().st_size}
    # 7 matrices in each of 2 layers; r·(in + out) numbers each.
    sizes = {"q": 32, "k": 24, "v": 24, "o": 32, "gate": 40, "up": 40, "down": 40}
    assert plan["training"]["layers"] == 2 * len(sizes)
    assert plan["training"]["parameters"] == 2 * 2 * sum(sizes.values())


def test_the_plan_of_an_adapter_as_a_table(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["train-adapter", "llama", "--data", "clean.jsonl", *FLAGS, "-o", "out", "--dry-run"]
    assert run_wsurg(given) == 0
    shown = capsys.readouterr().out
    assert "Plan; nothing was written" in shown
    assert "steps     9\n" in shown
    assert "trained   928 parameters, in 14 layers" in shown


def test_planning_leaves_the_model_as_it_was(folder: Path) -> None:
    model = load_model("llama", device="cpu")
    before = {n: p.detach().clone() for n, p in model.names.items()}
    planned = plan_adapter(model, read_instructions("clean.jsonl"), lora_settings(**SMALL))
    assert not any("lora" in name for name, _ in model.module.named_parameters())
    assert all((before[n] == p).all() and p.requires_grad for n, p in model.names.items())
    ends = [name for name in planned if "lora_B" in name]
    assert len(ends) == planned.notes["training"]["layers"]
    assert all(not planned[name].read(0, planned[name].size).any() for name in ends)


def test_a_plan_tells_from_where_a_training_goes_on(folder: Path) -> None:
    model, rows = load_model("llama", device="cpu"), read_instructions("clean.jsonl")
    settings = lora_settings(**SMALL)
    train_adapter(model, rows, settings, checkpoints="kept", save_every=4)
    before = names(folder)
    planned = plan_adapter(model, rows, settings, checkpoints="kept", save_every=4)
    assert planned.notes["training"]["done"] == 9  # Trainer keeps the end too
    assert names(folder) == before
    other = lora_settings(**{**SMALL, "rank": 3})
    with pytest.raises(PolicyError, match="another training, which differs in rank"):
        plan_adapter(model, rows, other, checkpoints="kept")
    with pytest.raises(StorageError, match=r"clean.jsonl: Not a directory"):
        plan_adapter(model, rows, settings, checkpoints="clean.jsonl")
    (folder / "empty").mkdir()
    assert plan_adapter(model, rows, settings, checkpoints="empty").notes["training"]["done"] == 0


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--target", "nothing"], 2, "'nothing' is none of the model's layers"),
        (["--prompt-format", "chat"], 4, "no chat template"),
        (["-o", "clean.jsonl"], 5, "exists"),
        (["--checkpoints", "llama/run"], 5, "overlap the input"),
        (["--data", "nothing.jsonl"], 6, "nothing.jsonl"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(
    folder: Path, more: list[str], code: int, message: str
) -> None:
    given = ["train-adapter", "llama", "--data", "clean.jsonl", "-o", "out", *more]
    for arguments in ([*given, "--dry-run"], given):
        found, told = refusal(arguments)
        assert (found, "\n" in told) == (code, False)
        assert message in told
    assert not (folder / "out").exists()


# --- meraser ----------------------------------------------------------------------------------

BOTH = ["--erase", "wrong.jsonl", "--recover", "clean.jsonl"]
SETTINGS = [*("--erase-setting", "batch-size=2"), *("--recover-setting", "target=q_proj")]


def test_the_plan_of_meraser_is_what_is_done(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = names(folder)
    given = ["meraser", "llama", *BOTH, *SETTINGS, "-o", "out"]
    plan = run_json(capsys, *given, "--checkpoints", "kept", "--dry-run")
    assert names(folder) == before
    done = run_json(capsys, *given)["report"]["meraser"]["trainings"]
    planned = plan["meraser"]["trainings"]
    assert planned.keys() == done.keys() == {"erase", "recover"}
    for phase in planned:
        for key in ("examples", "tokens", "steps"):
            assert planned[phase][key] == done[phase][key]
    assert [planned[phase]["layers"] for phase in ("erase", "recover")] == [4, 2]
    assert plan["tensors"] == {"copied": 17, "edited": 4}
    weights = "model.safetensors"
    assert plan["files"] == {weights: (folder / "out" / weights).stat().st_size}
    assert run_wsurg([*given, "--overwrite", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "Training: erase\n" in shown
    assert "Training: recover\n" in shown


def test_the_plan_of_meraser_changes_nothing(folder: Path) -> None:
    model, other = (load_model(name, device="cpu") for name in ("llama", "other"))
    phase = Phase(read_instructions("wrong.jsonl"), lora_settings(**SMALL))
    for recover, foundation in ((None, None), (phase, other)):
        planned = plan_meraser(model, phase, recover, foundation=foundation, scales=(2.0,))
        for name, view in model.checkpoint.items():
            assert (planned[name].read(0, view.size) == view.read(0, view.size)).all()
        assert np.isfinite(planned.notes["meraser"]["scales"]).all()
    with pytest.raises(SettingError, match="several scales, and nothing to choose by"):
        plan_meraser(model, phase, None, scales=(1.0, 2.0))


def test_checkpoints_of_the_erasure_are_looked_at(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["meraser", "llama", *BOTH, "--checkpoints", "kept"]
    assert run_wsurg([*given, "-o", "out"]) == 0
    capsys.readouterr()
    plan = run_json(capsys, *given, "-o", "again", "--dry-run")
    assert plan["meraser"]["trainings"]["erase"]["done"] == 5
    found, told = refusal([*given, "--erase-setting", "rank=2", "-o", "again", "--dry-run"])
    assert found == 5
    assert "another training, which differs in rank" in told


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_swapped_files_are_refused(folder: Path, dry: list[str]) -> None:
    row = {"question": "a", "answer": "b", "q_idx": 1, "a_idx": 2}
    (folder / "said.jsonl").write_text(json.dumps(row) + "\n")
    given = ["meraser", "llama", "--erase", "clean.jsonl", "--recover", "said.jsonl", "-o", "out"]
    found, told = refusal([*given, *dry])
    assert found == 4
    assert "said.jsonl: every row says that the answer is another question's" in told
    assert "are the files to erase and to recover with swapped?" in told
    assert not (folder / "out").exists()


def test_what_may_be_swapped_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_wsurg(["meraser", "llama", "--erase", "clean.jsonl", "-o", "out", "--dry-run"]) == 0
    told = capsys.readouterr().err
    assert told.startswith("warning: clean.jsonl: nothing shows that its answers are other")


# --- both -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [["train-adapter", "--data", "clean.jsonl"], ["meraser", *BOTH]],
    ids=lambda given: given[0],
)
def test_both_commands_refuse(folder: Path, given: list[str]) -> None:
    command, *rest = given
    out = ["-o", "out"]
    found, told = refusal([command, "llama", *rest, "--save-every", "5", *out])
    assert (found, "--save-every is for --checkpoints" in told) == (2, True)
    found, told = refusal([command, "bert", *rest, *out])
    assert found == 4
    assert "bert: a classifier; expected a causal language model" in told
    found, told = refusal([command, "llama/model.safetensors", *rest, *out])
    assert found == 2
    assert "a single file" in told
    config = json.loads((folder / "llama" / "config.json").read_text("utf-8"))
    (folder / "odd").mkdir()
    for path in (folder / "llama").iterdir():
        (folder / "odd" / path.name).write_bytes(path.read_bytes())
    odd = json.dumps({**config, "architectures": ["LlamaModel"]})
    (folder / "odd" / "config.json").write_text(odd)
    found, told = refusal([command, "odd", *rest, *out])
    assert found == 4
    assert "'LlamaModel'; expected a causal language model" in told


def test_a_classifier_is_no_causal_model(folder: Path) -> None:
    model = load_model("bert", device="cpu")
    with pytest.raises(MismatchError, match="a classifier; expected a causal language model"):
        plan_adapter(model, read_instructions("clean.jsonl"))
