"""Batches: what pads them must not show, and no example is longer than the model takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny_models
from weightsurgery.curvature.fisher import fisher
from weightsurgery.datasets.batches import read_examples
from weightsurgery.errors import MismatchError
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
