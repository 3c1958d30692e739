"""Fisher information: its definition, labels, points, errors, and the command."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from torch import nn

from tests import gradients, tiny_models
from weightsurgery import (
    fisher,
    fisher_with_error,
    load_model,
    open_checkpoint,
    read_examples,
    save,
)
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.cli import main
from weightsurgery.curvature import losses
from weightsurgery.curvature.losses import Objective
from weightsurgery.curvature.points import between
from weightsurgery.curvature.result import summarise
from weightsurgery.datasets.batches import Encoded
from weightsurgery.errors import MismatchError, NonFiniteError, SettingError
from weightsurgery.models import Model
from weightsurgery.sliced_loss import token_losses

FAMILIES = ("bert", "gpt2", "llama")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One base and one tuned model of each family, and data for them."""
    path = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        make = getattr(tiny_models, family)
        make(path / family)
        make(path / f"{family}-base", seed=1)
    tiny_models.write_sentences(path / "clean.tsv")
    tiny_models.write_sentences(path / "pairs.tsv", pairs=True)
    tiny_models.write_questions(path / "clean.jsonl")
    return path


def opened(folder: Path, family: str, data: str = "") -> tuple[Model, list[Encoded]]:
    model = load_model(folder / family, device="cpu")
    data = data or ("clean.tsv" if family == "bert" else "clean.jsonl")
    return model, read_examples(model, folder / data)


def arrays(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(view.read(0, view.size).copy()).view(view.shape)
        for name, view in checkpoint.items()
    }


def agree(found: Checkpoint, truth: dict[str, Any], tolerance: float = 1e-4) -> None:
    values = arrays(found)
    assert values.keys() == truth.keys()
    floor = 1e-12 * max(float(one.norm()) for one in truth.values())
    for name, one in truth.items():
        error = float((values[name].double() - one).norm())
        assert error <= tolerance * float(one.norm()) + floor, name


# --- the definition ---------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 4, 32])
@pytest.mark.parametrize(
    ("family", "data"), [("bert", ""), ("bert", "pairs.tsv"), ("gpt2", ""), ("llama", "")]
)
def test_equals_the_naive_loop(folder: Path, family: str, data: str, batch_size: int) -> None:
    model, examples = opened(folder, family, data)
    found = fisher(model, examples, batch_size=batch_size)
    agree(found, gradients.fisher(model.module, model.names, examples))
    assert set(found.notes["paths"].values()) == {"hooks"}
    assert all(view.dtype.name == "F32" for view in found.values())
    on_disk = open_checkpoint(folder / family)
    assert {n: view.shape for n, view in found.items()} == {
        n: view.shape for n, view in on_disk.items() if n != "lm_head.weight" or family != "gpt2"
    }


def test_it_is_not_the_square_of_the_mean_gradient(folder: Path) -> None:
    model, examples = opened(folder, "bert")
    found = arrays(fisher(model, examples))["classifier.weight"]
    rows = [
        gradients.gradients(model.module, model.names, e)["classifier.weight"] for e in examples
    ]
    assert not torch.allclose(found, torch.stack(rows).mean(0) ** 2, rtol=0.1)


