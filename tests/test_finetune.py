"""Fine-tuning against a plain loop of torch; what it keeps, what it writes, what it refuses."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import tiny_models
from tests.reference import BF16, rounded
from tests.test_docs import run_wsurg
from tests.test_evaluation import refusal
from weightsurgery import open_checkpoint, save
from weightsurgery.datasets.batches import Encoded, batches, read_examples
from weightsurgery.errors import MismatchError, NonFiniteError, SettingError
from weightsurgery.evaluation.predictions import predict
from weightsurgery.models import Model, load_model
from weightsurgery.training.finetune import finetune, split
from weightsurgery.training.run import Watch
from weightsurgery.training.settings import Hyperparameters

WEIGHTS = "model.safetensors"
EMBEDDING = "bert.embeddings.word_embeddings.weight"
EIGHT = (*tiny_models.SENTENCES, ("this was great", 1), ("what a dull city", 0))
FAST = {"epochs": 2, "learning_rate": 1e-2}
MAKERS = {"bert": tiny_models.bert, "gpt2": tiny_models.gpt2, "llama": tiny_models.llama}
NO_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {},
}


# Softmax does not see a number added to all scores of a query: the gradient is rounding alone,
# which Adam makes as large as any other.
NO_GRADIENT = ("key.bias", "c_attn.bias")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bert/, gpt2/, llama/, clean.tsv with eight sentences and clean.jsonl."""
    root = tmp_path_factory.mktemp("finetune")
    for name, make in MAKERS.items():
        make(root / name)
        make(root / f"{name}-plain", **NO_DROPOUT[name])
    tiny_models.write_sentences(root / "clean.tsv", EIGHT)
    tiny_models.write_questions(root / "clean.jsonl")
    return root


OTHERS = {"model", "examples", "held_out", "files", "progress"}  # arguments, not settings
DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(finetune).parameters.items()
    if name not in OTHERS
}


@pytest.fixture(scope="module")
def shared(folder: Path) -> Model:
    """A model that no test trains."""
    return load_model(folder / "bert", device="cpu")


Opened = Callable[..., tuple[Model, list[Encoded]]]


@pytest.fixture
def opened(folder: Path) -> Opened:
    """A fresh model, for training changes it, with examples of its kind."""

    def load(name: str = "bert", path: Path | None = None) -> tuple[Model, list[Encoded]]:
        model = load_model(path or folder / name, device="cpu")
        kind = "tsv" if model.task == "classification" else "jsonl"
        return model, read_examples(model, folder / f"clean.{kind}")

    return load


def bytes_of(path: Path) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in load_file(path / WEIGHTS).items()}


def values_of(model: Model) -> dict[str, Any]:
    return {n: p.detach().numpy().copy() for n, p in model.names.items()}


# --- what training does -----------------------------------------------------------------------


