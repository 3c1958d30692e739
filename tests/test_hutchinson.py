"""Hutchinson's estimate of the Hessian's diagonal against second derivatives by autograd."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests import gradients, tiny_models
from weightsurgery import hutchinson, load_model, read_examples
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.cli import main
from weightsurgery.datasets.batches import Encoded
from weightsurgery.errors import MismatchError, NonFiniteError, SettingError
from weightsurgery.models import Model

SMALL: dict[str, dict[str, int]] = {
    "bert": {"hidden_size": 4, "num_hidden_layers": 1, "intermediate_size": 4},
    "gpt2": {"n_embd": 4, "n_layer": 1},
    "llama": {"hidden_size": 4, "num_hidden_layers": 1, "intermediate_size": 4},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    tiny_models.bert(path / "bert", **SMALL["bert"], max_position_embeddings=10)
    tiny_models.gpt2(path / "gpt2", **SMALL["gpt2"], n_positions=10)
    tiny_models.llama(path / "llama", **SMALL["llama"], max_position_embeddings=10)
    tiny_models.write_sentences(path / "clean.tsv")
    tiny_models.write_questions(path / "clean.jsonl")
    return path


def opened(folder: Path, family: str) -> tuple[Model, list[Encoded]]:
    model = load_model(folder / family, device="cpu")
    data = "clean.tsv" if family == "bert" else "clean.jsonl"
    return model, read_examples(model, folder / data, max_length=10)[:3]


def flat(tensors: Checkpoint | dict[str, torch.Tensor]) -> torch.Tensor:
    if isinstance(tensors, Checkpoint):
        rows = [torch.from_numpy(view.read(0, view.size).copy()) for view in tensors.values()]
    else:
        rows = [tensors[name].flatten() for name in sorted(tensors)]
    return torch.cat(rows).double()


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_the_estimate_comes_closer_with_more_samples(folder: Path, family: str) -> None:
    model, examples = opened(folder, family)
    truth = flat(gradients.hessian_diagonal(model.module, model.names, examples))
    errors = []
    for samples in (10, 160):
        found = flat(hutchinson(model, examples, samples=samples, negative="keep"))
        errors.append(float((found - truth).norm() / truth.norm()))
    assert errors[1] < errors[0] / 2.5  # expected: a quarter
    assert errors[1] < 0.6


class Flat(nn.Module):
    """Softmax regression on one-hot inputs, one weight matrix for each token."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(3, classes))
        self.idle = nn.Parameter(torch.ones(2))
        self.config = SimpleNamespace(id2label={n: str(n) for n in range(classes)})

    def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
        return SimpleNamespace(logits=self.table[input_ids[:, 0]])


EXAMPLES = [Encoded((n % 3,), (), (n % 2,)) for n in range(4)]


def test_softmax_in_closed_form_and_its_error_as_the_variance_says() -> None:
    """The Hessian of each row is diag(p) - ppᵀ, times the share of examples that have it."""
    model = tiny_models.in_memory(Flat(4), "classification")
    p = model.module.table.detach().softmax(-1)
    weight = torch.tensor([2 / 4, 1 / 4, 1 / 4])[:, None]
    truth = weight * p * (1 - p)
    rest = weight**2 * p**2 * ((p**2).sum(-1, keepdim=True) - p**2)  # Σ_j≠i H_ij²
    for samples in (1, 25, 400):
        made = hutchinson(model, EXAMPLES, samples=samples, negative="keep")
        found = torch.from_numpy(made["table"].read(0, 12).copy()).view(3, 4)
        assert bool(((found - truth).abs() <= 5 * (rest / samples).sqrt()).all()), samples
    assert not made["idle"].read(0, 2).any()


