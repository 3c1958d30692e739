"""What is computed of a model in memory has the names of its file, element by element."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import computing, gradients, tiny_models
from weightsurgery import open_checkpoint, save
from weightsurgery.checkpoint import Step
from weightsurgery.curvature.fisher import fisher
from weightsurgery.datasets.batches import read_examples
from weightsurgery.models import Model, load_model
from weightsurgery.training.result import trained_checkpoint

_FAST = ("gpt-neox", "mixtral", "qwen2-moe", "gpt2", "llama-tied", "bert-classifier")
_NAMES = [
    pytest.param(name, marks=() if name in _FAST else pytest.mark.slow) for name in computing.ALL
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("computing")


def _examples(model: Model, root: Path) -> list[Any]:
    sentences = tiny_models.write_sentences(root / "sentences.tsv", tiny_models.SENTENCES[:3])
    questions = tiny_models.write_questions(root / "questions.jsonl", tiny_models.QUESTIONS[:3])
    data = sentences if model.task == "classification" else questions
    return read_examples(model, data, max_length=32)


def _filled(module: Any, values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(values[name])


@pytest.mark.parametrize("name", _NAMES)
def test_fisher_is_autograds_under_the_names_on_disk(name: str, root: Path) -> None:
    """Put into the model and saved by transformers, autograd's Fisher is the file's."""
    folder = computing.folder_of(root, name)
    model = load_model(folder, device="cpu")
    examples = _examples(model, root)
    found = fisher(model, examples)
    module = computing.reloaded(folder, name)
    truth = gradients.fisher(module, dict(module.named_parameters()), examples)
    _filled(module, truth)
    expected = computing.saved(module, root / f"{name}-fisher")
    assert set(found) <= set(expected)
    stored = {stored for one in model.names for stored in model.stored_in(one)}
    assert set(found) == stored
    assert found.size == sum(p.numel() for p in module.parameters())
    for tensor, view in found.items():
        mine = torch.from_numpy(view.read(0, view.size)).view(view.shape)
        right = expected[tensor]
        assert mine.shape == right.shape, tensor
        scale = max(float(right.norm()), 1e-10 * float(right.numel()) ** 0.5)
        assert float((mine - right).norm()) <= 1e-5 * scale, tensor


@pytest.mark.parametrize("name", _NAMES)
def test_trained_weights_are_written_under_the_names_on_disk(name: str, root: Path) -> None:
    """transformers loads from the file what the model in memory holds."""
    folder = computing.folder_of(root, name)
    model = load_model(folder, device="cpu")
    with torch.no_grad():
        for parameter in model.names.values():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    out = root / f"{name}-trained"
    save(trained_checkpoint(model, step=Step("finetune", {}, {})), out)
    assert set(open_checkpoint(out)) == set(open_checkpoint(folder))
    module = computing.reloaded(out, name)
    again = dict(module.named_parameters())
    for one, parameter in model.module.named_parameters():
        assert torch.equal(again[one], parameter), one


@pytest.mark.parametrize("name", _NAMES)
def test_the_reference_page_says_how_the_fisher_is_computed(name: str, root: Path) -> None:
    measured = json.loads(
        Path(computing.__file__).with_name("fisher_paths.json").read_text("utf-8")
    )
    assert computing.fisher_paths(root, name) == measured[name]