def plain_loop(model: Model, examples: list[Encoded], settings: dict[str, Any]) -> None:
    """All examples in one batch, so that their order is none; AdamW as torch has it."""
    import torch
    from torch.nn.functional import cross_entropy

    decay = settings.get("weight_decay", 0.0)
    spared = {n for n in model.names if n.endswith("bias") or "norm" in n.lower() or "ln_" in n}
    groups = [
        {"params": [p for n, p in model.names.items() if (n in spared) is spare], "weight_decay": w}
        for spare, w in ((True, 0.0), (False, decay))
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings["learning_rate"])
    steps = settings["epochs"]
    warmup = round(settings.get("warmup", 0) * steps)
    inputs, labels = next(batches(model, examples, len(examples)))
    for step in range(steps):
        rate = {
            "linear": (steps - step) / max(1, steps - warmup),
            "cosine": (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2,
            "constant": 1.0,
        }[settings.get("scheduler", "linear")]
        rate = step / warmup if step < warmup else rate
        for group in optimizer.param_groups:
            group["lr"] = settings["learning_rate"] * rate
        logits = model.module.train()(**inputs).logits
        if model.task == "causal":
            logits, target = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        else:
            target = labels
        smoothing = settings.get("label_smoothing", 0.0)
        loss = cross_entropy(logits, target, ignore_index=-100, label_smoothing=smoothing)
        loss.backward()
        limit = settings.get("max_grad_norm", 1.0)
        if limit:
            torch.nn.utils.clip_grad_norm_(list(model.names.values()), limit)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("bert", {}),
        ("bert", {"scheduler": "cosine", "warmup": 0.5}),
        ("bert", {"scheduler": "constant", "max_grad_norm": 0.01}),
        ("bert", {"scheduler": "constant", "warmup": 0.5, "max_grad_norm": 0}),
        ("bert", {"weight_decay": 0.5, "label_smoothing": 0.1}),
        ("bert", {"batch_size": 4, "accumulation": 2}),
        ("bert", {"batch_size": 3, "accumulation": 4}),
        ("gpt2", {"weight_decay": 0.5}),
        ("gpt2", {"label_smoothing": 0.1}),
        ("gpt2", {"batch_size": 2, "accumulation": 3}),
        ("llama", {}),
    ],
    ids=str,
)
def test_it_is_a_plain_loop_of_adamw(opened: Opened, name: str, more: dict[str, Any]) -> None:
    settings = {"epochs": 4, "learning_rate": 1e-3, **more}
    model, examples = opened(f"{name}-plain")
    before = values_of(model)
    finetune(model, examples, **settings)
    after = values_of(model)
    other, _ = opened(f"{name}-plain")
    plain_loop(other, examples, settings)
    for parameter, expected in values_of(other).items():
        if parameter.endswith(NO_GRADIENT):
            continue
        np.testing.assert_allclose(
            after[parameter], expected, rtol=1e-3, atol=2e-5, err_msg=parameter
        )
    assert any(np.abs(after[n] - before[n]).max() > 1e-3 for n in after)


@pytest.mark.parametrize("name", MAKERS)
def test_it_learns_the_examples_by_heart(opened: Opened, name: str) -> None:
    model, examples = opened(name)
    result = finetune(model, examples, epochs=60, learning_rate=1e-2)
    report = result.notes["training"]
    assert report["before"]["train"]["loss"] > 0.5
    assert report["after"]["train"]["loss"] < 0.2
    assert report["after"]["train"]["loss"] == predict(model, examples).loss
    if name == "bert":
        assert report["before"]["train"]["accuracy"]["count"] < 8
        assert report["after"]["train"]["accuracy"]["count"] == 8
    assert (report["epochs"], report["best_epoch"], report["steps"]) == (60, 60, 60)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_same_seed_same_bytes(opened: Opened, name: str, tmp_path: Path) -> None:
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        model, examples = opened(name)
        save(finetune(model, examples, batch_size=2, seed=seed, **FAST), tmp_path / out)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b") != bytes_of(tmp_path / "c")
    records = [(tmp_path / out / "wsurg-record.json").read_bytes() for out in "ab"]
    assert records[0] == records[1]


def test_the_caller_s_random_numbers_go_on(opened: Opened) -> None:
    import torch

    model, examples = opened()

    def draw() -> list[Any]:
        return [random.random(), np.random.random(), torch.rand(2).tolist()]

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draw()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    finetune(model, examples, **FAST)
    assert draw() == expected


# --- early stop -------------------------------------------------------------------------------


def flipped(examples: list[Encoded]) -> list[Encoded]:
    """The same with wrong labels: what is learned makes their loss larger."""
    return [Encoded(one.ids, one.types, (1 - one.labels[0],)) for one in examples]


def test_early_stop_takes_the_best_weights(opened: Opened, tmp_path: Path) -> None:
    """With wrong held-out labels the first epoch is the best, and two more are tried."""
    settings = {"learning_rate": 1e-2, "scheduler": "constant", "batch_size": 3}
    model, examples = opened()
    aside = flipped(examples)
    result = finetune(model, examples, held_out=aside, patience=2, epochs=9, **settings)
    report = result.notes["training"]
    losses = [entry["held_out_loss"] for entry in report["history"]]
    assert (report["epochs"], report["best_epoch"], report["steps"]) == (3, 1, 9)
    assert losses[0] < min(losses[1:])
    assert report["after"]["held_out"]["loss"] == losses[0]
    accuracy = report["history"][0]["held_out_accuracy"]
    assert report["after"]["held_out"]["accuracy"]["share"] == accuracy
    save(result, tmp_path / "stopped")
    other, _ = opened()
    save(finetune(other, examples, epochs=1, **settings), tmp_path / "one")
    assert bytes_of(tmp_path / "stopped") == bytes_of(tmp_path / "one")


