"""Batches: what pads them must not show, and no example is longer than the model takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny_models
from weightsurgery.curvature.fisher import fisher
from weightsurgery.datasets.batches import encode_instructions, encode_sentences, read_examples
from weightsurgery.datasets.read import Instruction, Sentence
from weightsurgery.errors import MismatchError, SettingError
from weightsurgery.evaluation.predictions import predict
from weightsurgery.models import load_model


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.gpt2_classifier(tmp_path_factory.mktemp("batches") / "gpt2")


def with_padding(path: Path, target: Path, *, config: int | None, tokenizer: str | None) -> Path:
    """A copy whose configuration and tokenizer name these padding tokens."""
    target.mkdir()
    for file in path.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    for name, key, value in (
        ("config.json", "pad_token_id", config),
        ("tokenizer_config.json", "pad_token", tokenizer),
    ):
        given: dict[str, Any] = json.loads((target / name).read_text())
        (target / name).write_text(json.dumps(given | {key: value}))
    return target


@pytest.mark.parametrize(
    ("config", "tokenizer"),
    [
        (0, "[PAD]"),
        (0, None),
        (0, "[EOS]"),
        (None, "[PAD]"),
        (-1, "[PAD]"),
        (10**6, "[PAD]"),
        (None, "[EOS]"),
    ],
)
def test_padding_does_not_show(
    classifier: Path, tmp_path: Path, config: int | None, tokenizer: str | None
) -> None:
    """GPT-2 judges by the last token that is not the configuration's padding."""
    path = with_padding(classifier, tmp_path / "made", config=config, tokenizer=tokenizer)
    data = tiny_models.write_sentences(tmp_path / "data.tsv")
    model, plain = load_model(path, device="cpu"), load_model(classifier, device="cpu")
    examples = read_examples(model, data)
    assert len({len(one.ids) for one in examples}) > 2
    alone = predict(plain, examples, batch_size=1)
    assert np.ptp(alone.losses) > 0.1
    for batch_size in (1, 2, 6):
        found = predict(model, examples, batch_size=batch_size)
        assert found.losses == pytest.approx(alone.losses, rel=1e-5)
    single, batched = fisher(plain, examples, batch_size=1), fisher(model, examples, batch_size=6)
    for name, view in single.items():
        before, after = view.read(0, view.size), batched[name].read(0, view.size)
        assert np.linalg.norm(after - before) <= 1e-4 * np.linalg.norm(before) + 1e-12, name


@pytest.mark.parametrize("config", [None, -1, 10**6])
def test_a_classifier_without_padding_is_refused(
    classifier: Path, tmp_path: Path, config: int | None
) -> None:
    path = with_padding(classifier, tmp_path / "made", config=config, tokenizer=None)
    with pytest.raises(MismatchError, match=r"made: no padding token; .* as pad_token_id") as told:
        load_model(path, device="cpu")
    assert told.value.exit_code == 4


@pytest.mark.parametrize(("padding", "most"), [(0, 17), (1, 16)])
def test_the_longest_example_can_be_computed(padding: int, most: int, tmp_path: Path) -> None:
    """RoBERTa's 18 positions are those of padding, of what is before it, and of a text."""
    path = tiny_models.roberta(tmp_path / "roberta", pad_token_id=padding)
    model = load_model(path, device="cpu")
    long = [Sentence((" ".join(["film"] * 30),), "1", 2)]
    examples = encode_sentences(model, long, [1], max_length=most)
    assert len(examples[0].ids) == most
    assert predict(model, examples).losses > 0
    with pytest.raises(
        SettingError, match=f"max_length is {most + 1}; expected 2 to {most} tokens"
    ):
        encode_sentences(model, long, [1], max_length=most + 1)


@pytest.mark.parametrize("kind", ["bert", "gpt2_classifier"])
def test_other_models_have_room_in_all_positions(kind: str, tmp_path: Path) -> None:
    model = load_model(getattr(tiny_models, kind)(tmp_path / kind), device="cpu")
    long = [Sentence((" ".join(["film"] * 200),), "1", 2)]
    assert predict(model, encode_sentences(model, long, [1], max_length=128)).losses > 0
    with pytest.raises(SettingError, match="max_length is 129; expected 2 to 128 tokens"):
        encode_sentences(model, long, [1], max_length=129)


@pytest.mark.parametrize("loss_on", ["answer", "all"])
def test_an_answer_to_nothing_has_a_label_for_each_token(loss_on: str, tmp_path: Path) -> None:
    model = load_model(tiny_models.llama(tmp_path / "m"), device="cpu")
    nothing = Instruction((("user", ""),), "a good film", 1)
    (found,) = encode_instructions(model, [nothing], prompt_format="raw", loss_on=loss_on)
    assert len(found.labels) == len(found.ids)
