"""What a JSON text will cost to parse, told from its bytes alone, before any of it is parsed.

A hundred megabytes of `[[],[],…]` become gigabytes of lists. So brackets, commas, colons and quotes
are counted where they stand (in texts too: that only counts too much), and each is charged what
Python's objects for it take at most. The charges are measured, with CPython 3.11 on a 64-bit
machine: `tests/test_json_cost.py` parses the dearest texts that pass and looks at the peak.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

MEMORY = 190_000_000  # bytes that a header, an index or a configuration may cost
# A tokenizer of 500,000 merges, or the record of 100,000 tensors, is dearer than all of those.
MEMORY_OF_MANY = 800_000_000
DENSEST = 26  # bytes of memory for each of the text, of what may cost more than MEMORY

_OBJECT, _LIST, _ITEM, _KEY, _TEXT = 120, 84, 48, 80, 60  # bytes each
_KEYS_OF_SMALL = 4  # of an object; the keys of larger ones cost _RARE_KEY more
_RARE_KEY = 85
_CHUNK = 1 << 18  # stays in the processor's cache, and takes no memory to speak of


def parsing_cost(data: bytes) -> int:
    """The bytes of memory that parsing a JSON text takes at most, with those of the text.

    Args:
        data: UTF-8, not checked.

    Returns:
        An upper bound, which a real checkpoint's headers exceed by less than half.
    """
    counts = dict.fromkeys(b'{[,:"', 0)
    following, highest = 0, 0
    for start in range(0, len(data), _CHUNK):
        chunk = np.frombuffer(data, np.uint8, min(_CHUNK, len(data) - start), start)
        for character in counts:
            counts[character] += int(np.count_nonzero(chunk == character))
        if int(chunk.max()) > 0x7F:
            highest = max(highest, int(chunk.max()))
            following += int(np.count_nonzero((chunk & 0xC0) == 0x80))
    objects, lists, items, keys, quotes = counts.values()
    # Python stores a text with as many bytes for each character as its highest one needs.
    width = 1 if highest < 0xC4 else 2 if highest < 0xF0 else 4
    return (
        len(data)
        + 2 * width * (len(data) - following)  # the text, and the strings cut from it
        + objects * _OBJECT
        + lists * _LIST
        + (items + 1) * _ITEM
        + keys * _KEY
        + max(0, keys - _KEYS_OF_SMALL * objects) * _RARE_KEY
        + quotes * _TEXT // 2
    )


def allowed_cost(size: int, memory: int) -> int:
    """What a text of `size` bytes may cost, where its kind may cost `memory`.

    Above MEMORY only texts that are made of longer words than a bomb is: what is packed as densely
    as `[],[],` or `"a",` is no tokenizer and no record.
    """
    return min(memory, max(MEMORY, DENSEST * size))


@contextmanager
def collector_paused() -> Iterator[None]:
    """No search for cycles of garbage meanwhile, for what makes many objects and no cycles.

    Every so many new objects Python looks through all there are; in a header of 100,000 tensors
    this takes more than half of the time.
    """
    was_running = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if was_running:
            gc.enable()
