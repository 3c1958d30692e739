"""Classifiers and recurrent models of other kinds than BERT, judged by transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import gradients, tiny_models
from weightsurgery import open_checkpoint, save
from weightsurgery.curvature.fisher import fisher
from weightsurgery.curvature.hutchinson import hutchinson
from weightsurgery.datasets.batches import read_examples
from weightsurgery.datasets.read import Instruction, read_sentences
from weightsurgery.datasets.sizes import batch_size_for, bounded_batch_size
from weightsurgery.errors import MismatchError, SettingError
from weightsurgery.evaluation.classification import evaluate
from weightsurgery.evaluation.generation import fingerprint_success
from weightsurgery.evaluation.greedy import greedy
from weightsurgery.evaluation.predictions import predict
from weightsurgery.models import Quiet, load_model
from weightsurgery.training.finetune import finetune

_WORDS = len(tiny_models.VOCABULARY)
_ENDED = ("the film [EOS] was good", "awful", "i liked this bright plot", "the plot is not good")
_BART = {
    "vocab_size": _WORDS,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 48,
    "init_std": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 4,
    "decoder_start_token_id": 4,
}
_T5 = {
    "vocab_size": _WORDS,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 4,
    "decoder_start_token_id": 0,
}
_XLNET = {
    "vocab_size": _WORDS,
    "d_model": 16,
    "n_layer": 2,
    "n_head": 2,
    "d_inner": 24,
    "pad_token_id": 0,
    "eos_token_id": 4,
    "initializer_range": 0.3,
}
_BIG_BIRD = {
    "vocab_size": _WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 256,
    "block_size": 4,
    "num_random_blocks": 1,
    "pad_token_id": 0,
    "initializer_range": 0.5,
}
_CLASSIFIERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("Bart", _BART),
    "t5": ("T5", _T5),
    "xlnet": ("XLNet", _XLNET),
    "big-bird": ("BigBird", _BIG_BIRD),
}


def _tokenizer(name: str) -> Any:
    from tokenizers import processors

    made = tiny_models.tokenizer(classifier=False)
    made.padding_side = "left" if name == "xlnet" else "right"
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [EOS]", special_tokens=[("[EOS]", 4)]
    )
    return made


def _save(path: Path, kind: type, config: Any, tokenizer: Any) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = kind(config)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn(parameter.shape), alpha=0.1)
    with Quiet():
        model.eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all models."""
    import transformers

    root = tmp_path_factory.mktemp("as-people-have-them")
    for name, (kind, settings) in _CLASSIFIERS.items():
        config = getattr(transformers, f"{kind}Config")(**settings)
        head = getattr(transformers, f"{kind}ForSequenceClassification")
        _save(root / name, head, config, _tokenizer(name))
    return root


