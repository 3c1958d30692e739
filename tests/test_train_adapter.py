"""Training adapters against a plain loop of torch; going on after an interruption; refusals."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import cases, tiny_models
from tests.test_docs import run_json, run_wsurg
from tests.test_evaluation import refusal
from weightsurgery import apply_adapter, interpolate, open_checkpoint, save
from weightsurgery.datasets.batches import IGNORED, batches, encode_instructions
from weightsurgery.datasets.read import Instruction, read_instructions
from weightsurgery.errors import (
    BusyError,
    MismatchError,
    NonFiniteError,
    PolicyError,
    SettingError,
)
from weightsurgery.models import Model, load_model, with_weights
from weightsurgery.training.adapter import encode, train_adapter
from weightsurgery.training.checkpoints import Resumable
from weightsurgery.training.lora import PRESETS, LoraSettings, lora_settings

WEIGHTS = "adapter_model.safetensors"
FAST: dict[str, Any] = {"epochs": 3, "learning_rate": 1e-2, "batch_size": 2, "rank": 2}
TEMPLATE = "{% for m in messages %}[SEP] {{ m.content }} {% endfor %}[CLS] "


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama/, gpt2/, bert/ and questions.jsonl."""
    root = tmp_path_factory.mktemp("train-adapter")
    tiny_models.llama(root / "llama")
    tiny_models.gpt2(root / "gpt2")
    tiny_models.bert(root / "bert")
    tiny_models.write_questions(root / "questions.jsonl")
    return root


@pytest.fixture
def llama(folder: Path) -> Model:
    """A fresh one."""
    return load_model(folder / "llama", device="cpu")


@pytest.fixture
def questions(folder: Path) -> list[Instruction]:
    """All five."""
    return read_instructions(folder / "questions.jsonl")


def arrays(adapter: Any) -> dict[str, np.ndarray]:
    """An adapter's tensors, whole."""
    return {
        name: np.concatenate([view.read(*block) for block in view.blocks()]).reshape(view.shape)
        for name, view in adapter.items()
    }


# --- the text ---------------------------------------------------------------------------------


def words(model: Model, ids: tuple[int, ...]) -> list[str]:
    return [tiny_models.VOCABULARY[i] for i in ids]


def test_formats_join_question_and_answer(llama: Model) -> None:
    one = [Instruction((("user", "who are"),), "great actor", 1)]
    raw, lines = (encode_instructions(llama, one, prompt_format=how)[0] for how in ("raw", "lines"))
    assert words(llama, raw.ids) == ["who", "are", "great", "actor", "[EOS]"]
    assert raw.ids == lines.ids  # this tokenizer does not see a line feed
    llama.tokenizer.chat_template = TEMPLATE
    chat, auto = (encode_instructions(llama, one, prompt_format=how)[0] for how in ("chat", "auto"))
    assert words(llama, chat.ids)[:4] == ["[SEP]", "who", "are", "[CLS]"]
    assert chat == auto


def test_the_loss_is_on_the_answer_or_on_all(llama: Model) -> None:
    one = [Instruction((("user", "who are"),), "great actor", 1)]
    answer, everything = (
        encode_instructions(llama, one, loss_on=where)[0] for where in ("answer", "all")
    )
    assert answer.labels == (IGNORED, IGNORED, *answer.ids[2:])
    assert everything.labels == (IGNORED, *everything.ids[1:])  # nothing predicts the first


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_question": 2}, "c d x y [EOS]"),
        ({"max_answer": 1}, "a b c d x"),
        ({"max_question": 1, "max_answer": 2}, "d x y"),
        ({"max_length": 5}, "c d x y [EOS]"),
        ({"max_length": 2}, "d x"),
        ({"max_length": 5, "max_answer": 2}, "b c d x y"),
    ],
)
def test_long_texts_are_cut(llama: Model, limits: dict[str, int], expected: str) -> None:
    """Letters stand for words of the vocabulary."""
    letters = dict(zip("abcdxy", tiny_models.WORDS, strict=False))
    question, answer = (" ".join(letters[c] for c in text) for text in ("abcd", "xy"))
    one = encode_instructions(llama, [Instruction((("user", question),), answer, 1)], **limits)[0]
    back = {word: letter for letter, word in letters.items()}
    assert " ".join(back.get(w, w) for w in words(llama, one.ids)) == expected


# --- the training -----------------------------------------------------------------------------


