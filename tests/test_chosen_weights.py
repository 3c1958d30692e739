"""`--weights` where a model directory has two answers: in commands that load a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import cases, tiny_models
from tests.peft_models import WARNINGS
from weightsurgery.cli import main
from weightsurgery.formats import open_checkpoint
from weightsurgery.models import load_model

pytestmark = [*WARNINGS, pytest.mark.usefixtures("one_thread")]
CHOSEN = ["--weights", "other.safetensors"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each kind of model: base/, two/ with two answers, and third/, the second of them."""
    folder = tmp_path_factory.mktemp("chosen")
    for kind in ("bert", "llama"):
        make = getattr(tiny_models, kind)
        for seed, name in enumerate(("base", "two", "third")):
            make(folder / kind / name, seed=seed)
        third = folder / kind / "third/model.safetensors"
        shutil.copy(third, folder / kind / "two/other.safetensors")
        tiny_models.write_sentences(folder / kind / "data.tsv")
        row = json.dumps({"question": "the film", "answer": "a good film"}) + "\n"
        (folder / kind / "questions.jsonl").write_text(row * 4)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with all of it."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--json"])
    told = capsys.readouterr()
    assert stopped.value.code == 0, told.err
    return json.loads(told.out)


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        ("bert", ["fisher", "MODEL", "--data", "data.tsv", "-o", "OUT.safetensors"]),
        ("bert", ["finetune", "MODEL", "--data", "data.tsv", "--epochs", "1", "-o", "OUT"]),
        ("llama", ["train-adapter", "MODEL", "--data", "questions.jsonl", "-o", "OUT"]),
        ("llama", ["meraser", "MODEL", "--erase", "questions.jsonl", "-o", "OUT"]),
    ],
    ids=lambda given: given if isinstance(given, str) else given[0],
)
def test_what_is_written_comes_of_the_chosen_weights(
    kind: str, command: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(folder / kind)
    for model, more in (("two", CHOSEN), ("third", [])):
        filled = [one.replace("MODEL", model).replace("OUT", f"of-{model}") for one in command]
        run(capsys, *filled, *more)
    one, other = sorted(path for path in Path().glob("of-*") if "record" not in path.name)
    if one.is_dir():
        assert cases.stored_in(one) == cases.stored_in(other)
    else:
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        ("bert", ["evaluate", "MODEL", "--data", "data.tsv"]),
        ("llama", ["evaluate", "MODEL", "--data", "questions.jsonl"]),
        ("llama", ["evaluate", "base", "--data", "questions.jsonl", "--against", "MODEL"]),
        (
            "bert",
            ["sweep", "base", "MODEL", "--held-out", "data.tsv", "--data", "data.tsv",
             "--ratios", "0.5", "--no-finetune"],
        ),
    ],
    ids=["classifier", "causal", "against", "sweep"],
)  # fmt: skip
def test_what_is_measured_is_of_the_chosen_weights(
    kind: str, command: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(folder / kind)
    found = []
    for model, more in (("two", CHOSEN), ("third", [])):
        told = run(capsys, *[one.replace("MODEL", model) for one in command], *more)
        found.append(json.dumps(told).replace('"two"', '"third"'))
    assert found[0] == found[1]


def test_a_proof_reads_the_chosen_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder / "llama")
    run(capsys, "train-adapter", "third", "--data", "questions.jsonl", "-o", "adapter")
    run(capsys, "apply-adapter", "two", "adapter", *CHOSEN, "--force-base", "-o", "merged")
    assert run(capsys, "verify-adapter", "two", "adapter", "merged", *CHOSEN)["proved"]


def test_transformers_does_not_read_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("transformers reads a file of weights")

    monkeypatch.setattr("transformers.modeling_utils.safe_open", refuse)
    for kind in ("bert", "llama"):
        assert load_model(folder / kind / "third", device="cpu").names
        chosen = open_checkpoint(folder / kind / "two", weights="other.safetensors")
        model = load_model(chosen, device="cpu")
        assert model.checkpoint is chosen


def test_how_to_generate_is_read(folder: Path) -> None:
    path = folder / "llama/third"
    (path / "generation_config.json").write_text('{"max_length": 17, "eos_token_id": 3}')
    found = load_model(path, device="cpu").module.generation_config
    assert (found.max_length, found.eos_token_id) == (17, 3)