def test_a_diagonal_hessian_is_exact_with_one_sample() -> None:
    class Pair(Flat):
        def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
            chosen = self.table[input_ids[:, 0], 0]
            return SimpleNamespace(logits=torch.stack([chosen, torch.zeros_like(chosen)], -1))

    model = tiny_models.in_memory(Pair(1), "classification")
    model.module.config.id2label = {0: "a", 1: "b"}
    p = model.module.table.detach()[:, 0].sigmoid()
    found = hutchinson(model, EXAMPLES, samples=1)["table"].read(0, 3)
    expected = torch.tensor([2 / 4, 1 / 4, 1 / 4]) * p * (1 - p)
    torch.testing.assert_close(torch.from_numpy(found.copy()), expected)


def test_a_loss_without_curvature() -> None:
    class Bent(Flat):
        def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
            one = torch.zeros(len(input_ids), 2)
            return SimpleNamespace(logits=one + 0 * self.table.sum().detach() + self.idle * 0)

    model = tiny_models.in_memory(Bent(2), "classification")
    assert not flat(hutchinson(model, EXAMPLES)).any()


def test_batches_change_rounding_alone_and_the_seed_the_vectors(folder: Path) -> None:
    model, examples = opened(folder, "bert")
    one = flat(hutchinson(model, examples, samples=2, batch_size=1))
    torch.testing.assert_close(
        flat(hutchinson(model, examples, samples=2)), one, rtol=1e-3, atol=1e-6
    )
    other = flat(hutchinson(model, examples, samples=2, seed=1))
    assert float((one - other).norm()) > 0.1 * float(one.norm())


def test_negative_estimates(folder: Path) -> None:
    model, examples = opened(folder, "bert")
    kept = hutchinson(model, examples, negative="keep")
    taken = hutchinson(model, examples)
    assert float(flat(kept).min()) < 0
    assert torch.equal(flat(kept).abs(), flat(taken))
    assert "may be negative" in kept.metadata["content"]
    assert "absolute value" in taken.metadata["content"]


def test_the_model_is_left_as_it_was(folder: Path) -> None:
    model, examples = opened(folder, "gpt2")
    model.module.train()
    hutchinson(model, examples, samples=1)
    assert model.module.training
    assert all(p.requires_grad and p.grad is None for p in model.names.values())


def test_progress_counts_examples(folder: Path) -> None:
    model, examples = opened(folder, "bert")
    told: list[tuple[str, int, int]] = []
    progress: Callable[..., None] = lambda *what: told.append(what)
    hutchinson(model, examples, samples=2, batch_size=2, progress=progress)
    assert told == [("hutchinson", n, 6) for n in (2, 3, 5, 6)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples is 0; expected at least 1"),
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"negative": "drop"}, "negative is 'drop'; expected absolute or keep"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    model = tiny_models.in_memory(Flat(2), "classification")
    with pytest.raises(SettingError, match=message):
        hutchinson(model, EXAMPLES, **settings)


def test_what_has_no_hessian() -> None:
    model = tiny_models.in_memory(Flat(2), "classification")
    with pytest.raises(SettingError, match="no examples"):
        hutchinson(model, [])
    with pytest.raises(MismatchError, match="of type regression"):
        hutchinson(tiny_models.in_memory(Flat(1), "classification"), EXAMPLES)
    model.module.table.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="'table': NaN or infinity in the hutchinson"):
        hutchinson(model, EXAMPLES)


def test_the_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    command = [
        "fisher",
        "bert",
        "--data",
        "clean.tsv",
        "--max-length",
        "10",
        "--json",
        "--overwrite",
    ]
    command += ["--estimator", "hutchinson", "--samples", "3", "-o", "h.safetensors"]
    for negative in ("absolute", "keep"):
        with pytest.raises(SystemExit) as stopped:
            main([*command, "--negative", negative])
        assert stopped.value.code == 0
        document = json.loads(capsys.readouterr().out)
        assert document["estimator"] == "hutchinson"
        assert document["settings"]["samples"] == 3
        assert (document["negative"] > 0) == (negative == "keep")
        assert list(document["paths"]) == ["hutchinson"]
