"""What docs/reference/architectures.md says under "What cannot hold" is what happens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from weightsurgery import MismatchError, align, from_arrays, mix

LLAMA = {
    "model.embed_tokens.weight": (6, 4),
    "lm_head.weight": (6, 4),
    "model.layers.0.mlp.up_proj.weight": (4, 4),
}


def numbers(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype("f4") for name, shape in shapes.items()}


def test_a_tied_head_gets_the_embedding_of_a_base_with_a_head_of_its_own() -> None:
    ours, theirs = numbers(LLAMA, 0), numbers(LLAMA, 1)
    del theirs["lm_head.weight"]
    config = {"model_type": "llama", "tie_word_embeddings": False}
    base = from_arrays(ours, config=config)
    tuned = from_arrays(theirs, config={**config, "tie_word_embeddings": True})
    result = mix(base, tuned, ratio=1.0)
    assert list(result) == list(theirs)
    for name, view in result.items():
        assert np.array_equal(view.read(0, view.size), ours[name].reshape(-1))
    (left,) = align(base, tuned).to_json()["only_in_base"]
    assert (left["tensor"], left["tied"]) == ("lm_head.weight", True)


SHARED = "model.layers.{}.shared_transf.feed_forward.down_proj.weight"


def shared_layers(moved: float) -> tuple[Any, Any]:
    """BASE stores a shared layer once, TUNED twice; the second copy moved this much further."""
    ours = numbers({SHARED.format(1): (4, 4)}, 0)
    theirs = {name: array + 1 for name, array in ours.items()}
    theirs[SHARED.format(2)] = theirs[SHARED.format(1)] + np.float32(moved)
    base, tuned = (from_arrays(one, config={"model_type": "zamba"}) for one in (ours, theirs))
    return base, tuned


def test_copies_of_a_shared_layer_are_one_tensor() -> None:
    base, tuned = shared_layers(0)
    found = align(base, tuned)
    assert (found.dimensions, found.coverage.is_complete) == (16, True)
    for view in mix(base, tuned, ratio=1.0).values():
        assert view.read(0, 16).tolist() == base[SHARED.format(1)].read(0, 16).tolist()


def test_copies_with_other_values_are_not() -> None:
    with pytest.raises(MismatchError, match=r"50\.00 % of TUNED's parameters") as caught:
        mix(*shared_layers(1))
    assert caught.value.code == "E-PAIR-COVERAGE"