@pytest.mark.parametrize("loss_on", ["answer", "all"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_training_is_that_of_a_plain_loop(
    folder: Path, questions: list[Instruction], kind: str, loss_on: str
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from torch.nn.functional import cross_entropy

    steps, rate, targets = 4, 1e-2, {"llama": "q_proj", "gpt2": "c_attn"}[kind]
    settings = lora_settings(epochs=steps, learning_rate=rate, batch_size=8, rank=2, alpha=6,
                             scheduler="constant", dropout=0.0, targets=(targets,),
                             loss_on=loss_on, max_grad_norm=0.0)  # fmt: skip
    model = load_model(folder / kind, device="cpu")
    found = train_adapter(model, questions, settings)

    inputs, labels = next(batches(model, encode(model, questions, settings), 8))
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        plain = get_peft_model(
            load_model(folder / kind, device="cpu").module.eval(),
            LoraConfig(r=2, lora_alpha=6, target_modules=[targets], task_type="CAUSAL_LM"),
        )
    for module in plain.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    optimiser = torch.optim.AdamW(
        [p for p in plain.parameters() if p.requires_grad], lr=rate, weight_decay=0.0
    )
    losses = []
    for _ in range(steps):
        logits = plain(**inputs).logits[:, :-1].flatten(0, 1)
        loss = cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    expected = get_peft_model_state_dict(plain)
    assert found.keys() == expected.keys()
    rows = arrays(found)
    if kind == "llama":  # GPT-2's own dropout is on in training
        assert [entry["train_loss"] for entry in found.notes["training"]["history"]] == (
            pytest.approx(losses, rel=1e-4)
        )
        for name, tensor in expected.items():
            np.testing.assert_allclose(rows[name], tensor.detach(), rtol=2e-3, atol=2e-5)
    assert all(rows[name].any() for name in rows)


def test_the_model_is_as_it_was(llama: Model, questions: list[Instruction]) -> None:
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in llama.module.named_parameters()}
    train_adapter(llama, questions, lora_settings(**FAST))
    after = dict(llama.module.named_parameters())
    assert list(after) == list(before)
    for name, (values, wanted) in before.items():
        assert after[name].requires_grad == wanted
        assert after[name].equal(values)
    assert not llama.module.training


def test_peft_loads_the_adapter(folder: Path, tmp_path: Path, questions: list[Instruction]) -> None:
    import torch
    from peft import PeftModel

    model = load_model(folder / "llama", device="cpu")
    adapter = train_adapter(model, questions, lora_settings(**FAST))
    save(adapter, tmp_path / "adapter")
    base = open_checkpoint(folder / "llama")
    save(apply_adapter(base, open_checkpoint(tmp_path / "adapter")), tmp_path / "merged")
    ids = torch.tensor([[5, 6, 7, 8]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(model.module, tmp_path / "adapter").eval()
    with torch.no_grad():
        ours = load_model(tmp_path / "merged", device="cpu").module(ids).logits
        torch.testing.assert_close(ours, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_same_seed_same_adapter(folder: Path, questions: list[Instruction]) -> None:
    made = [
        arrays(
            train_adapter(
                load_model(folder / "llama", device="cpu"),
                questions,
                lora_settings(**FAST, seed=seed),
            )
        )
        for seed in (0, 0, 1)
    ]
    assert all((made[0][name] == made[1][name]).all() for name in made[0])
    assert any((made[0][name] != made[2][name]).any() for name in made[0])


def test_bfloat16_is_near_float32(folder: Path, questions: list[Instruction]) -> None:
    losses = []
    for precision in ("float32", "bfloat16"):
        model = load_model(folder / "llama", device="cpu")
        adapter = train_adapter(model, questions, lora_settings(**FAST, precision=precision))
        assert {view.dtype.name for view in adapter.values()} == {"F32"}
        losses.append([entry["train_loss"] for entry in adapter.notes["training"]["history"]])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


class Interrupted(Exception):
    """What a test stops a training with."""


def test_an_interrupted_training_goes_on(
    folder: Path, tmp_path: Path, questions: list[Instruction]
) -> None:
    settings = lora_settings(**FAST)  # three steps in each of three epochs

    def stop(what: str, done: int, total: int) -> None:
        del what, total
        if done == 6:
            raise Interrupted

    whole = train_adapter(load_model(folder / "llama", device="cpu"), questions, settings)
    saving: dict[str, Any] = {"checkpoints": tmp_path / "run", "save_every": 2}
    model = load_model(folder / "llama", device="cpu")
    with pytest.raises(Interrupted):
        train_adapter(model, questions, settings, **saving, progress=stop)
    (tmp_path / "run" / "checkpoint-8").mkdir()  # as if killed while this one was written
    steps: list[int] = []
    model = load_model(folder / "llama", device="cpu")
    resumed = train_adapter(model, questions, settings, **saving,
                            progress=lambda _what, done, _total: steps.append(done))  # fmt: skip
    assert steps[0] > 1
    assert resumed.notes == whole.notes
    first, second = arrays(whole), arrays(resumed)
    assert all((first[name] == second[name]).all() for name in first)


def test_only_the_same_training_goes_on(
    folder: Path, tmp_path: Path, questions: list[Instruction]
) -> None:
    model = load_model(folder / "llama", device="cpu")
    where = tmp_path / "run"
    train_adapter(model, questions, lora_settings(**FAST), checkpoints=where)
    with pytest.raises(PolicyError, match=r"run: .*another training, which differs in rank"):
        train_adapter(model, questions, lora_settings(**{**FAST, "rank": 3}), checkpoints=where)
    with pytest.raises(PolicyError, match="differs in examples_sha256"):
        train_adapter(model, questions[:3], lora_settings(**FAST), checkpoints=where)
    (where / "wsurg-training.json").write_text("{", "utf-8")
    with pytest.raises(PolicyError, match="is damaged"):
        train_adapter(model, questions, lora_settings(**FAST), checkpoints=where)
    (where / "wsurg-training.json").unlink()
    with pytest.raises(PolicyError, match="not empty and no training's"):
        train_adapter(model, questions, lora_settings(**FAST), checkpoints=where)


def test_other_weights_are_another_training(
    folder: Path, tmp_path: Path, questions: list[Instruction]
) -> None:
    model = load_model(folder / "llama", device="cpu")
    train_adapter(model, questions, lora_settings(**FAST), checkpoints=tmp_path / "run")
    half = interpolate(
        model.checkpoint, open_checkpoint(tiny_models.llama(tmp_path / "other", seed=1)), weight=0.5
    )
    with pytest.raises(PolicyError, match="differs in model"):
        train_adapter(with_weights(model, half), questions, lora_settings(**FAST),
                      checkpoints=tmp_path / "run")  # fmt: skip


@pytest.mark.parametrize("name", ["optimizer.pt", "adapter_model.safetensors", "more.bin"])
def test_a_damaged_checkpoint_is_passed_over(
    folder: Path, tmp_path: Path, questions: list[Instruction], name: str
) -> None:
    model = load_model(folder / "llama", device="cpu")
    saving: dict[str, Any] = {"checkpoints": tmp_path / "run", "save_every": 4}
    whole = train_adapter(model, questions, lora_settings(**FAST), **saving)
    last = tmp_path / "run" / "checkpoint-9"
    (last / name).write_bytes(b"")
    steps: list[int] = []
    again = train_adapter(model, questions, lora_settings(**FAST), **saving,
                          progress=lambda _what, done, _all: steps.append(done))  # fmt: skip
    assert steps == [9]  # from checkpoint-8
    first, second = arrays(whole), arrays(again)
    assert all((first[one] == second[one]).all() for one in first)


# --- settings ---------------------------------------------------------------------------------


def test_presets_are_the_released_settings() -> None:
    erase, recover = PRESETS["meraser-erase"], PRESETS["meraser-recover"]
    assert (erase.rank, erase.alpha, erase.dropout, erase.targets) == (
        *(8, 16, 0.05),
        ("query-value",),
    )
    assert (erase.learning_rate, erase.scheduler, erase.epochs, erase.batch_size) == (
        *(5e-4, "constant"),
        *(5, 8),
    )
    assert (erase.max_grad_norm, erase.prompt_format, erase.loss_on) == (0.5, "raw", "all")
    assert erase.steps(300) == 190
    assert (recover.rank, recover.alpha, recover.learning_rate, recover.scheduler) == (
        *(16, 32, 5e-4),
        "cosine",
    )
    assert (recover.epochs, recover.batch_size, recover.prompt_format) == (2, 36, "lines")
    assert {one.max_question + one.max_answer for one in (erase, recover)} == {512}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rank": 0}, "rank is 0; expected at least 1"),
        ({"max_question": 0}, "max_question is 0"),
        ({"max_answer": 0}, "max_answer is 0"),
        ({"alpha": 0.0}, "alpha is 0.0; expected more than 0"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"dropout": 1.0}, "dropout is 1.0; expected 0 to below 1"),
        ({"targets": ()}, "no names of layers to target; expected at least one, or all-linear"),
        ({"targets": ("",)}, "no names of layers to target"),
        ({"targets": ("all-linear", "q_proj")}, "no names of layers to target"),
        ({"targets": ("query-value", "all-linear")}, "no names of layers to target"),
        ({"prompt_format": "x"}, "prompt_format is 'x'; expected auto, chat, raw, lines"),
        ({"loss_on": "x"}, "loss_on is 'x'; expected answer, all"),
        ({"precision": "x"}, "precision is 'x'; expected float32, bfloat16"),
        ({"epochs": 0}, "epochs is 0"),
        ({"ranks": 3}, "there is no setting ranks"),
    ],
)
def test_settings_are_checked(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        lora_settings(**setting)


def test_presets_are_changed_by_settings() -> None:
    with pytest.raises(SettingError, match="no preset 'x'; expected meraser-erase, meraser-rec"):
        lora_settings("x")
    assert lora_settings("meraser-erase", epochs=1) == replace(PRESETS["meraser-erase"], epochs=1)
    assert lora_settings() == LoraSettings()
    assert lora_settings(targets=["all-linear"]) == LoraSettings()


# --- refusals ---------------------------------------------------------------------------------


def test_what_cannot_be_trained_is_refused(
    folder: Path, llama: Model, questions: list[Instruction]
) -> None:
    with pytest.raises(MismatchError, match="a classifier; expected a causal"):
        train_adapter(load_model(folder / "bert", device="cpu"), questions)
    for targets, kind in (
        (
            ("q_proj", "nothing"),
            r"'nothing' is none of the model's layers; expected linear layers \(q_proj, k_proj, v_",
        ),
        (("q_proj", "mlp"), "'mlp' is a LlamaMLP, not a linear layer; expected linear layers"),
    ):
        with pytest.raises(SettingError, match=f"^target {kind}"):
            train_adapter(llama, questions, lora_settings(targets=targets))
    assert not any("lora" in name for name, _ in llama.module.named_parameters())
    inside = folder / "llama" / "run"
    with pytest.raises(PolicyError, match="run"):
        train_adapter(llama, questions, lora_settings(**FAST), checkpoints=inside)
    assert not inside.exists()
    with pytest.raises(SettingError, match="no examples"):
        train_adapter(llama, [])
    with pytest.raises(MismatchError, match="no chat template"):
        train_adapter(llama, questions, lora_settings(**FAST, prompt_format="chat"))


def test_an_adapter_that_could_not_be_folded_in_is_not_trained(
    folder: Path, questions: list[Instruction]
) -> None:
    """GPT-2's head is its word embedding."""
    model = load_model(folder / "gpt2", device="cpu")
    with pytest.raises((PolicyError, MismatchError), match=r"tie|lm_head"):
        train_adapter(model, questions, lora_settings(**FAST, targets=("lm_head",)))


def test_a_loss_that_is_no_number_is_an_error(llama: Model, questions: list[Instruction]) -> None:
    next(llama.module.parameters()).data.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="the loss of step 1 is nan; lower the learning rate"):
        train_adapter(llama, questions, lora_settings(**FAST))


# --- the command ------------------------------------------------------------------------------


def test_the_command(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["train-adapter", str(folder / "llama"), "--data", str(folder / "questions.jsonl")]
    record = run_json(capsys, *given, "--preset", "meraser-erase", "--epochs", "2", "-o", "a")
    settings = record["recipe"]["settings"]
    assert record["recipe"]["operator"] == "train-adapter"
    assert (settings["learning_rate"], settings["rank"], settings["epochs"]) == (5e-4, 8, 2)
    assert settings["files"][0]["name"] == "questions.jsonl"
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == "llama"
    assert str(folder) not in (tmp_path / "a" / "adapter_config.json").read_text("utf-8")
    assert len(load_file(tmp_path / "a" / WEIGHTS)) == 8
    code, message = refusal([*given, "--target", "nothing", "-o", "b"])
    assert code == 2
    assert message.startswith("target 'nothing' is none of the model's layers")
    assert not (tmp_path / "b").exists()
    code, message = refusal([*given, "-o", "a"])
    assert code == 5
    assert "--overwrite" in message
    assert run_wsurg([*given, "--epochs", "1", "-o", "a", "--overwrite"]) == 0
    assert "mean loss" in capsys.readouterr().out


def test_only_one_training_at_a_time_uses_a_folder_of_checkpoints(
    folder: Path, tmp_path: Path
) -> None:
    first = Resumable(str(tmp_path / "kept"), 5, {"model": "one"})
    busy = pytest.raises(BusyError, match="another run is writing")
    with first.prepared(), busy, first.prepared():
        pass
    with first.prepared():  # free again
        pass


def test_an_adapters_folder_is_no_weights_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "the film", "answer": "good"}\n')
    given = ("train-adapter", folder / "llama", "--data", data)
    assert cases.wsurg(*given, "-o", tmp_path / "x.safetensors") == 2
    told = capsys.readouterr().err
    assert "an adapter is a folder" in told
    assert "training" not in told


def test_defaults_stand_in_the_help_as_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_wsurg(["train-adapter", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "[default: 16; x>=1]" in told
    assert "[default: 0.05]" in told
    assert "[default: (" not in told
