"""Every sign of quantised or packed weights is one, and nothing else is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from weightsurgery import from_arrays
from weightsurgery.checkpoint import Checkpoint, TensorView
from weightsurgery.dtypes import DTYPES
from weightsurgery.errors import PolicyError
from weightsurgery.quantised import require_unquantised

F4 = np.zeros((2, 4), np.float32)
NAMES = [
    *("layer.qweight", "layer.qzeros", "layer.g_idx"),  # GPTQ, AWQ
    *("layer.weight.absmax", "layer.weight.quant_map", "layer.SCB", "layer.weight_format"),
    *("layer.weight.quant_state.bitsandbytes__nf4", "layer.weight.quant_state.x"),
    *("layer.weight_packed", "layer.weight_scale", "layer.weight_scale_2"),  # compressed-tensors
    *("layer.weight_scale_inv", "layer.weight._data", "layer.weight._scale"),  # DeepSeek, quanto
]
PACKED = ["F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3", "F8_E5M2"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_quantised_tensors(name: str) -> None:
    with pytest.raises(PolicyError, match="quantised or packed weights") as told:
        require_unquantised(from_arrays({"a.weight": F4, name: F4}))
    assert (told.value.tensor, told.value.code) == (name, "E-QUANTISED-TENSOR")


@pytest.mark.parametrize("dtype", PACKED)
def test_dtypes_without_arithmetic(dtype: str) -> None:
    view = TensorView("w", (8,), DTYPES[dtype], lambda *_: (F4, F4))
    with pytest.raises(PolicyError, match=rf"packed weights \({dtype}\)"):
        require_unquantised(Checkpoint({"w": view}, label="m"))


@pytest.mark.parametrize("dtype", ["i1", "u1"])
def test_matrices_of_bytes_are_codes(dtype: str) -> None:
    with pytest.raises(PolicyError, match="quantised or packed weights"):
        require_unquantised(from_arrays({"layer.weight": np.zeros((2, 2), dtype)}))


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"bits": 4}},
        {"text_config": {"quantization_config": {"bits": 4}}},
        {"parts": [[{"quantization_config": "gptq"}]]},
    ],
)
def test_configurations_that_say_so(config: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=r"config\.json has a quantization_config"):
        require_unquantised(from_arrays({"w": F4}, config=config))


def test_what_only_looks_like_it() -> None:
    plain = {
        "layer.weight": F4,
        "scale": F4,
        "logit_scale": F4,
        "weight_mask": np.zeros((2, 2), "i1"),
        "token_type.weight": np.zeros(4, "u1"),
        "weight_g": F4,
        "position_ids": np.zeros((1, 4), "i8"),
    }
    config = {"quantization_config": None, "text_config": {"quantization_config": {}}}
    require_unquantised(from_arrays(plain, config=config))
