"""What transformers loads from a merge is what PEFT computes with the adapter, and the reverse.

`python -m tests.adapter_law` prints the same as a table.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests import peft_models as models
from tests.adapter_law import EVERY, Unadaptable, judge
from tests.architectures import ARCHITECTURES
from tests.limits import ADAPTER_LIMITS
from weightsurgery import apply_adapter, extract_adapter, open_checkpoint, save

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning"),
]

# One of each kind: what runs in `tox`.
FAST = {
    "bert": ("embeddings", "extract"),
    "gpt2": ("biases", "tokens", "tagger"),
    "gpt-neox": ("extract",),
    "llama-tied": ("grown", "tokens", "classifier", "extract"),
    "mixtral": ("all-linear", "experts", "extract"),
    "bart": ("embeddings",),
    "qwen2-5-vl": ("dora", "renamed", "extract"),
    "gemma3": ("renamed",),
}
_SHORT = (*FAST, "qwen2-moe", "gpt-oss", "mamba", "wav2vec2")


def _cases() -> Iterator[Any]:
    slow, long = pytest.mark.slow, pytest.mark.long
    for name in ARCHITECTURES:
        for variant in EVERY:
            marks: tuple[Any, ...] = () if name in _SHORT else (long,)
            marks = () if variant in FAST.get(name, ()) else (slow, *marks)
            yield pytest.param(name, variant, id=f"{name}/{variant}", marks=marks)


@pytest.mark.parametrize(("name", "variant"), list(_cases()))
def test_the_law_for_adapters(name: str, variant: str, tmp_path: Path) -> None:
    try:
        verdicts = list(judge(name, variant, tmp_path))
    except Unadaptable as error:
        (pytest.fail if variant in FAST.get(name, ()) else pytest.skip)(str(error))
    wrong = [f"{one.check}: {one.detail}" for one in verdicts if not one.holds]
    assert bool(wrong) == ((name, variant) in ADAPTER_LIMITS), wrong


def test_every_variant_is_in_the_fast_selection() -> None:
    assert {v for variants in FAST.values() for v in variants} == set(EVERY)


@pytest.mark.parametrize("tied", [False, True])
def test_a_larger_vocabulary_is_held_whole(tied: bool, tmp_path: Path) -> None:
    """PEFT loads the adapter on the resized base; `apply_adapter` grows BASE itself."""
    torch.manual_seed(0)
    base, tuned = (models.llama(tie_word_embeddings=tied) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned.resize_token_embeddings(35)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    given = [open_checkpoint(tmp_path / name) for name in ("base", "tuned")]
    save(extract_adapter(*given, rank=64), tmp_path / "adapter")
    merged = apply_adapter(given[0], open_checkpoint(tmp_path / "adapter"), force_base=True)
    save(merged, tmp_path / "merged")
    again = type(tuned).from_pretrained(tmp_path / "merged")
    assert again.config.vocab_size == 35
    base.resize_token_embeddings(35)
    in_peft = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    for model in (again, in_peft):
        with torch.no_grad():
            found, expected = (m(models.TOKENS).logits for m in (model, tuned))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