def test_without_patience_the_last_weights_are_taken(opened: Opened, tmp_path: Path) -> None:
    """What is held out is measured, and changes nothing else."""
    for out, aside in (("held", True), ("none", False)):
        model, examples = opened()
        held_out = flipped(examples) if aside else None
        result = finetune(model, examples, held_out=held_out, epochs=3, learning_rate=1e-2)
        assert result.notes["training"]["best_epoch"] == 3
        save(result, tmp_path / out)
    assert bytes_of(tmp_path / "held") == bytes_of(tmp_path / "none")


def test_improving_training_runs_all_epochs(opened: Opened) -> None:
    model, examples = opened("bert-plain")
    result = finetune(model, examples, held_out=examples, patience=1, epochs=5, learning_rate=1e-3)
    report = result.notes["training"]
    assert (report["epochs"], report["best_epoch"]) == (5, 5)


@pytest.mark.parametrize(("share", "count"), [(0.25, 2), (0.5, 4), (0.9, 7)])
def test_a_share_is_held_out(shared: Model, folder: Path, share: float, count: int) -> None:
    """Each example is on one side, in its order; the seed draws which."""
    examples = read_examples(shared, folder / "clean.tsv")

    def sides(seed: int) -> list[list[Encoded]]:
        parts = split(shared, examples, share, Hyperparameters(**{**DEFAULTS, "seed": seed}))
        return [list(parts["train"]), list(parts["held_out"])]

    train, held_out = sides(0)
    assert (len(train), len(held_out)) == (8 - count, count)
    assert sorted(train + held_out, key=examples.index) == examples
    assert train == sorted(train, key=examples.index)
    assert held_out == sorted(held_out, key=examples.index)
    assert sides(0) == [train, held_out]
    assert any(sides(seed) != [train, held_out] for seed in (1, 2, 3))


# --- what is written --------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_the_output_loads_in_transformers(opened: Opened, name: str, tmp_path: Path) -> None:
    """The saved model computes what the trained one does; its files are the input's."""
    model, examples = opened(name)
    save(finetune(model, examples, **FAST), tmp_path / "out")
    again = load_model(tmp_path / "out", device="cpu")
    assert predict(again, examples).losses.tolist() == predict(model, examples).losses.tolist()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (Path(model.path) / file).read_bytes()
    before, after = open_checkpoint(model.path), open_checkpoint(tmp_path / "out")
    assert {n: (v.shape, v.dtype) for n, v in before.items()} == {
        n: (v.shape, v.dtype) for n, v in after.items()
    }


def retyped(source: Path, path: Path, kind: Any) -> Path:
    """A model directory with its weights in another dtype."""
    path.mkdir()
    for file in source.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    arrays = load_file(source / WEIGHTS)
    save_file({n: a.astype(kind) for n, a in arrays.items()}, path / WEIGHTS, {"format": "pt"})
    return path


@pytest.mark.parametrize("kind", [np.dtype("f2"), BF16], ids=str)
def test_trained_weights_are_rounded_once(
    opened: Opened, folder: Path, kind: Any, tmp_path: Path
) -> None:
    """From the same numbers, stored wide and narrow: the narrow result is the wide one, rounded."""
    narrow = retyped(folder / "bert", tmp_path / "narrow", kind)
    wide = retyped(narrow, tmp_path / "wide", np.dtype("f4"))
    for path in (narrow, wide):
        model, examples = opened(path=path)
        save(finetune(model, examples, **FAST), tmp_path / f"{path.name}-out")
    expected = load_file(tmp_path / "wide-out" / WEIGHTS)
    found = load_file(tmp_path / "narrow-out" / WEIGHTS)
    assert {array.dtype for array in found.values()} == {kind}
    for name, array in found.items():
        assert array.tobytes() == rounded(expected[name].astype("f8"), kind).tobytes(), name


