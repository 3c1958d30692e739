"""Memory for blocks, used again and again.

A fresh block of a few megabytes costs more in page faults than in reading: the allocator gives the
pages back to the system each time and gets them zeroed again. Buffers here go back to a small
stock when the last array on them is gone.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SMALLEST = 1 << 16  # bytes; below, the allocator does well by itself
_LARGEST = 1 << 24
_KEPT = 8  # buffers of each size
_stock: dict[int, deque[NDArray[np.uint8]]] = {}


def empty(count: int, dtype: Any) -> NDArray[Any]:
    """Like `np.empty(count, dtype)`, from the stock where a block of that size lies there."""
    kind = np.dtype(dtype)
    need = count * kind.itemsize
    if not _SMALLEST <= need <= _LARGEST:
        return np.empty(count, kind)
    size = 1 << (need - 1).bit_length()
    free = _stock.setdefault(size, deque(maxlen=_KEPT))
    try:
        memory = free.pop()
    except IndexError:
        memory = np.empty(size, np.uint8)
    # Views of `lease` refer to it, not to `memory`: when it dies nothing else can be left.
    lease = np.frombuffer(memory.data, np.uint8)
    weakref.finalize(lease, free.append, memory)
    return lease[:need].view(kind)
