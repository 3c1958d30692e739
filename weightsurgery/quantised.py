"""Quantized and packed weights: their stored numbers are codes, not weights.

The tensors decide. A `quantization_config` in config.json does not: merges of quantized fine-tunes
often keep one though they store plain 16-bit weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from weightsurgery.checkpoint import Checkpoint, TensorView
from weightsurgery.dtypes import FLOATING
from weightsurgery.errors import PolicyError, shown

KEY = "quantization_config"
# What tensors with such a name hold, whatever their dtype: by the name's end, or by a part of it.
_BY_END: Mapping[str, tuple[str, ...]] = {
    "GPTQ or AWQ codes": (".qweight", ".qzeros", ".g_idx"),
    "bitsandbytes codes and scales": ("absmax", "quant_map", ".SCB", ".weight_format"),
    "packed codes (compressed-tensors)": ("weight_packed",),
    "HQQ codes": (".W_q",),
    "quanto codes and scales": ("._data", "._scale"),
    "torchao codes": ("weight_qdata",),
    "scales of quantized weights": ("_scale_inv", "_proj_scale"),
}
_BY_PART: Mapping[str, str] = {
    ".quant_state.": "bitsandbytes codes and scales",
    ".weight_scale": "scales of quantized weights",
    ".scale_inv": "scales of quantized weights",
}
_MXFP4 = ("_blocks", "_scales")  # of U8; elsewhere these ends are common
_MATRICES = ("weight", "_proj")  # ends of names of matrices, which store codes if they are of bytes
_BYTES = ("I8", "U8")
# Integer tensors that models have beside their weights: positions, tables of indices, masks.
_INDICES = ("_ids", "_index", "_indices", "mask", "attn.bias", "attention.bias")
_HINT = "dequantize the model first; `wsurg inspect` shows it as it is"


def require_unquantised(*checkpoints: Checkpoint) -> None:
    """Refuse quantized or packed weights: arithmetic on codes, or half of them reset, is garbage.

    Raises:
        PolicyError: A tensor holds codes or their scales; or config.json has a
            quantization_config, and a tensor is neither a plain weight nor known to be an index.
    """
    for checkpoint in checkpoints:
        for name, view in checkpoint.items():
            stored = what_is_stored(view)
            if stored:
                raise PolicyError(
                    f"stores {stored} ({view.dtype.name}), not plain weights",
                    file=checkpoint.label,
                    tensor=name,
                    hint=_HINT,
                    code="E-QUANTISED-TENSOR",
                )
        for part in checkpoint.split().values():
            method, unclear = configured_method(part.config), _unclear(part)
            if method and unclear is not None:
                raise PolicyError(
                    f"config.json has a {KEY} ({shown(method)}), and this tensor is "
                    f"{unclear.dtype.name}: it may hold quantized values",
                    file=part.label,
                    tensor=unclear.name,
                    hint=_HINT,
                    code="E-QUANTISED-CONFIG",
                )


def what_is_stored(view: TensorView) -> str:
    """What a tensor of a quantized model stores, by its name and dtype; "" for a plain tensor.

    Example:
        >>> from weightsurgery.dtypes import DTYPES
        >>> what_is_stored(TensorView("e.down_proj_blocks", (4, 8, 2, 16), DTYPES["U8"], None))
        'MXFP4 blocks and scales'
        >>> what_is_stored(TensorView("e.down_proj", (4, 8, 32), DTYPES["BF16"], None))
        ''
    """
    name, dtype = view.name, view.dtype
    for stored, ends in _BY_END.items():
        if name.endswith(ends):
            return stored
    for part, stored in _BY_PART.items():
        if part in name:
            return stored
    if dtype.name == "U8" and name.endswith(_MXFP4):
        return "MXFP4 blocks and scales"
    if dtype.name in FLOATING and not dtype.arithmetic:
        return f"{dtype.bits}-bit floating-point codes"
    if dtype.name in _BYTES and len(view.shape) > 1 and name.endswith(_MATRICES):
        return "8-bit codes"
    return ""


def configured_method(config: Any) -> str:
    """How config.json says that the model, or a part of it, is quantized; "" if it does not.

    Args:
        config: The contents of config.json.

    Example:
        >>> configured_method({"text_config": {"quantization_config": {"quant_method": "fp8"}}})
        'fp8'
    """
    if isinstance(config, list):
        return next(filter(None, map(configured_method, config)), "")
    if not isinstance(config, Mapping):
        return ""
    found = config.get(KEY)
    if found:
        method = found.get("quant_method") if isinstance(found, Mapping) else found
        return str(method or "of an unknown method")
    return configured_method(list(config.values()))


def leftover_warnings(checkpoint: Checkpoint) -> list[str]:
    """A warning if config.json says that the model is quantized, and its tensors are plain.

    Args:
        checkpoint: A model.
    """
    method = configured_method(checkpoint.config)
    if not method or not checkpoint or _unclear(checkpoint) is not None:
        return []
    if any(map(what_is_stored, checkpoint.values())):
        return []
    sizes: Counter[str] = Counter()
    for view in checkpoint.values():
        if view.dtype.arithmetic:
            sizes[view.dtype.name] += view.size
    plain = " and ".join(name for name, _ in sizes.most_common())
    what = f"config.json has a {KEY} ({shown(method)}), but the tensors are plain {plain}"
    return [f"{what}; outputs omit it"]


def _unclear(checkpoint: Checkpoint) -> TensorView | None:
    """A tensor that may store codes of an unknown kind: the first integer that is no index."""
    for name, view in checkpoint.items():
        integers = not view.dtype.arithmetic and view.dtype.name != "BOOL"
        if integers and len(view.shape) > 1 and not name.endswith(_INDICES):
            return view
    if any(view.dtype.arithmetic for view in checkpoint.values()):
        return None
    return next(iter(checkpoint.values()), None)
