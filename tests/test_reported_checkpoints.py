"""Checkpoints that people had: pairs whose files name, split or tie the same tensors otherwise.

What transformers computes from such outputs is the law test's matter; here are the pairs alone,
without torch, through the command line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import cases
from weightsurgery import align, diff, open_checkpoint

Arrays = dict[str, Any]
NUMBERS = np.random.default_rng(5)


def noise(*shape: int) -> Any:
    return NUMBERS.normal(size=shape).astype(np.float32)


def write(folder: Path, arrays: Arrays, config: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def moved(arrays: Arrays) -> Arrays:
    return {name: array + noise(*array.shape) / 100 for name, array in arrays.items()}


def reset(base: Path, tuned: Path, *options: str) -> Arrays:
    """The tensors of `wsurg mix --ratio 1`."""
    out = tuned.parent / "mixed"
    assert cases.wsurg("mix", base, tuned, "--ratio", 1, "-o", out, *options) == 0
    found: Arrays = load_file(out / "model.safetensors")
    return found


# --- vision and language ----------------------------------------------------------------------


def language(prefix: str) -> Arrays:
    layer = {
        **{f"self_attn.{one}_proj.weight": noise(16, 16) for one in "qkvo"},
        **{f"mlp.{one}_proj.weight": noise(32, 16) for one in ("gate", "up")},
        "mlp.down_proj.weight": noise(16, 32),
        "input_layernorm.weight": noise(16),
    }
    found = {f"{prefix}layers.{i}.{name}": a + 0 for i in (0, 1) for name, a in layer.items()}
    return {
        **found,
        f"{prefix}embed_tokens.weight": noise(64, 16),
        f"{prefix}norm.weight": noise(16),
    }


def vision(prefix: str) -> Arrays:
    names = {"attn.qkv.weight": (24, 8), "attn.proj.weight": (8, 8), "norm1.weight": (8,)}
    found = {f"{prefix}blocks.{i}.{n}": noise(*s) for i in (0, 1) for n, s in names.items()}
    patch, merger = noise(8, 3, 2, 4, 4), noise(16, 32)
    return {
        **found,
        f"{prefix}patch_embed.proj.weight": patch,
        f"{prefix}merger.mlp.0.weight": merger,
    }


def test_a_language_model_under_another_prefix(tmp_path: Path) -> None:
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": False,
    }
    ours = {**language("model."), **vision("visual."), "lm_head.weight": noise(64, 16)}

    def today(name: str) -> str:
        if name.startswith("model."):
            return f"model.language_model.{name.removeprefix('model.')}"
        return f"model.{name}" if name.startswith("visual.") else name

    base = write(tmp_path / "base", ours, config)
    tuned = write(tmp_path / "tuned", {today(n): a for n, a in moved(ours).items()}, config)
    report = diff(open_checkpoint(base), open_checkpoint(tuned))
    assert (len(report.tensors), report.warnings) == (len(ours), [])
    mixed = reset(base, tuned)
    assert all(np.array_equal(mixed[today(name)], array) for name, array in ours.items())


def test_a_model_with_images_against_its_language_model(tmp_path: Path) -> None:
    ours = {**language("model."), "lm_head.weight": noise(64, 16)}
    plain = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    with_images = {"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl"}
    flag = {"tie_word_embeddings": False}
    base = write(tmp_path / "base", ours, plain | flag)
    tuned = write(tmp_path / "tuned", moved(ours) | vision("visual."), with_images | flag)
    report = diff(open_checkpoint(base), open_checkpoint(tuned))
    assert len(report.tensors) == len(ours)
    assert all(e["tensor"].startswith("visual.") for e in report.alignment["coverage"]["unpaired"])
    mixed = reset(base, tuned, "--allow-partial")
    assert all(np.array_equal(mixed[name], array) for name, array in ours.items())


def test_a_text_only_fine_tune_of_a_model_with_images(tmp_path: Path) -> None:
    ours = language("language_model.model.")
    with_images = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text"},
    }
    plain = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
    tower = {"vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": noise(8, 8)}
    base = write(tmp_path / "base", ours | tower, with_images)
    text = {n.removeprefix("language_model."): a for n, a in moved(ours).items()}
    tuned = write(tmp_path / "tuned", text, plain)
    found = align(open_checkpoint(base), open_checkpoint(tuned))
    assert (found.coverage.is_complete, found.warnings) == (True, ())
    mixed = reset(base, tuned)
    assert all(np.array_equal(mixed[n.removeprefix("language_model.")], a) for n, a in ours.items())


# --- mixtures of experts ----------------------------------------------------------------------

EXPERTS = "model.layers.0.mlp.experts"
QWEN_MOE = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}


def apart(experts: int = 4) -> Arrays:
    shapes = {"gate_proj": (8, 16), "up_proj": (8, 16), "down_proj": (16, 8)}
    return {
        f"{EXPERTS}.{e}.{name}.weight": noise(*shape)
        for e in range(experts)
        for name, shape in shapes.items()
    } | {"model.norm.weight": noise(16)}


def fused(arrays: Arrays, experts: int = 4) -> Arrays:
    def of(name: str) -> Any:
        return np.stack([arrays[f"{EXPERTS}.{e}.{name}.weight"] for e in range(experts)])

    return {
        f"{EXPERTS}.gate_up_proj": np.concatenate([of("gate_proj"), of("up_proj")], axis=1),
        f"{EXPERTS}.down_proj": of("down_proj"),
        "model.norm.weight": arrays["model.norm.weight"],
    }


@pytest.mark.parametrize("config", [QWEN_MOE, {}], ids=["known", "unknown"])
@pytest.mark.parametrize("way", ["fused in TUNED", "fused in BASE"])
def test_experts_apart_and_fused(tmp_path: Path, way: str, config: dict[str, Any]) -> None:
    ours = apart()
    theirs, right = moved(ours), ours
    if way == "fused in TUNED":
        theirs, right = fused(theirs), fused(ours)
    base = write(tmp_path / "base", ours if way == "fused in TUNED" else fused(ours), config)
    tuned = write(tmp_path / "tuned", theirs, config)
    report = diff(open_checkpoint(base), open_checkpoint(tuned))
    assert (len(report.tensors), report.model["count"]) == (len(theirs), 1552)
    assert report.alignment["only_in_base"] == []
    mixed = reset(base, tuned)
    assert mixed.keys() == right.keys()
    assert all(np.array_equal(mixed[name], array) for name, array in right.items())


def test_an_expert_that_base_lacks_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = apart()
    lacking = {n: a for n, a in ours.items() if ".experts.2." not in n}
    # The loading library numbers what it finds: three experts make another tensor than four.
    base = write(tmp_path / "base", lacking, QWEN_MOE)
    tuned = write(tmp_path / "tuned", fused(moved(ours)), QWEN_MOE)
    assert cases.wsurg("mix", base, tuned, "-o", tmp_path / "out") == 4
    reason = "the model's tensor has shape [4, 16, 8]; BASE's make one of [3, 16, 8]"
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- vocabularies -----------------------------------------------------------------------------


def vocabulary(rows: int, prefix: str) -> Arrays:
    return {
        f"{prefix}embed_tokens.weight": noise(rows, 16),
        f"{prefix}layers.0.mlp.up_proj.weight": noise(16, 16),
        "lm_head.weight": noise(rows, 16),
    }


VOCABULARIES: dict[str, tuple[str, Any]] = {
    "in text_config": (
        "model.language_model.",
        lambda rows: {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "model_type": "qwen3_vl",
            "tie_word_embeddings": False,
            "text_config": {"model_type": "qwen3_vl_text", "vocab_size": rows},
        },
    ),
    "in config.json": (
        "model.",
        lambda rows: {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "tie_word_embeddings": False,
            "vocab_size": rows,
        },
    ),
    "off by one": (
        "model.",
        lambda rows: {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "tie_word_embeddings": False,
            "vocab_size": 64 if rows == 64 else rows - 1,
        },
    ),
    "nowhere": ("model.", lambda _: {}),
}


@pytest.mark.parametrize(("prefix", "config"), VOCABULARIES.values(), ids=VOCABULARIES)
def test_a_vocabulary_that_grew(tmp_path: Path, prefix: str, config: Any) -> None:
    ours = vocabulary(64, prefix)
    theirs = moved(ours)
    for name in (f"{prefix}embed_tokens.weight", "lm_head.weight"):
        theirs[name] = np.concatenate([theirs[name], noise(3, 16)])
    base = write(tmp_path / "base", ours, config(64))
    tuned = write(tmp_path / "tuned", theirs, config(67))
    mixed = reset(base, tuned)
    for name, array in ours.items():
        assert np.array_equal(mixed[name][: len(array)], array)
        assert np.array_equal(mixed[name][len(array) :], theirs[name][len(array) :])


# --- old spellings ----------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_gamma_and_beta(tmp_path: Path, side: str) -> None:
    new = {
        "bert.embeddings.LayerNorm.weight": noise(8),
        "bert.embeddings.LayerNorm.bias": noise(8),
        "bert.embeddings.word_embeddings.weight": noise(9, 8),
    }

    def old(name: str) -> str:
        return name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")

    config = {"architectures": ["BertForMaskedLM"], "model_type": "bert"}
    spelled = {"base": new, "tuned": moved(new)}
    spelled[side] = {old(name): array for name, array in spelled[side].items()}
    base, tuned = (write(tmp_path / name, arrays, config) for name, arrays in spelled.items())
    mixed = reset(base, tuned)
    assert mixed.keys() == spelled["tuned"].keys()
    for name, array in new.items():
        assert np.array_equal(mixed[old(name) if side == "tuned" else name], array)
