"""What `inspect` says, and what names tell about a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import cases, reference
from weightsurgery.anatomy import find_embedding, kind_of, layer_of, natural_key
from weightsurgery.checkpoint import from_arrays
from weightsurgery.formats import open_checkpoint
from weightsurgery.inspection import inspect
from weightsurgery.stream import Engine


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_sums_by_module_kind_and_dtype(family: str) -> None:
    arrays = cases.model(family)
    found = inspect(from_arrays(arrays, label="a model"))
    sizes = {n: a.size for n, a in arrays.items()}
    assert (found["schema"], found["name"]) == ("wsurg.inspect/1", "a model")
    assert {e["tensor"]: e["parameters"] for e in found["tensors"]} == sizes
    assert found["parameters"] == sum(sizes.values())
    assert found["bytes"] == sum(a.nbytes for a in arrays.values())
    for groups in ("modules", "kinds", "dtypes"):
        for key, total in (("parameters", found["parameters"]), ("bytes", found["bytes"])):
            assert sum(entry[key] for entry in found[groups]) == total
        assert sum(entry["tensors"] for entry in found[groups]) == len(arrays)
    assert json.loads(json.dumps(found)) == found


def test_layers_are_listed_as_people_count() -> None:
    shuffled = dict(reversed(cases.model("llama", layers=12).items()))
    found = inspect(from_arrays(shuffled))
    numbers = [e["name"] for e in found["modules"] if e["name"].startswith("model.layers.")]
    assert numbers == [f"model.layers.{i}" for i in range(12)]


def test_only_headers_are_read() -> None:
    checkpoint, reads = cases.counted(from_arrays(cases.model("bert")))
    plain = inspect(checkpoint)
    assert reads == []
    assert "l2" not in plain["tensors"][0]
    inspect(checkpoint, values=True)
    assert {name for name, _, _ in reads} == set(cases.shapes_of("bert"))


@pytest.mark.parametrize("dtype", cases.DTYPES.values(), ids=cases.DTYPES)
@pytest.mark.parametrize("workers", cases.WORKERS)
def test_values(dtype: Any, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cases.shrink_blocks(monkeypatch)
    arrays = cases.model("bert", dtype=dtype) | {"empty.weight": np.zeros((0, 2), dtype)}
    arrays[cases.EMBEDDING["bert"]][[0, 3, 9], 2] = [np.nan, np.inf, -np.inf]
    found = inspect(from_arrays(arrays), values=True, engine=Engine(workers=workers))
    for entry in found["tensors"]:
        array = arrays[entry["tensor"]]
        if array.dtype != dtype:
            assert "l2" not in entry
            continue
        values = reference.widened(array)
        finite = values[np.isfinite(values)]
        assert entry["l2"] == pytest.approx(np.sqrt((finite**2).sum()), rel=1e-6)
        assert entry["nan"] == np.isnan(values).sum()
        assert entry["infinite"] == np.isinf(values).sum()


def test_files_and_config_of_a_directory(tmp_path: Path) -> None:
    path = cases.write_directory(
        tmp_path / "model", cases.model("bert"), shards=2, config=cases.CONFIGS["bert"]
    )
    (path / "notes.md").write_text("not part of a model")
    found = inspect(open_checkpoint(path))
    assert found["model_type"] == "bert"
    assert found["metadata"] == {"format": "pt"}
    shards = [path / "model.safetensors.index.json", *sorted(path.glob("*.safetensors"))]
    assert found["files"] == [{"file": s.name, "bytes": s.stat().st_size} for s in shards]
    size = (path / "config.json").stat().st_size
    assert found["side_files"] == [{"file": "config.json", "bytes": size}]
    assert [entry["file"] for entry in found["left_out"]] == ["notes.md"]


# --- anatomy ----------------------------------------------------------------------------------

KINDS = {
    "bert.embeddings.word_embeddings.weight": "embedding",
    "bert.embeddings.position_embeddings.weight": "embedding.position",
    "bert.embeddings.token_type_embeddings.weight": "embedding.token_type",
    "bert.embeddings.LayerNorm.weight": "norm",
    "bert.encoder.layer.0.attention.self.query.weight": "attention.query",
    "bert.encoder.layer.0.attention.self.key.bias": "attention.key",
    "bert.encoder.layer.0.attention.self.value.bias": "attention.value",
    "bert.encoder.layer.0.attention.output.dense.weight": "attention.output",
    "bert.encoder.layer.0.attention.output.LayerNorm.bias": "norm",
    "bert.encoder.layer.0.intermediate.dense.weight": "mlp.up",
    "bert.encoder.layer.0.output.dense.weight": "mlp.down",
    "bert.pooler.dense.weight": "head",
    "cls.predictions.bias": "head",
    "classifier.weight": "head",
    "transformer.wte.weight": "embedding",
    "transformer.wpe.weight": "embedding.position",
    "transformer.h.3.ln_1.weight": "norm",
    "transformer.h.3.attn.c_attn.weight": "attention.qkv",
    "transformer.h.3.attn.c_proj.weight": "attention.output",
    "transformer.h.3.mlp.c_fc.weight": "mlp.up",
    "transformer.h.3.mlp.c_proj.weight": "mlp.down",
    "gpt_neox.layers.0.attention.query_key_value.weight": "attention.qkv",
    "gpt_neox.layers.0.attention.dense.weight": "attention.output",
    "gpt_neox.layers.0.mlp.dense_4h_to_h.weight": "mlp.down",
    "gpt_neox.embed_in.weight": "embedding",
    "embed_out.weight": "head",
    "model.embed_tokens.weight": "embedding",
    "model.layers.10.self_attn.o_proj.weight": "attention.output",
    "model.layers.10.mlp.gate_proj.weight": "mlp.gate",
    "model.layers.10.block_sparse_moe.gate.weight": "mlp.router",
    "model.layers.10.block_sparse_moe.experts.0.w2.weight": "mlp.down",
    "model.norm.weight": "norm",
    "lm_head.weight": "head",
    "shared.weight": "embedding",
    "transformer.word_embedding.weight": "embedding",
    "backbone.embeddings.weight": "embedding",
    "roberta_prelayernorm.encoder.layer.0.attention.self.query.weight": "attention.query",
    "encoder.block.0.layer.0.SelfAttention.q.weight": "attention.query",
    "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": "mlp.gate",
    "temperature": "other",
}


@pytest.mark.parametrize(("name", "kind"), KINDS.items(), ids=KINDS)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("bert.encoder.layer.11.output.dense.weight", "bert.encoder.layer.11"),
        ("h.0.ln_1.weight", "h.0"),
        ("model.layers.3", "model.layers.3"),
        ("encoder.block.2.layer.0.SelfAttention.q.weight", "encoder.block.2"),
        ("model.layers.weight", ""),
        ("lm_head.weight", ""),
    ],
)
def test_layers(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def test_natural_order() -> None:
    names = ["layer.10.b", "layer.2.b", "layer.2.a", "a", "layer", "10", "9", ""]
    expected = ["", "9", "10", "a", "layer", "layer.2.a", "layer.2.b", "layer.10.b"]
    assert sorted(names, key=natural_key) == expected


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["wte.weight", "wpe.weight"], "wte.weight"),
        (["a.wte.weight", "b.wte.weight"], None),
        (
            ["transformer.word_embedding.weight", "logits_proj.weight"],
            "transformer.word_embedding.weight",
        ),
        (["encoder.embed_tokens.weight", "shared.weight"], "shared.weight"),
        (["backbone.embeddings.weight", "lm_head.weight"], "backbone.embeddings.weight"),
        (["a.embeddings.weight", "wte.weight"], "wte.weight"),
        (["a.embeddings.weight", "b.embeddings.weight"], None),
        (["embeddings.patch_embeddings.weight", "quantize.embedding.weight"], None),
        (["wte.bias"], None),
        ([], None),
    ],
    ids=[
        "one",
        "two",
        "in the singular",
        "shared",
        "bare",
        "bare beside a full name",
        "two bare",
        "other embeddings",
        "a bias",
        "none",
    ],
)
def test_the_word_embedding(names: list[str], found: str | None) -> None:
    assert find_embedding(names) == found