@pytest.mark.parametrize("labels", ["true", "sampled"])
def test_logistic_regression_in_closed_form(labels: str) -> None:
    """(p - y)² x², and by its own labels p (1 - p) x² for two classes."""
    torch.manual_seed(0)
    features = torch.randn(4, 5)

    class Logistic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 2)
            self.config = SimpleNamespace(id2label={0: "a", 1: "b"})

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return SimpleNamespace(logits=self.linear(features[input_ids[:, 0]]))

    model = tiny_models.in_memory(Logistic(), "classification")
    which = torch.arange(4).repeat(2000 if labels == "sampled" else 1)
    examples = [Encoded((int(i),), (), (int(i) % 2,)) for i in which]
    found = arrays(fisher(model, examples, labels=labels, batch_size=500))["linear.weight"]
    p = model.module.linear(features).softmax(-1).detach()
    if labels == "true":
        y = nn.functional.one_hot(torch.arange(4) % 2, 2)
        expected, tolerance = ((p - y) ** 2)[..., None] * features[:, None] ** 2, 1e-5
    else:
        expected, tolerance = (p * (1 - p))[..., None] * features[:, None] ** 2, 0.05
    torch.testing.assert_close(found, expected.mean(0), rtol=tolerance, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_standard_error(folder: Path, family: str) -> None:
    model, examples = opened(folder, family)
    mean, error = fisher_with_error(model, examples, batch_size=2)
    agree(mean, gradients.fisher(model.module, model.names, examples))
    truth = gradients.standard_error(model.module, model.names, examples)
    agree(error, truth, tolerance=2e-3)  # a difference of nearly equal float32 numbers
    assert error.step is not None
    assert error.step.operator == "fisher-standard-error"


def test_the_order_of_examples_changes_rounding_alone(folder: Path) -> None:
    model, examples = opened(folder, "bert")
    one, other = fisher(model, examples), fisher(model, examples[::-1])
    for (name, values), again in zip(arrays(one).items(), arrays(other).values(), strict=True):
        torch.testing.assert_close(values, again, rtol=1e-4, atol=1e-9, msg=name)
    assert one.metadata["examples_sha256"] != other.metadata["examples_sha256"]


def test_same_call_same_bytes(folder: Path) -> None:
    model, examples = opened(folder, "gpt2")
    one, other = (arrays(fisher(model, examples, batch_size=2)) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_dropout_is_off_and_the_mode_put_back(folder: Path) -> None:
    model, examples = opened(folder, "bert")
    truth = arrays(fisher(model, examples))
    model.module.train()
    found = arrays(fisher(model, examples))
    assert model.module.training
    assert all(torch.equal(truth[name], found[name]) for name in truth)


def test_within_no_grad(folder: Path) -> None:
    model, examples = opened(folder, "bert")
    with torch.no_grad():
        found = fisher(model, examples)
    assert arrays(found)["classifier.bias"].all()


# --- sampled labels ---------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "rows"), [(1 << 20, 33), (700, 7), (100, 1), (1, 1)])
def test_labels_are_drawn_a_few_rows_at_a_time(
    most: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is the first class at which the cumulative probability passes the draw."""
    rng = np.random.default_rng(5)
    logits, draws = rng.normal(size=(4, 12, 100)), rng.random((4, 12))
    labels = np.where(np.arange(12) < 8, 7, -100)[None].repeat(4, 0)
    labels[2, 0] = 99
    labels[3, 9] = 5
    seen: list[int] = []
    whole = losses._sample

    def sample(logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        seen.append(len(logits))
        return whole(logits, draws)

    monkeypatch.setattr(losses, "_sample", sample)
    monkeypatch.setattr(losses, "_AT_ONCE", most)
    found = losses._sampled(torch.tensor(logits), torch.tensor(labels), torch.tensor(draws)).numpy()
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = (shares.cumsum(-1) <= draws[..., None]).sum(-1)
    assert (found == np.where(labels == -100, -100, expected)).all()
    assert len(np.unique(found)) > 20
    assert sum(seen) == 33
    assert max(seen) == rows


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_labels_depend_on_the_seed_alone(folder: Path, family: str) -> None:
    model, examples = opened(folder, family)
    one = fisher(model, examples, labels="sampled", seed=3)
    agree(fisher(model, examples, labels="sampled", seed=3, batch_size=2),
          {n: v.double() for n, v in arrays(one).items()})  # fmt: skip
    other = arrays(fisher(model, examples, labels="sampled", seed=4))
    assert any(not torch.allclose(values, other[n]) for n, values in arrays(one).items())
    before = torch.random.get_rng_state()
    fisher(model, examples, labels="sampled")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_labels_are_drawn_in_proportion(folder: Path) -> None:
    model, examples = opened(folder, "gpt2")
    objective = Objective(model, sampled=True)
    counts = torch.zeros(len(tiny_models.VOCABULARY))
    one = examples[0]
    place = one.labels.index(next(label for label in one.labels if label >= 0))
    drawn: list[torch.Tensor] = []

    def spy(logits: Any, labels: Any) -> Any:
        drawn.append(labels[:, place])
        return token_losses(logits, labels)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("weightsurgery.curvature.losses.token_losses", spy)
        for batch in objective.batches([one] * 4000, 1000):
            objective.losses(batch)
        logits = model.module(input_ids=torch.tensor([one.ids])).logits[0, place - 1]
    counts.index_add_(0, torch.cat(drawn), torch.ones(4000))
    expected = logits.softmax(-1) * 4000
    assert float(((counts - expected) ** 2 / expected).sum()) < 90  # chi-squared, 44 degrees


# --- points -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_points_average_over_the_way_from_base(folder: Path, family: str) -> None:
    model, examples = opened(folder, family)
    base = open_checkpoint(folder / f"{family}-base")
    before = {name: p.detach().clone() for name, p in model.names.items()}
    found = fisher(model, examples, points=3, base=base)
    assert all(torch.equal(before[name], p) for name, p in model.names.items())
    truth: dict[str, Any] = {}
    start = arrays(base)
    for share in (1 / 6, 3 / 6, 5 / 6):
        for name, parameter in model.names.items():
            parameter.data = start[name] + share * (before[name] - start[name])
        for name, values in gradients.fisher(model.module, model.names, examples).items():
            truth[name] = truth.get(name, 0) + values / 3
    agree(found, truth)
    assert found.step is not None
    assert list(found.step.inputs) == ["base", "model"]


def test_one_point_is_the_tuned_model_whatever_base_is(folder: Path) -> None:
    model, examples = opened(folder, "bert")
    base = open_checkpoint(folder / "bert-base")
    one, other = fisher(model, examples, base=base), fisher(model, examples)
    assert all(torch.equal(v, arrays(other)[n]) for n, v in arrays(one).items())
    assert one.step is not None
    assert list(one.step.inputs) == ["model"]


def test_weights_come_back_after_an_error(folder: Path) -> None:
    model, _ = opened(folder, "bert")
    before = {name: p.detach().clone() for name, p in model.names.items()}

    def fail() -> None:
        with between(model, open_checkpoint(folder / "bert-base")) as move:
            move(0.5)
            assert not torch.equal(before["classifier.weight"], model.names["classifier.weight"])
            raise ZeroDivisionError("halfway")

    with pytest.raises(ZeroDivisionError, match="halfway"):
        fail()
    assert all(torch.equal(before[name], p) for name, p in model.names.items())


def test_points_need_the_weights_of_the_checkpoint(folder: Path) -> None:
    model, examples = opened(folder, "bert")
    model.names["classifier.bias"].data[0] += 1
    with pytest.raises(MismatchError, match=r"'classifier\.bias': the weights in memory are not"):
        fisher(model, examples, points=2, base=open_checkpoint(folder / "bert-base"))


def test_points_begin_at_weights_of_the_same_shapes(folder: Path, tmp_path: Path) -> None:
    model, examples = opened(folder, "bert")
    other = open_checkpoint(tiny_models.bert(tmp_path / "other", intermediate_size=20))
    with pytest.raises(MismatchError, match=r"shapes differ.*; the points begin at the base"):
        fisher(model, examples, points=2, base=other)


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": "false"}, "labels is 'false'; expected true or sampled"),
        ({"points": 0}, "points is 0; expected at least 1"),
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"points": 2}, "points is 2, but there is no base"),
    ],
)
def test_settings_out_of_range(folder: Path, settings: dict[str, Any], message: str) -> None:
    model, examples = opened(folder, "bert")
    for function in (fisher, fisher_with_error):
        with pytest.raises(SettingError, match=message):
            function(model, examples, **settings)


def test_no_examples(folder: Path) -> None:
    model, examples = opened(folder, "bert")
    with pytest.raises(SettingError, match="no examples; expected at least one"):
        fisher(model, [])
    with pytest.raises(SettingError, match="one example has no standard error"):
        fisher_with_error(model, examples[:1])


def test_an_example_without_an_answer(folder: Path) -> None:
    model, examples = opened(folder, "llama")
    empty = replace(examples[1], labels=(5, *[-100] * (len(examples[1].ids) - 1)))
    with pytest.raises(MismatchError, match="example 2 has no answer token"):
        fisher(model, [examples[0], empty])


def test_a_regression_head(tmp_path: Path) -> None:
    model = load_model(
        tiny_models.bert(tmp_path / "m", num_labels=1), task="classification", device="cpu"
    )
    with pytest.raises(MismatchError, match=r"1 label\(s\) of type regression"):
        fisher(model, [Encoded((2, 5, 3), (0, 0, 0), (0,))])


def test_a_head_of_many_labels(tmp_path: Path) -> None:
    kind = "multi_label_classification"
    model = load_model(
        tiny_models.bert(tmp_path / "m", problem_type=kind), task="classification", device="cpu"
    )
    with pytest.raises(MismatchError, match=f"of type {kind}"):
        fisher(model, [Encoded((2, 5, 3), (0, 0, 0), (0,))])


def test_nan_names_the_tensor(folder: Path) -> None:
    model, examples = opened(folder, "bert")
    model.names["classifier.weight"].data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"tensor '.*': NaN or infinity in the fisher"):
        fisher(model, examples)


# --- what is written --------------------------------------------------------------------------


def test_saved_it_tells_how_it_was_made(folder: Path, tmp_path: Path) -> None:
    model, examples = opened(folder, "bert")
    made = fisher(model, examples, labels="sampled", seed=5)
    record = save(made, tmp_path / "f.safetensors")
    recipe = record["recipe"]
    assert recipe["operator"] == "fisher"
    assert recipe["settings"]["labels"] == "sampled"
    assert recipe["settings"]["examples"] == 6
    assert recipe["inputs"] == {"model": {"input": 0}}
    assert record["inputs"][0]["name"] == "bert"
    assert {entry["status"] for entry in record["tensors"].values()} == {"added"}
    with safe_open(tmp_path / "f.safetensors", "np") as file:
        metadata = file.metadata()
    assert metadata["estimator"] == "fisher"
    assert metadata["seed"] == "5"
    assert "labels drawn from the model" in metadata["content"]


def test_progress_counts_examples(folder: Path) -> None:
    model, examples = opened(folder, "bert")
    told: list[tuple[str, int, int]] = []
    base = open_checkpoint(folder / "bert-base")
    fisher(model, examples, points=2, base=base, batch_size=4,
           progress=lambda *what: told.append(what))  # fmt: skip
    assert told == [("fisher", n, 12) for n in (4, 6, 10, 12)]


def test_the_summary(folder: Path) -> None:
    model, examples = opened(folder, "bert")
    made = fisher(model, examples)
    summary = summarise(made)
    values = torch.cat([one.flatten() for one in arrays(made).values()])
    assert summary["dimensions"] == len(values)
    assert summary["zeros"] == int((values == 0).sum()) > 0
    assert summary["negative"] == 0
    assert summary["mean"] == pytest.approx(float(values.double().mean()))
    largest = summary["largest"]
    assert arrays(made)[largest["tensor"]].flatten()[largest["index"]] == values.max()
    assert summary["paths"] == {"hooks": list(made)}
    with pytest.raises(ValueError, match="not an estimate"):
        summarise(open_checkpoint(folder / "bert"))


class Later(nn.Module):
    """Calls a layer otherwise on batches of three."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(len(tiny_models.VOCABULARY), 6)
        self.layer = nn.Linear(6, 2)
        self.config = SimpleNamespace(id2label={0: "a", 1: "b"})

    def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
        x = self.words(input_ids).tanh()[:, :1]
        flat = self.layer(x.flatten(0, 1)[:, None]) if len(x) != 3 else self.layer(x.mT.mT[None])[0]
        return SimpleNamespace(logits=flat.flatten(1))


def test_what_turns_out_not_to_be_covered_is_computed_again() -> None:
    model = tiny_models.in_memory(Later(), "classification")
    examples = [Encoded((n, 3), (), (n % 2,)) for n in range(4, 10)]
    told: list[str] = []
    found = fisher(model, examples, batch_size=3, progress=lambda what, *_: told.append(what))
    agree(found, gradients.fisher(model.module, model.names, examples))
    assert found.notes["paths"] == {
        "words.weight": "hooks", "layer.weight": "loop", "layer.bias": "loop"
    }  # fmt: skip
    assert set(told) == {"fisher", "fisher (one at a time)"}


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def wsurg(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str, str]]:
    """Run `wsurg` in an empty folder that knows the models; gives exit code, stdout and stderr."""
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([*arguments])
        code = stopped.value.code
        assert isinstance(code, int)
        return code, *capsys.readouterr()

    return run


def test_the_command_writes_what_the_function_gives(folder: Path, wsurg: Any) -> None:
    code, out, err = wsurg("fisher", "bert", "--data", "clean.tsv", "-o", "f.safetensors")
    assert (code, err) == (0, "fisher: 6 of 6\n")
    assert re.search(r"tensors +41 in batches\n", out)
    assert re.search(r"examples +6 \(labels true, points 1, seed 0\)\n", out)
    written = load_file("f.safetensors")
    for name, values in arrays(fisher(*opened(folder, "bert"))).items():
        np.testing.assert_array_equal(written[name], values.numpy())
    assert os.path.isfile("f.safetensors.wsurg-record.json")


def test_the_command_with_everything(wsurg: Any) -> None:
    arguments = ["fisher", "gpt2", "--data", "clean.jsonl", "--out", "f.safetensors"]
    arguments += ["--labels", "sampled", "--points", "2", "--base", "gpt2-base", "--seed", "1"]
    arguments += ["--batch-size", "2", "--max-length", "12", "--device", "cpu", "--no-hash"]
    arguments += ["--standard-error", "se.safetensors", "--json"]
    code, out, _ = wsurg(*arguments)
    assert code == 0
    document = json.loads(out)
    assert document["schema"] == "wsurg.fisher/1"
    assert document["settings"]["points"] == 2
    assert document["record"]["recipe"]["inputs"] == {"base": {"input": 0}, "model": {"input": 1}}
    both = [load_file(name) for name in ("f.safetensors", "se.safetensors")]
    assert both[0].keys() == both[1].keys()
    code, _, err = wsurg(*arguments)
    assert (code, "f.safetensors: exists already" in err) == (5, True)
    assert wsurg(*arguments, "--overwrite")[0] == 0


def test_the_page_lists_the_keys_of_the_json(wsurg: Any) -> None:
    page = Path(__file__).parent.parent / "docs" / "how-to" / "fisher.md"
    rows = re.findall(r"^\| (`.*?) \| ", page.read_text("utf-8"), re.MULTILINE)
    documented = {key for row in rows for key in re.findall(r"`(\w+)`", row)}
    _, out, _ = wsurg("fisher", "bert", "--data", "clean.tsv", "-o", "f.safetensors", "--json")
    assert documented == set(json.loads(out))


def test_the_command_says_where_the_standard_error_is(wsurg: Any) -> None:
    arguments = ["--data", "clean.tsv", "-o", "f.safetensors", "--standard-error", "s.safetensors"]
    code, _, err = wsurg("fisher", "bert", *arguments)
    assert (code, err.splitlines()[-1]) == (0, "the standard error is in s.safetensors")


def test_the_command_lists_what_took_the_slow_path() -> None:
    from weightsurgery.report.curvature import curvature_tables

    summary = {
        "estimator": "fisher",
        "settings": {"examples": 3},
        "paths": {"hooks": ["a"], "loop": [f"layer.{n}.raw" for n in range(25)]},
        "dimensions": 0,
        "mean": 0.0,
        "zeros": 0,
        "negative": 0,
        "largest": {"tensor": "", "index": 0, "value": 0.0},
    }
    slow, rest = curvature_tables("f.safetensors", summary)
    assert len(slow.rows) == 20
    assert slow.note == "and 5 more; --json lists all"
    assert ["tensors", "1 in batches, 25 one example at a time"] in rest.rows
    assert ["largest", "-"] in rest.rows


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--samples", "3"], 2, "--samples is for --estimator hutchinson"),
        (["--negative", "keep"], 2, "--negative is for --estimator hutchinson"),
        (
            ["--estimator", "hutchinson", "--labels", "true"],
            2,
            "--labels is for --estimator fisher",
        ),
        (
            ["--estimator", "hutchinson", "--standard-error", "s.safetensors"],
            2,
            "--standard-error is for --estimator fisher",
        ),
        (["--base", "bert-base"], 2, "--base is for --points of 2 or more"),
        (["--points", "2"], 2, "--points of 2 or more needs --base"),
        (["--standard-error", "./f.safetensors"], 5, "two outputs of this run would lie in the"),
        (["--max-length", "500"], 2, "--max-length is 500; expected 2 to 128 tokens"),
        (["--standard-error", "nowhere/s.safetensors"], 6, "folder to write to does not exist"),
        (["--standard-error", "bert/s.safetensors"], 5, "would overlap the input"),
        (["--points", "2", "--base", "gpt2-base"], 4, "model_type is gpt2 in BASE"),
        (["--device", "abacus"], 2, "device 'abacus' is not available"),
    ],
)
def test_the_command_refuses(wsurg: Any, arguments: list[str], code: int, message: str) -> None:
    command = ["fisher", "bert", "--data", "clean.tsv", "-o", "f.safetensors"]
    found, _, err = wsurg(*command, *arguments)
    assert (found, message in err) == (code, True), err
    assert not os.path.exists("f.safetensors")


@pytest.mark.parametrize(
    ("out", "code", "message"),
    [
        ("fisher", 2, "does not end in .safetensors"),
        ("bert/f.safetensors", 5, "would overlap the input"),
        ("nowhere/f.safetensors", 6, "folder to write to does not exist"),
    ],
)
def test_the_destination_is_checked_before_the_model_is_loaded(
    wsurg: Any, monkeypatch: pytest.MonkeyPatch, out: str, code: int, message: str
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("weightsurgery.models.load_model", loaded)
    found, _, err = wsurg("fisher", "bert", "--data", "clean.tsv", "-o", out)
    assert (found, message in err) == (code, True), err