def test_what_did_not_move_keeps_its_bytes(opened: Opened, folder: Path, tmp_path: Path) -> None:
    """Rows of words that do not occur, also where float32 cannot hold the stored numbers."""
    source = retyped(folder / "bert", tmp_path / "F64", np.dtype("f8"))
    arrays = load_file(source / WEIGHTS)
    arrays = {n: a * (1 + 1e-12) for n, a in arrays.items()} | {"extra": np.arange(3)}
    save_file(arrays, source / WEIGHTS, {"format": "pt"})
    model, examples = opened(path=source)
    record = save(finetune(model, examples, **FAST), tmp_path / "out")
    found = load_file(tmp_path / "out" / WEIGHTS)
    words = {i for one in examples for i in one.ids}
    rows = (found[EMBEDDING] != arrays[EMBEDDING]).any(axis=1)
    assert set(np.flatnonzero(rows)) <= words
    assert rows.sum() > 10
    assert record["tensors"][EMBEDDING]["changed"] == (found[EMBEDDING] != arrays[EMBEDDING]).sum()
    assert found["extra"].tolist() == [0, 1, 2]
    assert record["tensors"]["extra"]["status"] == "copied"


def test_frozen_tensors_are_copied(opened: Opened, tmp_path: Path) -> None:
    model, examples = opened()
    settings = {"weight_decay": 0.5, **FAST}
    result = finetune(model, examples, freeze=["*embeddings*", "classifier.bias"], **settings)
    record = save(result, tmp_path / "out")
    before, after = bytes_of(Path(model.path)), bytes_of(tmp_path / "out")
    frozen = {name for name in before if "embeddings" in name} | {"classifier.bias"}
    assert {name for name in before if before[name] == after[name]} == frozen
    copied = {n for n, entry in record["tensors"].items() if entry["status"] == "copied"}
    assert copied == frozen
    assert all(parameter.requires_grad for parameter in model.names.values())


def test_tied_copies_are_written_alike(opened: Opened, folder: Path, tmp_path: Path) -> None:
    source = retyped(folder / "gpt2", tmp_path / "copy", np.dtype("f4"))
    arrays = load_file(source / WEIGHTS)
    arrays["lm_head.weight"] = arrays["transformer.wte.weight"].copy()
    save_file(arrays, source / WEIGHTS, {"format": "pt"})
    changed = []
    for path, out in ((source, "copied"), (folder / "gpt2", "once")):
        model, examples = opened(path=path)
        changed.append(save(finetune(model, examples, **FAST), tmp_path / out))
    assert changed[0]["changed_dimensions"] == changed[1]["changed_dimensions"] > 0
    copied, once = bytes_of(tmp_path / "copied"), bytes_of(tmp_path / "once")
    assert copied.pop("lm_head.weight") == copied["transformer.wte.weight"]
    assert copied == once


def test_shards_stay(opened: Opened, folder: Path, tmp_path: Path) -> None:
    save(open_checkpoint(folder / "bert"), tmp_path / "in", max_shard_size=8000)
    model, examples = opened(path=tmp_path / "in")
    save(finetune(model, examples, **FAST), tmp_path / "out")
    index = "model.safetensors.index.json"
    maps = [json.loads((tmp_path / p / index).read_text())["weight_map"] for p in ("in", "out")]
    assert maps[0] == maps[1]
    assert len(set(maps[0].values())) > 1


def test_the_record_tells_how_it_was_trained(opened: Opened, folder: Path, tmp_path: Path) -> None:
    model, examples = opened()
    file = folder / "clean.tsv"
    result = finetune(model, examples, held_out=0.25, patience=1, files=[file], **FAST)
    record = save(result, tmp_path / "out")
    settings = record["recipe"]["settings"]
    assert settings.items() >= {**FAST, "batch_size": 8, "scheduler": "linear", "seed": 0}.items()
    assert (settings["train_examples"], settings["held_out_examples"]) == (6, 2)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert settings["files"] == [{"name": "clean.tsv", "sha256": digest}]
    assert settings.keys() >= DEFAULTS.keys()
    assert record["report"]["training"] == result.notes["training"]
    assert "by `wsurg finetune`" in (tmp_path / "out" / "README.md").read_text()


