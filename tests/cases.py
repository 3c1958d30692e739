"""Tiny checkpoints: as arrays, as files and as sharded directories; and ways to look at them."""

from __future__ import annotations

import hashlib
import importlib
import json
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors

from weightsurgery.checkpoint import Checkpoint, FileRef, TensorView, from_arrays
from weightsurgery.dtypes import dtype_of

Arrays = dict[str, np.ndarray[Any, Any]]

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"F16": np.dtype(np.float16), "BF16": BF16, "F32": np.dtype("f4"), "F64": np.dtype("f8")}
SEEDS = (0, 7, -3, 2**64 + 1)
SHARDS = (1, 2, 7)
WORKERS = (1, 2, 4)

_LAYERS = {
    "bert": {
        "attention.self.query.weight": (6, 6),
        "attention.self.query.bias": (6,),
        "attention.output.dense.weight": (6, 6),
        "intermediate.dense.weight": (9, 6),
        "output.LayerNorm.bias": (6,),
    },
    "gpt2": {
        "attn.c_attn.weight": (6, 18),
        "attn.c_proj.bias": (6,),
        "mlp.c_fc.weight": (6, 9),
        "ln_1.weight": (6,),
    },
    "llama": {
        "self_attn.q_proj.weight": (6, 6),
        "self_attn.o_proj.weight": (6, 6),
        "mlp.gate_proj.weight": (9, 6),
        "mlp.down_proj.weight": (6, 9),
        "input_layernorm.weight": (6,),
    },
}
_REST = {
    "bert": {
        "embeddings.word_embeddings.weight": (11, 6),
        "embeddings.position_embeddings.weight": (5, 6),
        "embeddings.LayerNorm.weight": (6,),
    },
    "gpt2": {"wte.weight": (11, 6), "wpe.weight": (5, 6), "ln_f.bias": (6,)},
    "llama": {
        "model.embed_tokens.weight": (11, 6),
        "model.norm.weight": (6,),
        "lm_head.weight": (11, 6),
    },
}
_STEM = {"bert": "encoder.layer", "gpt2": "h", "llama": "model.layers"}
_STORED = {"bert": np.dtype("f4"), "gpt2": np.dtype(np.float16), "llama": BF16}
EMBEDDING = {
    "bert": "embeddings.word_embeddings.weight",
    "gpt2": "wte.weight",
    "llama": "model.embed_tokens.weight",
}
FAMILIES = tuple(_LAYERS)
CONFIGS: dict[str, dict[str, Any]] = {
    family: {"model_type": family, "vocab_size": 11} for family in FAMILIES
}


def shapes_of(family: str, layers: int = 2) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a family's floating tensors."""
    numbered = {
        f"{_STEM[family]}.{i}.{name}": shape
        for i in range(layers)
        for name, shape in _LAYERS[family].items()
    }
    return {**_REST[family], **numbered}


def model(family: str, *, seed: int = 1, dtype: Any = None, layers: int = 2) -> Arrays:
    """A pre-trained model of a family: normal weights, an integer and a boolean buffer."""
    rng = np.random.default_rng(seed)
    kind = np.dtype(dtype or _STORED[family])
    arrays: Arrays = {
        name: np.asarray(rng.normal(0, 1, shape), np.float32).astype(kind)
        for name, shape in shapes_of(family, layers).items()
    }
    arrays["position_ids"] = np.arange(5, dtype=np.int64).reshape(1, 5)
    arrays["causal_mask"] = np.tri(5, dtype=np.bool_)
    return arrays


def finetuned(base: Arrays, *, seed: int = 2, share: float = 0.6, size: float = 0.1) -> Arrays:
    """BASE with a share of its floating weights moved; integers and booleans changed too."""
    rng = np.random.default_rng(seed)
    tuned: Arrays = {}
    for name, array in base.items():
        if array.dtype.kind in "ib":
            tuned[name] = array[..., ::-1].copy()
            continue
        drift = rng.normal(0, size, array.shape) * (rng.random(array.shape) < share)
        tuned[name] = (array.astype(np.float64) + drift).astype(np.float32).astype(array.dtype)
    return tuned


def zeros(shapes: Mapping[str, tuple[int, ...]], **fields: Any) -> Checkpoint:
    """A checkpoint where only names and shapes matter."""
    return from_arrays({n: np.zeros(s, np.float32) for n, s in shapes.items()}, **fields)


WORDS = ("the", *(f"token{i}" for i in range(1, 11)))  # of the eleven rows of an embedding


def vocabulary(words: Sequence[str] = WORDS) -> dict[str, tuple[FileRef, ...]]:
    """The field of a checkpoint in memory that gives its embedding's rows tokens."""
    content = "".join(f"{word}\n" for word in words).encode()
    file = FileRef(
        name="vocab.txt",
        path="memory/vocab.txt",
        size=len(content),
        content=lambda: content,
        begin_hash=lambda: lambda: None,
        sha256=lambda _stop: hashlib.sha256(content).hexdigest(),
        check_unchanged=lambda: None,
    )
    return {"side_files": (file,)}


def pair(family: str = "bert", **options: Any) -> tuple[Arrays, Arrays]:
    """A base and a model fine-tuned from it."""
    base = model(family, **options)
    return base, finetuned(base)


