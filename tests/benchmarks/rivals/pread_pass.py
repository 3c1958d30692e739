"""The floor under every pass over two models: read each byte once and do nothing with it.

Two threads pread all the shards of both folders, each into one buffer that it uses again.

Usage: python pread_pass.py BASE TUNED
"""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from threading import Lock

BLOCK = 4 * 2**20
THREADS = 2


def blocks(folders: list[Path]) -> Iterator[tuple[int, int]]:
    """Yield (descriptor, offset) for every block of every shard in `folders`."""
    for folder in folders:
        for shard in sorted(folder.glob("*.safetensors")):
            descriptor = os.open(shard, os.O_RDONLY)
            yield from zip(repeat(descriptor), range(0, shard.stat().st_size, BLOCK))


def read_all(work: Iterator[tuple[int, int]], lock: Lock) -> int:
    """Read the blocks that `work` still holds and return how many bytes that were."""
    buffer = bytearray(BLOCK)
    total = 0
    while True:
        with lock:
            block = next(work, None)
        if block is None:
            return total
        descriptor, offset = block
        total += os.preadv(descriptor, [buffer], offset)


def main() -> None:
    """Read the two folders named on the command line and print how many bytes they hold."""
    work = blocks([Path(folder) for folder in sys.argv[1:]])
    lock = Lock()
    with ThreadPoolExecutor(THREADS) as pool:
        print(sum(pool.map(read_all, [work] * THREADS, [lock] * THREADS)))


if __name__ == "__main__":
    main()