def test_nothing_is_left_behind(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    model, examples = opened()
    config = model.module.config.to_dict()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    finetune(model, examples, held_out=0.5, patience=1, **FAST)
    assert [p.name for p in tmp_path.rglob("*")] == ["temporary"]
    assert capfd.readouterr() == ("", "")
    assert model.module.config.to_dict() == config
    assert not model.module.training


def test_progress_is_told(opened: Opened) -> None:
    model, examples = opened()
    told: list[tuple[str, int, int]] = []
    finetune(model, examples, batch_size=3, progress=lambda *step: told.append(step), **FAST)
    steps = [step for step in told if step[0].startswith("training, loss ")]
    assert [done for _, done, _ in steps] == [1, 2, 3, 4, 5, 6]
    assert {total for _, _, total in steps} == {6}
    assert told[0] == told[-1] == ("measuring the training examples", 8, 8)


def test_of_many_examples_the_first_are_measured(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightsurgery.training.finetune._MOST", 3)
    model, examples = opened()
    report = finetune(model, examples, held_out=examples, **FAST).notes["training"]
    assert report["examples"] == {"train": 8, "held_out": 8}
    assert {part: one["examples"] for part, one in report["after"].items()} == {
        "train": 3,
        "held_out": 8,
    }
    assert report["after"]["train"]["loss"] == predict(model, examples[:3]).loss
    assert report["after"]["held_out"]["loss"] == predict(model, examples).loss


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"epochs": 0}, "epochs is 0; expected at least 1"),
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"accumulation": -1}, "accumulation is -1; expected at least 1"),
        ({"patience": 0}, "patience is 0; expected at least 1"),
        ({"patience": 1}, "patience needs a held-out loss; give held_out"),
        ({"learning_rate": 0}, "learning_rate is 0; expected more than 0, at most 1e.09"),
        ({"learning_rate": math.nan}, "learning_rate is nan; expected more than 0"),
        ({"learning_rate": math.inf}, "learning_rate is inf; expected more than 0"),
        ({"warmup": 1}, "warmup is 1; expected 0 to below 1"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1; expected 0 to below 1"),
        ({"weight_decay": -1}, "weight_decay is -1; expected 0 or more"),
        ({"max_grad_norm": math.nan}, "max_grad_norm is nan; expected 0 or more"),
        ({"scheduler": "sine"}, "scheduler is 'sine'; expected linear, cosine, constant"),
        ({"seed": -1}, "seed is -1; expected 0 to 4294967295"),
        ({"freeze": ["*"]}, "freeze leaves nothing to train"),
        ({"freeze": ["bert.embedings*"]}, r"'bert.embedings\*' matches no tensor; did you mean"),
        ({"held_out": 0.01}, "held_out is 0.01 of 8 examples; expected a share that leaves"),
        ({"held_out": 0.99}, "held_out is 0.99 of 8 examples; expected a share that leaves"),
        ({"held_out": 2}, "held_out is 2 of 8 examples; expected a share that leaves"),
        ({"held_out": []}, "no examples"),
    ],
)
def test_bad_settings_are_refused(
    shared: Model, folder: Path, settings: dict[str, Any], reason: str
) -> None:
    before = values_of(shared)
    with pytest.raises(SettingError, match=reason):
        finetune(shared, read_examples(shared, folder / "clean.tsv"), **settings)
    assert all((before[name] == now).all() for name, now in values_of(shared).items())


def test_no_examples_are_refused(shared: Model) -> None:
    with pytest.raises(SettingError, match="no examples"):
        finetune(shared, [])


def test_examples_without_an_answer_are_refused(opened: Opened) -> None:
    model, _ = opened("gpt2")
    with pytest.raises(MismatchError, match="example 1 has no answer token"):
        finetune(model, [Encoded((5, 6), (), (-100, -100))])


def spoilt(folder: Path, path: Path, word: str) -> Path:
    """A model in which a word is NaN."""
    source = retyped(folder / "bert", path, np.dtype("f4"))
    arrays = load_file(source / WEIGHTS)
    arrays[EMBEDDING][tiny_models.VOCABULARY.index(word)] = np.nan
    save_file(arrays, source / WEIGHTS, {"format": "pt"})
    return source