def adapter(base: Arrays, family: str = "bert", *, rank: int = 2, seed: int = 3) -> Arrays:
    """A LoRA adapter of every matrix of BASE's layers."""
    rng = np.random.default_rng(seed)
    made: Arrays = {}
    for name, array in base.items():
        if array.ndim == 2 and name.startswith(_STEM[family]):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            inputs, outputs = array.shape if family == "gpt2" else array.shape[::-1]
            made[f"{module}.lora_A.weight"] = rng.normal(0, 1, (rank, inputs)).astype("f4")
            made[f"{module}.lora_B.weight"] = rng.normal(0, 0.1, (outputs, rank)).astype("f4")
    return made


def adapter_config(family: str = "bert", *, rank: int = 2, **settings: Any) -> dict[str, Any]:
    """The configuration of such an adapter."""
    plain = {"peft_type": "LORA", "r": rank, "lora_alpha": 3, "fan_in_fan_out": family == "gpt2"}
    return {**plain, **settings}


# --- files ------------------------------------------------------------------------------------


def write_file(path: Path, arrays: Arrays, order: Sequence[str] = ()) -> Path:
    """A safetensors file whose tensors lie in the order given (that of the dict by default)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name in order or arrays:
        array = arrays[name]
        begin, data = len(data), data + array.tobytes()
        header[name] = {
            "dtype": dtype_of(array).name,
            "shape": list(array.shape),
            "data_offsets": [begin, len(data)],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def write_directory(
    path: Path, arrays: Arrays, *, shards: int = 1, config: Mapping[str, Any] | None = None
) -> Path:
    """A model directory: weights in `shards` files with an index, and a config.json."""
    path.mkdir(parents=True)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    names = list(arrays)
    if shards == 1:
        write_file(path / "model.safetensors", arrays)
        return path
    where: dict[str, str] = {}
    for i in range(shards):
        shard = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i::shards]
        where |= dict.fromkeys(part, shard)
        write_file(path / shard, {name: arrays[name] for name in part})
    total = sum(array.nbytes for array in arrays.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def write_adapter(path: Path, arrays: Arrays, config: Mapping[str, Any]) -> Path:
    """A PEFT adapter's directory."""
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    write_file(path / "adapter_model.safetensors", arrays)
    return path


Stored = dict[str, tuple[str, tuple[int, ...], bytes]]


def stored(arrays: Arrays) -> Stored:
    """Dtype, shape and bytes of arrays: what has to be equal where tests say "bit for bit"."""
    return {n: (dtype_of(a).name, a.shape, a.tobytes()) for n, a in sorted(arrays.items())}


def stored_in(path: Path) -> Stored:
    """The same of a file or a directory, as the safetensors library reads it."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    found = [entry for file in files for entry in safetensors.deserialize(file.read_bytes())]
    return {
        name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        for name, entry in sorted(found)
    }


def read(checkpoint: Checkpoint) -> Arrays:
    """All tensors of a checkpoint, read block by block."""
    arrays: Arrays = {}
    for name, view in checkpoint.items():
        parts = [view.read(start, stop) for start, stop in view.blocks()]
        flat = np.concatenate(parts) if parts else np.zeros(0, view.dtype.numpy)
        kind = np.bool_ if view.dtype.name == "BOOL" else view.dtype.numpy
        arrays[name] = flat.view(kind).reshape(view.shape)
    return arrays


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- instruments ------------------------------------------------------------------------------


def around(checkpoint: Checkpoint, watch: Callable[[TensorView, int, int, Any], Any]) -> Checkpoint:
    """A checkpoint of which every pair of blocks read goes through `watch`."""

    def watched(view: TensorView) -> TensorView:
        def read_both(start: int, stop: int) -> Any:
            return watch(view, start, stop, view.read_both(start, stop))

        return replace(view, read_both=read_both)

    return replace(checkpoint, tensors={n: watched(v) for n, v in checkpoint.items()})


def counted(checkpoint: Checkpoint) -> tuple[Checkpoint, list[tuple[str, int, int]]]:
    """A checkpoint, and the list of what was read of it."""
    reads: list[tuple[str, int, int]] = []

    def note(view: TensorView, start: int, stop: int, blocks: Any) -> Any:
        reads.append((view.name, start, stop))
        return blocks

    return around(checkpoint, note), reads


def frozen(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint whose blocks cannot be written to."""

    def freeze(_view: TensorView, _start: int, _stop: int, blocks: Any) -> Any:
        for block in blocks:
            block.flags.writeable = False
        return blocks

    return around(checkpoint, freeze)


def shrink_blocks(monkeypatch: pytest.MonkeyPatch, elements: int = 16) -> None:
    """Cut tensors into blocks of so few elements that tiny ones have many."""
    for module in ("checkpoint", "comparison"):
        monkeypatch.setattr(importlib.import_module(f"weightsurgery.{module}"), "BLOCK", elements)


def wsurg(*arguments: object) -> int:
    """Run a command in this process; the exit code."""
    from weightsurgery.cli import main

    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
    finally:
        signal.signal(signal.SIGTERM, handler)
    return int(stopped.value.code or 0)
