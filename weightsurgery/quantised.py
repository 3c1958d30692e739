"""Quantised and packed weights: their stored numbers are codes, not weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightsurgery.checkpoint import Checkpoint, TensorView
from weightsurgery.dtypes import FLOATING
from weightsurgery.errors import PolicyError

_SUFFIXES = (
    *(".qweight", ".qzeros", ".g_idx", ".absmax", ".quant_map", ".weight_packed"),  # GPTQ, AWQ, bnb
    *(".SCB", ".weight_format", "._data", "._scale"),  # bitsandbytes int8, quanto
)
_PARTS = (".quant_state.", ".weight_scale", ".scale_inv")
_HINT = "dequantise the model first; `wsurg inspect` shows it as it is"


def require_unquantised(*checkpoints: Checkpoint) -> None:
    """Refuse quantised or packed weights: arithmetic on codes, or half of them reset, is garbage.

    Raises:
        PolicyError: config.json has a quantization_config, or a tensor looks packed.
    """
    for checkpoint in checkpoints:
        if _configured(checkpoint.config):
            raise PolicyError(
                "config.json has a quantization_config; its weights are codes",
                file=checkpoint.label,
                hint=_HINT,
                code="E-QUANTISED-CONFIG",
            )
        for name, view in checkpoint.items():
            if _is_packed(view):
                raise PolicyError(
                    f"quantised or packed weights ({view.dtype.name}); arithmetic is refused",
                    file=checkpoint.label,
                    tensor=name,
                    hint=_HINT,
                    code="E-QUANTISED-TENSOR",
                )


def _configured(config: Any) -> bool:
    """Also where a part of the model has a configuration of its own, such as text_config."""
    if isinstance(config, Mapping):
        return bool(config.get("quantization_config")) or any(map(_configured, config.values()))
    return isinstance(config, list) and any(map(_configured, config))


def _is_packed(view: TensorView) -> bool:
    by_name = view.name.endswith(_SUFFIXES) or any(part in view.name for part in _PARTS)
    by_dtype = view.dtype.name in FLOATING and not view.dtype.arithmetic
    codes = view.dtype.name in ("I8", "U8") and len(view.shape) > 1
    return by_name or by_dtype or (codes and view.name.endswith("weight"))
