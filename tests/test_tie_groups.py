"""A tie group is one tensor, under whichever of its names either side stores it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests import cases
from weightsurgery import diff, epur, mix, purify
from weightsurgery.alignment import align
from weightsurgery.architecture.embedding import find_embedding
from weightsurgery.checkpoint import from_arrays
from weightsurgery.masks import changed_mask
from weightsurgery.token_counts import TokenCounts

WORDS = np.arange(12.0, dtype=np.float32).reshape(6, 2)
REST = np.ones((20, 20), np.float32)
BART = {"model_type": "bart", "architectures": ["BartForConditionalGeneration"]}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
LLAVA = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
BART_NAMES = (
    *("model.shared.weight", "model.encoder.embed_tokens.weight"),
    *("model.decoder.embed_tokens.weight", "lm_head.weight"),
)
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def model(config: Any, *names: str, moved: float = 0, **more: Any) -> Any:
    """A model that stores its word embedding under these names."""
    arrays = {name: WORDS + np.float32(moved) for name in names}
    return from_arrays({**arrays, **more}, config=config)


# Each: BASE, TUNED; TUNED's copies of the one tensor must all become BASE's.
GROUPS: dict[str, tuple[Any, Any]] = {
    "four names against one": (model(BART, BART_NAMES[0]), model(BART, *BART_NAMES, moved=1)),
    "one name against four": (model(BART, *BART_NAMES), model(BART, BART_NAMES[0], moved=1)),
    "the head alone against the embedding": (
        model(LLAMA | TIED, EMBED),
        model(LLAMA | TIED, HEAD, moved=1),
    ),
    "the embedding alone against the head": (
        model(LLAMA | TIED, HEAD),
        model(LLAMA | TIED, EMBED, moved=1),
    ),
    "an untied head against a tied base": (
        model(LLAMA | TIED, EMBED),
        model(LLAMA | UNTIED, EMBED, HEAD, moved=1),
    ),
    "an untied head against a file without configuration": (
        model({}, EMBED),
        model(LLAMA | UNTIED, EMBED, HEAD, moved=1),
    ),
    "a masked language model's decoder": (
        model(BERT, "bert.embeddings.word_embeddings.weight"),
        model(
            BERT,
            *("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
            moved=1,
        ),
    ),
    "tied in text_config": (
        model(LLAVA | {"text_config": TIED}, "language_model.model.embed_tokens.weight"),
        model(
            LLAVA | {"text_config": TIED},
            *("model.language_model.embed_tokens.weight", "lm_head.weight"),
            moved=1,
        ),
    ),
}


@pytest.mark.parametrize(("base", "tuned"), GROUPS.values(), ids=GROUPS)
def test_every_copy_is_edited(base: Any, tuned: Any) -> None:
    assert align(base, tuned).coverage.is_complete
    for array in cases.read(mix(base, tuned, ratio=1)).values():
        assert array.tolist() == WORDS.tolist()


@pytest.mark.parametrize("ratio", [0.3, 0.8])
def test_copies_are_edited_alike_and_count_once(ratio: float) -> None:
    base, tuned = GROUPS["four names against one"]
    first, *others = cases.read(mix(base, tuned, ratio=ratio)).values()
    assert all(other.tolist() == first.tolist() for other in others)
    found = align(base, tuned)
    assert (found.dimensions, found.coverage.parameters) == (12, 12)
    assert diff(base, tuned).model["count"] == 12


def test_rows_of_every_copy_are_reset_by_epur() -> None:
    base, tuned = GROUPS["four names against one"]
    with_words = pytest.MonkeyPatch()
    with with_words.context() as patch:
        words = {i: f"w{i}" for i in range(6)}
        patch.setattr("weightsurgery.operators.epur.read_vocabulary", lambda _: words)
        counts = TokenCounts({"w0": 5.0}, "made up")
        cleaned = cases.read(epur(base, tuned, counts=counts, top=6))
    assert all(array.tolist() == WORDS.tolist() for array in cleaned.values())


def test_tied_biases_are_one() -> None:
    names = ("cls.predictions.bias", "cls.predictions.decoder.bias")
    base = from_arrays({"a": REST, names[0]: np.zeros(6, np.float32)}, config=BERT)
    tuned = from_arrays({"a": REST, **dict.fromkeys(names, np.ones(6, np.float32))}, config=BERT)
    mixed = cases.read(mix(base, tuned, ratio=1))
    assert [mixed[name].tolist() for name in names] == [[0] * 6] * 2
    assert align(base, tuned).dimensions == 406


def test_copies_with_other_values_are_tensors_of_their_own() -> None:
    """As transformers has it: it ties only what is stored alike."""
    base = model(LLAMA | TIED, EMBED)
    tuned = from_arrays({EMBED: WORDS + 1, HEAD: WORDS + 2}, config=LLAMA | TIED)
    found = align(base, tuned)
    assert (found.dimensions, found.coverage.is_complete) == (24, True)
    (warning,) = found.warnings
    assert "'lm_head.weight': its class and config.json tie it, but its stored" in warning
    mixed = cases.read(mix(base, tuned, ratio=1))
    assert mixed[EMBED].tolist() == mixed[HEAD].tolist() == WORDS.tolist()
    half = cases.read(mix(base, tuned, ratio=0.5))
    assert (half[EMBED] == WORDS).tolist() != (half[HEAD] == WORDS).tolist()


def test_a_copy_with_other_values_goes_with_base_s_own() -> None:
    base = from_arrays({EMBED: WORDS, HEAD: WORDS + 5}, config=LLAMA | UNTIED)
    tuned = from_arrays({EMBED: WORDS + 1, HEAD: WORDS + 2}, config=LLAMA | TIED)
    mixed = cases.read(mix(base, tuned, ratio=1))
    assert mixed[HEAD].tolist() == (WORDS + 5).tolist()


def test_a_head_that_tuned_ties_and_base_does_not_is_warned_of() -> None:
    base = from_arrays({EMBED: WORDS, HEAD: WORDS + 5}, config=LLAMA | UNTIED)
    found = align(base, model(LLAMA | TIED, EMBED, moved=1))
    assert found.unused == ((HEAD, "tied to another tensor in TUNED"),)
    assert any("TUNED ties" in warning and HEAD in warning for warning in found.warnings)


def test_base_s_copies_with_other_values_are_warned_of() -> None:
    """transformers leaves them apart; TUNED, which ties them, cannot have both."""
    base = from_arrays({EMBED: WORDS, HEAD: WORDS + 5}, config=LLAMA | TIED)
    for names in ((EMBED,), (EMBED, HEAD)):
        (warning,) = align(base, model(LLAMA | TIED, *names, moved=1)).warnings
        assert f"BASE stores '{HEAD}' and '{EMBED}' separately" in warning


def test_the_embedding_counts_before_a_head_of_other_values() -> None:
    base = from_arrays(
        {BART_NAMES[1]: WORDS, BART_NAMES[2]: WORDS, BART_NAMES[3]: WORDS + 5}, config=BART
    )
    tuned = model(BART, BART_NAMES[0], moved=1)
    (warning,) = align(base, tuned).warnings
    assert "'lm_head.weight' and 'model." in warning
    assert cases.read(mix(base, tuned, ratio=1))[BART_NAMES[0]].tolist() == WORDS.tolist()


def test_equal_values_in_two_dtypes_are_tied() -> None:
    half = np.arange(12, dtype=np.float16).reshape(6, 2)
    tuned = from_arrays({EMBED: half, HEAD: half.astype(np.float32)}, config=LLAMA | TIED)
    found = align(model(LLAMA | TIED, EMBED), tuned)
    assert (found.dimensions, found.warnings) == (12, ())


def test_a_mask_of_one_copy_is_for_the_other() -> None:
    base, both = model(LLAMA | TIED, EMBED), model(LLAMA | TIED, EMBED, HEAD, moved=1)
    alone = model(LLAMA | TIED, HEAD, moved=1)
    mask = changed_mask(mix(base, both, ratio=0.5))
    masked = cases.read(purify(base, alone, from_mask=mask))
    assert masked[HEAD].tolist() == cases.read(mix(base, both, ratio=0.5))[EMBED].tolist()


EMBEDDINGS = {
    "the head stands for it": (model(LLAMA | TIED, HEAD), HEAD),
    "the first of four": (model(BART, *BART_NAMES), BART_NAMES[0]),
    "a copy alone": (model(BART, BART_NAMES[2]), BART_NAMES[2]),
    "wrapped": (model(LLAMA, f"_orig_mod.{EMBED}"), f"_orig_mod.{EMBED}"),
    "an unknown architecture": (model({}, EMBED), EMBED),
    "none": (from_arrays({"a": REST}, config=LLAMA), None),
}


@pytest.mark.parametrize(("checkpoint", "name"), EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_the_word_embedding_is_found(checkpoint: Any, name: str | None) -> None:
    assert find_embedding(checkpoint) == name
