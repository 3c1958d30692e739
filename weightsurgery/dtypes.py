"""The 22 dtypes of the safetensors format: size, numpy type, and whether arithmetic is allowed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class DType:
    """One dtype of the safetensors format.

    Attributes:
        name: The name in the header, such as `BF16`.
        bits: Bits an element takes; 4 and 6 are packed.
        numpy: The numpy type of a block. Packed dtypes have none of their own: their blocks are
            the packed bytes, as `uint8`.
        arithmetic: True for the four types that drift, scores and edits are computed on.
        order: Place in the library's file layout; the largest comes first.
    """

    name: str
    bits: int
    numpy: np.dtype[Any]
    arithmetic: bool
    order: int

    def nbytes(self, elements: int) -> int:
        """Bytes that `elements` elements take; they must fill whole bytes."""
        return elements * self.bits // 8


_TABLE: tuple[tuple[str, int, Any], ...] = (  # in the library's order, smallest first
    ("BOOL", 8, np.uint8),  # as bytes: 2 and 255 occur, and must survive
    ("F4", 4, np.uint8),
    ("F6_E2M3", 6, np.uint8),
    ("F6_E3M2", 6, np.uint8),
    ("U8", 8, np.uint8),
    ("I8", 8, np.int8),
    ("F8_E5M2", 8, ml_dtypes.float8_e5m2),
    ("F8_E4M3", 8, ml_dtypes.float8_e4m3fn),
    ("F8_E8M0", 8, ml_dtypes.float8_e8m0fnu),
    ("F8_E4M3FNUZ", 8, ml_dtypes.float8_e4m3fnuz),
    ("F8_E5M2FNUZ", 8, ml_dtypes.float8_e5m2fnuz),
    ("I16", 16, np.int16),
    ("U16", 16, np.uint16),
    ("F16", 16, np.float16),
    ("BF16", 16, ml_dtypes.bfloat16),
    ("I32", 32, np.int32),
    ("U32", 32, np.uint32),
    ("F32", 32, np.float32),
    ("C64", 64, np.complex64),
    ("F64", 64, np.float64),
    ("I64", 64, np.int64),
    ("U64", 64, np.uint64),
)

ARITHMETIC = ("F16", "BF16", "F32", "F64")
FLOATING = (*ARITHMETIC, "F4", "F6_E2M3", "F6_E3M2", *(n for n, _, _ in _TABLE if n[:2] == "F8"))

DTYPES: dict[str, DType] = {
    name: DType(name, bits, np.dtype(kind), name in ARITHMETIC, order)
    for order, (name, bits, kind) in enumerate(_TABLE)
}


def dtype_of(array: np.ndarray[Any, Any]) -> DType:
    """The format's dtype for a numpy array (`bool` counts as BOOL).

    Raises:
        KeyError: The format has no such dtype.

    Example:
        >>> dtype_of(np.zeros(2, np.float16)).name
        'F16'
    """
    if array.dtype == np.bool_:
        return DTYPES["BOOL"]
    for dtype in reversed(DTYPES.values()):
        if dtype.numpy == array.dtype and dtype.bits == 8 * array.dtype.itemsize:
            return dtype
    raise KeyError(str(array.dtype))