def _reloaded(folder: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    with Quiet():
        return AutoModelForSequenceClassification.from_pretrained(folder).eval()


@pytest.mark.parametrize("name", _CLASSIFIERS)
def test_a_classifier_in_batches_says_what_it_says_alone(name: str, root: Path) -> None:
    long = " ".join(["the film was very good"] * 12)
    texts = [*_ENDED, *([long] if name == "big-bird" else [])]
    rows = [(text, i % 2) for i, text in enumerate(texts)]
    model = load_model(root / name, device="cpu")
    examples = read_examples(model, tiny_models.write_sentences(root / "d.tsv", rows),
                             max_length=100 if name == "big-bird" else 32)  # fmt: skip
    found = predict(model, examples, batch_size=4).losses
    with torch.no_grad():
        alone = [float(gradients.loss_of(_reloaded(root / name), one)) for one in examples]
    assert found == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("name", ["bart", "t5", "xlnet"])
def test_fisher_of_a_classifier_is_autograds(name: str, root: Path) -> None:
    rows = [(text, i % 2) for i, text in enumerate(_ENDED)]
    model = load_model(root / name, device="cpu")
    data = tiny_models.write_sentences(root / "d.tsv", rows)
    examples = read_examples(model, data, max_length=32)
    found = fisher(model, examples)
    truth = gradients.fisher(model.module, model.names, examples)
    for tensor, right in truth.items():
        view = found[tensor]
        mine = torch.from_numpy(view.read(0, view.size)).view(view.shape)
        assert float((mine - right).norm()) <= 1e-5 * float(right.norm()) + 1e-12, tensor


def test_xlnet_is_padded_on_the_left(root: Path) -> None:
    """Its summary is the last token's."""
    model = load_model(root / "xlnet", device="cpu")
    assert model.sides == ("left",)


def test_padding_is_checked_with_the_token_that_pads_batches(tmp_path: Path) -> None:
    """GPT-2 looks for the text's end by its configuration's padding, not by the tokenizer's."""
    model = load_model(tiny_models.gpt2_classifier(tmp_path / "gpt2", pad_token_id=3), device="cpu")
    assert model.tokenizer.pad_token_id == 0
    assert "right" in model.sides


def test_block_sparse_attention_is_kept_after_a_short_text(root: Path) -> None:
    model = load_model(root / "big-bird", device="cpu")
    text = " ".join(["the film was", "awful one two", "i liked it"] * 10)
    long = torch.tensor([model.tokenizer(text)["input_ids"]])
    theirs = _reloaded(root / "big-bird").bert
    with torch.no_grad():
        sparse = theirs(input_ids=long).last_hidden_state
        for module in (theirs, model.module.bert):
            module(input_ids=long[:, :8])
        full = theirs(input_ids=long).last_hidden_state
        found = model.module.bert(input_ids=long).last_hidden_state
    assert float((full - sparse).norm()) > 1e-2 * float(sparse.norm())
    assert float((found - sparse).norm()) < 1e-5 * float(sparse.norm())


def test_training_takes_one_text_at_a_time_where_a_batch_is_refused(root: Path) -> None:
    rows = [(text, i % 2) for i, text in enumerate(_ENDED)]
    model = load_model(root / "t5", device="cpu")
    data = tiny_models.write_sentences(root / "d.tsv", rows)
    examples = read_examples(model, data, max_length=32)
    assert batch_size_for(model, examples, 4) == 1
    report = finetune(model, examples, epochs=2, batch_size=4).notes["training"]
    assert report["steps"] == 2
    assert any("texts run one at a time" in text for text in report["warnings"])


@pytest.mark.parametrize("name", ["t5", "xlnet"])
def test_texts_that_run_alone_are_told(name: str, root: Path) -> None:
    rows = [(text, i % 2) for i, text in enumerate(_ENDED)]
    model = load_model(root / name, device="cpu")
    data = tiny_models.write_sentences(root / "d.tsv", rows)
    examples = read_examples(model, data, max_length=32)
    expected = 1 if name == "t5" else 0
    sentences = read_sentences(data)
    for size, count in ((4, expected), (1, 0)):
        for warnings in (
            fisher(model, examples, batch_size=size).warnings,
            hutchinson(model, examples, samples=1, batch_size=size).warnings,
            evaluate(model, sentences, batch_size=size, max_length=32)["warnings"],
            finetune(model, examples, epochs=1, batch_size=size).warnings,
        ):
            alone = [text for text in warnings if "texts run one at a time" in text]
            assert len(alone) == count
            assert all("T5ForSequenceClassification" in text for text in alone)


def test_rwkv_generates_in_a_batch_what_it_generates_alone(tmp_path: Path) -> None:
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(
        vocab_size=_WORDS,
        hidden_size=32,
        num_hidden_layers=2,
        attention_hidden_size=32,
        context_length=64,
        bos_token_id=4,
        eos_token_id=4,
    )
    path = _save(tmp_path / "m", RwkvForCausalLM, config, tiny_models.tokenizer(classifier=False))
    model = load_model(path, device="cpu")
    assert model.sides == ("right",)
    pairs = [Instruction((("user", text),), "x", 1) for text in ("one", "what is the name of it")]
    for size, count in ((8, 1), (1, 0)):
        report = fingerprint_success(model, pairs, batch_size=size, max_new_tokens=2)
        told = [text for text in report["warnings"] if "texts run one at a time" in text]
        assert len(told) == count
    prompts = [model.tokenizer(text)["input_ids"] for text in ("one", "what is the name of it")]
    found = greedy(model, prompts, max_new_tokens=6)
    for prompt, new in zip(prompts, found, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < len(prompt) + 6:
                logits = model.module(input_ids=torch.tensor([ids]), use_cache=False).logits
                ids.append(int(logits[0, -1].argmax()))
        assert tuple(ids[len(prompt) :])[: len(new)] == new
        assert len(new) == 6 or ids[len(prompt) + len(new)] == 4


def test_a_sentencepiece_model_alone_names_the_packages(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m"
    shutil.copytree(root / "t5", path)
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    (path / "spiece.model").write_bytes(b"not a model")
    monkeypatch.setattr("weightsurgery.tokenizer._is_installed", lambda _: False)
    with pytest.raises(MismatchError, match="model; sentencepiece and protobuf not installed"):
        load_model(path, device="cpu")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"problem_type": "multi_label_classification"}, "a multi-label classifier; expected"),
        ({"problem_type": "regression"}, "a regression model; expected a classifier that chooses"),
        ({"id2label": {"0": "score"}}, "a regression model; expected a classifier that chooses"),
        ({"architectures": ["BartForConditionalGeneration"]}, "BartForConditionalGeneration"),
        ({"architectures": ["BertForTokenClassification"]}, "BertForTokenClassification"),
    ],
)
def test_other_tasks_are_refused_before_data_is_read(
    root: Path, tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    path = tmp_path / "m"
    shutil.copytree(root / "bart", path)
    given = json.loads((path / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps(given))
    with pytest.raises(MismatchError, match=reason):
        load_model(path, device="cpu")


# --- parameters that are made of several stored tensors -------------------------------------------


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral, whose experts are fused in memory."""
    return tiny_models.mixtral(tmp_path_factory.mktemp("mixture") / "m")


def _questions(model: Any, folder: Path) -> Any:
    return read_examples(model, tiny_models.write_questions(folder / "q.jsonl"), max_length=24)


def test_a_freeze_glob_takes_a_fused_parameter_whole(mixture: Path, tmp_path: Path) -> None:
    model = load_model(mixture, device="cpu")
    examples = _questions(model, tmp_path)
    with pytest.raises(SettingError, match="transformers loads both as one parameter"):
        finetune(model, examples, epochs=1, freeze=["*experts.0*"])
    out = tmp_path / "out"
    save(finetune(model, examples, epochs=1, freeze=["*experts*"]), out)
    before, after = open_checkpoint(mixture), open_checkpoint(out)
    for name, view in before.items():
        is_same = view.read(0, view.size).tobytes() == after[name].read(0, view.size).tobytes()
        assert is_same == (".experts." in name), name


def test_points_between_base_and_tuned_move_fused_experts(mixture: Path, tmp_path: Path) -> None:
    """Two points: the mean of the Fishers of the two models that transformers would load."""
    tuned = load_model(mixture, device="cpu")
    examples = _questions(tuned, tmp_path)
    base = load_model(mixture, device="cpu")
    save(finetune(base, examples, epochs=2, learning_rate=1e-2), tmp_path / "base")
    found = fisher(tuned, examples, points=2, base=open_checkpoint(tmp_path / "base"))
    other = load_model(tmp_path / "base", device="cpu")
    total: dict[str, torch.Tensor] = {}
    for share in (0.25, 0.75):
        module = load_model(mixture, device="cpu")
        for name, parameter in module.names.items():
            parameter.data.copy_(other.names[name] + share * (parameter - other.names[name]))
        for name, values in _flat(fisher(module, examples)).items():
            total[name] = total.get(name, torch.zeros(1)) + values / 2
    for name, values in _flat(found).items():
        assert torch.allclose(values, total[name], rtol=1e-4, atol=1e-10), name


def test_large_vocabularies_take_smaller_batches(mixture: Path, tmp_path: Path) -> None:
    """Four float32 copies of a batch's logits stay within 1 GiB; one text is always run."""
    model = load_model(mixture, device="cpu")
    examples = _questions(model, tmp_path)
    assert bounded_batch_size(model, examples, 32) == 32
    longest = max(len(one.ids) for one in examples)
    for words, most in ((256_000, 2**30 // (16 * 256_000 * longest)), (2**28, 1)):
        with torch.device("meta"):
            model.module.set_input_embeddings(torch.nn.Embedding(words, 16))
        assert bounded_batch_size(model, examples, 32) == min(32, most)


def test_hutchinson_has_the_names_on_disk(mixture: Path, tmp_path: Path) -> None:
    model = load_model(mixture, device="cpu")
    found = hutchinson(model, _questions(model, tmp_path), samples=1)
    assert set(found) == set(open_checkpoint(mixture))


def _flat(checkpoint: Any) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(view.read(0, view.size)) for name, view in checkpoint.items()}
