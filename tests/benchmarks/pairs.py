"""Makes a base and a tuned model on disk, one block at a time, and keeps them for the next run.

Usage: python -m tests.benchmarks.pairs WORK [--size NAME] [--layers N] [--fill random|sparse]

It runs as a process of its own, so that the benchmarks' own process stays small: the peak that
the kernel reports for a command is never below what the process that started it held.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

from .shapes import BYTES_PER_ELEMENT, SIZES, Shape, Tensors, config, elements, shards
from .weights import FILLS, Pool

RECIPE = 1  # raise it when the bytes of a pair change, so that no pair of before is used
SEED = 20_240_601


def pair_folder(work: Path, shape: Shape, fill: str) -> Path:
    """Return the folder of a pair inside `work`, the same for the same pair."""
    sizes = f"{shape.layers}x{shape.hidden}x{shape.mlp}x{shape.kv_heads}x{shape.vocabulary}"
    return work / f"pair-{RECIPE}-{fill}-{sizes}"


def header(tensors: Tensors, dtype: str = "BF16") -> bytes:
    """Return the safetensors header of a file that holds `tensors` in this order."""
    width = {"BF16": BYTES_PER_ELEMENT, "F32": 4}[dtype]
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + elements(shape) * width
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_shards(
    models: tuple[Path, Path], shard: str, tensors: Tensors, fill: str, pool: Pool
) -> None:
    """Write one file of the base and the same one of the tuned model."""
    with (models[0] / shard).open("wb") as base, (models[1] / shard).open("wb") as tuned:
        for file in (base, tuned):
            file.write(header(tensors))
        for shape in tensors.values():
            FILLS[fill](pool, base, tuned, elements(shape))
        for file in (base, tuned):
            file.truncate()  # a hole at the very end has moved the position only


def write_side_files(model: Path, shape: Shape) -> None:
    """Write config.json and the index of the files."""
    files = {name: shard for shard, tensors in shards(shape).items() for name in tensors}
    size = shape.parameters * BYTES_PER_ELEMENT
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
    (model / "config.json").write_text(json.dumps(config(shape), indent=2) + "\n")
    (model / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def make_pair(work: Path, shape: Shape, fill: str) -> Path:
    """Return the folder with `base` and `tuned`, made now unless it is there already.

    The folder gets its name when it is complete, so that one cut short is never used.
    """
    folder = pair_folder(work, shape, fill)
    if folder.exists():
        return folder
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    models = (partial / "base", partial / "tuned")
    for model in models:
        model.mkdir(parents=True)
        write_side_files(model, shape)
    pool = Pool(SEED)
    for shard, tensors in shards(shape).items():
        write_shards(models, shard, tensors, fill, pool)
    return partial.rename(folder)


def main() -> None:
    """Make the pair that the command line asks for and print its folder."""
    parser = argparse.ArgumentParser(description=make_pair.__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--size", choices=SIZES, default="tinyllama")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--fill", choices=FILLS, default="random")
    settings = parser.parse_args()
    shape = SIZES[settings.size]
    if settings.layers:
        shape = replace(shape, layers=settings.layers)
    print(make_pair(settings.work, shape, settings.fill))


if __name__ == "__main__":
    main()