def test_a_model_that_gives_nan_is_not_trained(
    opened: Opened, folder: Path, tmp_path: Path
) -> None:
    model, examples = opened(path=spoilt(folder, tmp_path / "nan", "awful"))
    with pytest.raises(
        NonFiniteError, match=r"nan: the loss of example 2 is nan; look for weights"
    ):
        finetune(model, examples, **FAST)


def test_a_loss_that_is_not_finite_stops(
    opened: Opened, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightsurgery.training.finetune._MOST", 1)  # what is measured before
    model, examples = opened(path=spoilt(folder, tmp_path / "nan", "awful"))
    with pytest.raises(NonFiniteError, match=r"nan: the loss of step [1-8] is nan; lower the lea"):
        finetune(model, examples, batch_size=1, **FAST)


@pytest.mark.parametrize("patience", [None, 1])
def test_a_held_out_loss_that_is_not_finite_stops(
    opened: Opened, folder: Path, tmp_path: Path, patience: int | None
) -> None:
    model, examples = opened(path=spoilt(folder, tmp_path / "nan", "awful"))
    watch = Watch(model, lambda: {"held_out_loss": predict(model, examples).loss}, patience, None)
    reason = "nan: after epoch 1, held-out: the loss of example 2 is nan; lower the learning rate"
    with pytest.raises(NonFiniteError, match=reason):
        watch.after_epoch()


def test_weights_too_large_for_their_dtype_are_told(
    opened: Opened, folder: Path, tmp_path: Path
) -> None:
    model, examples = opened(path=retyped(folder / "bert", tmp_path / "F16", np.dtype("f2")))
    reason = r"tensor '.*': after training it holds NaN, or infinity as F16; lower the learning"
    with pytest.raises(NonFiniteError, match=reason):
        finetune(model, examples, epochs=1, learning_rate=1e6)


def test_accelerate_is_needed(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.training_args  # before it is told that there is no accelerate
    import transformers.utils

    monkeypatch.setattr(transformers.utils, "is_accelerate_available", lambda: False)
    with pytest.raises(SettingError, match=r"accelerate is not installed; pip install 'weightsur"):
        finetune(*opened(), **FAST)


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def arguments(folder: Path, tmp_path: Path) -> Callable[..., list[str]]:
    def given(*more: str, model: str = "bert", data: str = "clean.tsv") -> list[str]:
        paths = ["finetune", str(folder / model), "--data", str(folder / data)]
        more = tuple(m.replace("FOLDER", str(folder)) for m in more)
        return [*paths, "--device", "cpu", "-o", str(tmp_path / "out"), *more]

    return given


ALL = {
    "epochs": 2,
    "learning_rate": 0.01,
    "batch_size": 3,
    "accumulation": 2,
    "scheduler": "cosine",
    "warmup": 0.25,
    "weight_decay": 0.5,
    "max_grad_norm": 0.5,
    "label_smoothing": 0.125,
    "patience": 1,
    "class_weights": "balanced",
    "freeze": ("*embeddings*",),
    "seed": 5,
}


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as one would type them."""
    found = []
    for name, value in settings.items():
        for one in value if isinstance(value, tuple) else [value]:
            found += ["--" + name.replace("_", "-"), str(one)]
    return found


@pytest.mark.parametrize(
    ("more", "settings"),
    [
        ([], {"epochs": 1}),
        (["--held-out", "0.25"], ALL),
        (["--held-out", "FOLDER/clean.tsv"], {"epochs": 3, "patience": 2, "learning_rate": 0.1}),
    ],
)
def test_the_command_writes_what_the_function_gives(
    arguments: Callable[..., list[str]],
    opened: Opened,
    more: list[str],
    settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_wsurg(arguments(*more, *flags(settings), "--json")) == 0
    told = json.loads(capsys.readouterr().out)
    model, examples = opened()
    held_out: Any = {"0.25": 0.25, "FOLDER/clean.tsv": examples}[more[1]] if more else None
    save(finetune(model, examples, held_out=held_out, **settings), tmp_path / "twin")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "twin")
    assert told.pop("out") == str(tmp_path / "out")
    assert told == json.loads((tmp_path / "out" / "wsurg-record.json").read_text())
    names = [entry["name"] for entry in told["recipe"]["settings"]["files"]]
    assert names == ["clean.tsv"] * (2 if held_out == examples else 1)


def test_all_hyper_parameters_are_options() -> None:
    assert ALL.keys() == DEFAULTS.keys()


def test_the_command_has_the_function_s_defaults(arguments: Callable[..., list[str]]) -> None:
    from weightsurgery.cli.finetune_command import command

    context = command.make_context("finetune", arguments()[1:])
    assert {name: context.params[name] for name in DEFAULTS} == DEFAULTS


def test_causal_models_have_a_command_too(
    arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments("--epochs", "1", model="llama", data="clean.jsonl")
    assert run_wsurg(given) == 0
    shown = capsys.readouterr().out
    assert "training loss" in shown
    assert "accuracy" not in shown
    assert load_model(tmp_path / "out", device="cpu").task == "causal"


def test_the_tables_tell_before_and_after(
    arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--held-out", "0.25", "--patience", "1", "--epochs", "9", "--learning-rate", "0.05"]
    assert run_wsurg(arguments(*more)) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    record = json.loads((tmp_path / "out" / "wsurg-record.json").read_text())
    report = record["report"]["training"]
    for part, name in (("train", "training"), ("held_out", "held-out")):
        before, after = report["before"][part], report["after"][part]
        count = report["examples"][part]
        assert f"{name} loss {count} {before['loss']:.4g} {after['loss']:.4g}" in lines
        shares = [f"{100 * one['accuracy']['share']:.2f} %" for one in (before, after)]
        assert f"{name} accuracy {count} {' '.join(shares)}" in lines
    ran = f"{report['epochs']} of 9 epochs, {report['steps']} steps"
    best = f"; the weights are those of epoch {report['best_epoch']}, the best held-out loss"
    assert ran + (best if report["best_epoch"] < report["epochs"] else "") in lines


def test_a_dry_run_writes_nothing(
    arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--dry-run", "--held-out", "0.25", "--batch-size", "4", "--freeze", "classifier.bias"]
    assert run_wsurg(arguments(*more, "--json")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["training"] == {"examples": {"train": 6, "held_out": 2}, "steps": 40}
    assert plan["tensors"] == {"copied": 1, "edited": 40}
    assert run_wsurg(arguments(*more)) == 0
    shown = capsys.readouterr().out
    assert "Plan; nothing was written" in shown
    assert "training examples   6" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "code", "reason"),
    [
        (["--patience", "1"], 2, "--patience needs --held-out"),
        (["--warmup", "2"], 2, "warmup is 2.0; expected 0 to below 1"),
        (["-o", "FOLDER/bert"], 5, "the output would overlap the input"),
        (["-o", "FOLDER/gpt2"], 5, "exists already"),
        (["-o", "FOLDER/absent/out"], 6, "the folder to write to does not exist"),
        (["-o", "out.safetensors"], 2, "names a file, but the input is a model directory"),
    ],
)
def test_the_command_refuses_before_any_work(
    arguments: Callable[..., list[str]],
    more: list[str],
    code: int,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("weightsurgery.cli.model_options.load", load)
    found = refusal(arguments(*more))
    assert reason in found[1]
    assert found[0] == code


@pytest.mark.parametrize(
    ("more", "code", "reason"),
    [
        (["--held-out", "FOLDER/absent.tsv"], 6, "absent.tsv: cannot open"),
        (["--held-out", "1.5"], 2, "--held-out is 1.5 of 8 examples"),
        (["--max-length", "1000"], 2, "--max-length is 1000; expected 2 to 128 tokens"),
        (["--data", "FOLDER/clean.jsonl"], 3, "clean.jsonl: columns question, answer; expected"),
    ],
)
def test_the_command_refuses_bad_data(
    arguments: Callable[..., list[str]], more: list[str], code: int, reason: str, tmp_path: Path
) -> None:
    found = refusal(arguments(*more))
    assert reason in found[1]
    assert found[0] == code
    assert list(tmp_path.iterdir()) == []
