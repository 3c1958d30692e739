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


def test_copies_of_a_shared_layer_that_base_stores_once_are_refused() -> None:
    name = "model.layers.{}.shared_transf.feed_forward.down_proj.weight"
    ours = numbers({name.format(1): (4, 4)}, 0)
    theirs = numbers({name.format(i): (4, 4) for i in (1, 2)}, 1)
    base, tuned = (from_arrays(one, config={"model_type": "zamba"}) for one in (ours, theirs))
    with pytest.raises(MismatchError, match=r"50\.00 % of TUNED's parameters") as caught:
        mix(base, tuned)
    assert caught.value.code == "E-PAIR-COVERAGE"
