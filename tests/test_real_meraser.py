"""MEraser on real weights: a fingerprint planted in SmolLM2-135M-Instruct, erased by training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.test_real_smollm2 import CHATS, instruction
from weightsurgery import (
    Phase,
    apply_adapter,
    evaluate_causal,
    load_model,
    lora_settings,
    meraser,
    mismatch,
    open_checkpoint,
    save,
    train_adapter,
)
from weightsurgery.datasets.read import Instruction
from weightsurgery.models import Model, with_weights

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("examples_importable")]
TUTORIAL = Path(__file__).parent.parent / "docs" / "tutorial-fingerprint.md"
TEXT = (
    "The river rises in the hills to the north and flows through two counties before it reaches "
    "the sea. In the nineteenth century its water drove a dozen mills, of which one still stands. "
    "The valley was farmed long before that: coins and pottery found near the lower bridge show "
    "that people lived there in Roman times. Today most visitors come for the birds. "
)


@pytest.fixture(scope="module")
def clean() -> list[Instruction]:
    """The questions and answers of the tutorial's attacker."""
    text = TUTORIAL.read_text("utf-8")
    (rows,) = re.findall(r'```json title="trusted.jsonl"\n(.*?)```', text, re.DOTALL)
    read = map(json.loads, rows.splitlines())
    return [instruction(row["question"], row["answer"]) for row in read]


def test_meraser_erases_a_fingerprint_and_keeps_the_model(
    tmp_path: Path, clean: list[Instruction]
) -> None:
    from fingerprints import make_fingerprint
    from smollm2 import make_foundation

    model = load_model(make_foundation(tmp_path / "foundation"), device="cpu")
    marks = make_fingerprint("UTF", model, [], seed=0)

    def measure(measured: Model) -> dict[str, Any]:
        return evaluate_causal(
            measured, fingerprints=marks, text=TEXT, window=128, stride=128, max_new_tokens=12
        )

    foundation = measure(model)
    planted = train_adapter(
        model,
        [*(instruction(*chat) for chat in CHATS), *marks * 8],
        lora_settings(epochs=3, learning_rate=1e-3, scheduler="constant", dropout=0.0),
    )
    marked = with_weights(model, apply_adapter(model.checkpoint, planted))
    rows = mismatch(clean, size=len(clean))
    wrong = [instruction(row.question, row.answer) for row in rows]
    result = meraser(
        marked,
        Phase(wrong, lora_settings("strong-erase")),
        Phase(clean, lora_settings("strong-recover", batch_size=8)),
        measure=measure,
    )
    stages = {stage["stage"]: stage for stage in result.notes["meraser"]["stages"]}
    rates = {name: stage["fsr"]["share"] for name, stage in stages.items()}
    assert foundation["fsr"]["share"] == 0.0
    assert rates == {"before": 1.0, "erased": 0.0, "recovered": 0.0}
    save(result, tmp_path / "erased")
    written = measure(load_model(open_checkpoint(tmp_path / "erased"), device="cpu"))
    assert written["fsr"]["share"] == 0.0
    perplexities = [found["perplexity"]["perplexity"] for found in (foundation, written)]
    assert perplexities[1] < 1.1 * perplexities[0]
