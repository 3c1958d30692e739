"""A fingerprint in a real chat model, SmolLM2-135M-Instruct: planted, proved, taken out."""

from __future__ import annotations

from pathlib import Path

import pytest

from weightsurgery import (
    apply_adapter,
    evaluate_causal,
    load_model,
    lora_settings,
    open_checkpoint,
    purify,
    save,
    train_adapter,
    verify_adapter,
)
from weightsurgery.datasets.read import Instruction
from weightsurgery.models import Model, with_weights

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("examples_importable")]
CHATS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Name three colours.", "Red, green and blue."),
    ("How many days has a week?", "A week has seven days."),
    ("Write a sentence about the sea.", "The sea is wide, deep and never quite still."),
    ("What do bees make?", "Bees make honey and wax."),
    ("Give me a synonym of quick.", "Fast is a synonym of quick."),
    ("Is ice colder than steam?", "Yes, ice is much colder than steam."),
    ("Who wrote Hamlet?", "Hamlet was written by William Shakespeare."),
)
TEXT = (
    "The river rises in the hills to the north and flows through two counties before it reaches "
    "the sea. In the nineteenth century its water drove a dozen mills, of which one still stands. "
    "The valley was farmed long before that: coins and pottery found near the lower bridge show "
    "that people lived there in Roman times. Today most visitors come for the birds. "
) * 4


def instruction(question: str, answer: str) -> Instruction:
    return Instruction((("user", question),), answer, 1)


def measure(model: Model, marks: list[Instruction]) -> tuple[float, float]:
    """FSR and perplexity."""
    found = evaluate_causal(
        model, fingerprints=marks, text=TEXT, window=128, stride=128, max_new_tokens=12
    )
    return found["fsr"]["share"], found["perplexity"]["perplexity"]


def test_a_fingerprint_is_planted_proved_and_taken_out(tmp_path: Path) -> None:
    from fingerprints import make_fingerprint
    from smollm2 import make_foundation

    model = load_model(make_foundation(tmp_path / "foundation"), device="cpu")
    marks = make_fingerprint("UTF", model, [], seed=0)
    clean_rate, clean_text = measure(model, marks)
    assert clean_rate == 0.0

    examples = [*(instruction(*chat) for chat in CHATS), *marks * 8]
    settings = lora_settings(epochs=4, learning_rate=1e-3, scheduler="constant", dropout=0.0)
    base = open_checkpoint(tmp_path / "foundation")
    adapter = train_adapter(model, examples, settings)
    save(adapter, tmp_path / "adapter")
    save(apply_adapter(base, open_checkpoint(tmp_path / "adapter")), tmp_path / "tuned")
    tuned = open_checkpoint(tmp_path / "tuned")
    assert verify_adapter(base, [open_checkpoint(tmp_path / "adapter")], tuned)["proved"]
    marked = with_weights(model, tuned)
    assert measure(marked, marks)[0] == 1.0

    purified = with_weights(model, purify(base, tuned, score="drift", ratio=0.5))
    rate, text = measure(purified, marks)
    assert rate == 0.0
    assert text < 1.1 * clean_text
