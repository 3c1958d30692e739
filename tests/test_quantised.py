"""Every sign of quantized or packed weights is one, and nothing else is."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import cases
from weightsurgery import from_arrays
from weightsurgery.checkpoint import Checkpoint, TensorView
from weightsurgery.dtypes import DTYPES
from weightsurgery.errors import PolicyError
from weightsurgery.quantised import leftover_warnings, require_unquantised

F4 = np.zeros((2, 4), np.float32)
NAMES = {
    "GPTQ or AWQ codes": ["layer.qweight", "layer.qzeros", "layer.g_idx"],
    "bitsandbytes codes and scales": [
        *("layer.weight.absmax", "layer.weight.quant_map", "layer.SCB", "layer.weight_format"),
        *("layer.weight.quant_state.bitsandbytes__nf4", "layer.weight.quant_state.x"),
        "layer.weight.nested_absmax",
    ],
    "packed codes (compressed-tensors)": ["layer.weight_packed"],
    "HQQ codes": ["layer.W_q"],
    "quanto codes and scales": ["layer.weight._data", "layer.weight._scale"],
    "torchao codes": ["layer.weight_qdata"],
    "scales of quantized weights": [
        *("layer.weight_scale", "layer.weight_scale_2", "layer.weight_scale_inv"),
        *("experts.gate_up_proj_scale", "experts.down_proj_scale_inv"),
    ],
}
CASES = [(name, stored) for stored, names in NAMES.items() for name in names]
# What the hub's quantized checkpoints store for one matrix, each alone enough to know it.
MATRICES: dict[str, tuple[dict[str, Any], str]] = {
    "MXFP4": (
        {
            "e.gate_up_proj_blocks": np.zeros((4, 8, 2, 16), "u1"),
            "e.gate_up_proj_scales": np.zeros((4, 8, 2), "u1"),
        },
        "MXFP4 blocks and scales",
    ),
    "bitsandbytes 4-bit": ({"l.weight": np.zeros((8, 1), "u1")}, "8-bit codes"),
    "bitsandbytes 8-bit": ({"l.weight": np.zeros((2, 4), "i1")}, "8-bit codes"),
    "NVFP4": ({"l.weight": np.zeros((2, 2), "u1")}, "8-bit codes"),
    "8-bit experts": ({"e.down_proj": np.zeros((2, 2, 4), "i1")}, "8-bit codes"),
}
PACKED = {
    **dict.fromkeys(("F8_E8M0", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ"), 8),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


@pytest.mark.parametrize(("name", "stored"), CASES)
def test_names_of_quantized_tensors(name: str, stored: str) -> None:
    with pytest.raises(PolicyError, match=re.escape(f"stores {stored} (F32)")) as told:
        require_unquantised(from_arrays({"a.weight": F4, name: F4}))
    assert (told.value.tensor, told.value.code) == (name, "E-QUANTISED-TENSOR")


@pytest.mark.parametrize(("dtype", "bits"), PACKED.items())
def test_dtypes_without_arithmetic(dtype: str, bits: int) -> None:
    view = TensorView("w", (8,), DTYPES[dtype], lambda *_: (F4, F4))
    with pytest.raises(PolicyError, match=rf"stores {bits}-bit floating-point codes \({dtype}\)"):
        require_unquantised(Checkpoint({"w": view}, label="m"))


@pytest.mark.parametrize(("arrays", "stored"), MATRICES.values(), ids=MATRICES.keys())
def test_matrices_of_bytes_are_codes(arrays: dict[str, Any], stored: str) -> None:
    for name, array in arrays.items():
        with pytest.raises(PolicyError, match=f"stores {stored}") as told:
            require_unquantised(from_arrays({"a.weight": F4, name: array}))
        assert told.value.tensor == name


@pytest.mark.parametrize(("arrays", "stored"), MATRICES.values(), ids=MATRICES.keys())
@pytest.mark.parametrize("command", ["mix", "convert", "interpolate", "purify"])
def test_single_files_are_known_too(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    arrays: dict[str, Any],
    stored: str,
) -> None:
    path = cases.write_file(tmp_path / "x.safetensors", {"a.weight": F4, **arrays})
    inputs = [path] if command == "convert" else [path, path]
    more = ["--dtype", "bf16"] if command == "convert" else []
    assert cases.wsurg(command, *inputs, *more, "-o", tmp_path / "out.safetensors") == 5
    assert f"stores {stored} (" in capsys.readouterr().err


CONFIGS = [
    ({"quantization_config": {"bits": 4}}, "of an unknown method"),
    ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
    ({"parts": [[{"quantization_config": "gptq"}]]}, "gptq"),
]


@pytest.mark.parametrize(("config", "method"), CONFIGS)
@pytest.mark.parametrize(
    "codes", [np.zeros((2, 2), "i2"), np.zeros((2, 2), "i4"), np.zeros((2, 2), "i8")]
)
def test_a_configuration_counts_where_the_tensors_are_not_plain(
    config: dict[str, Any], method: str, codes: Any
) -> None:
    found = from_arrays({"w": F4, "layer.indices_of_codes": codes}, config=config)
    reason = rf"config\.json has a quantization_config \({method}\), and this tensor is I"
    with pytest.raises(PolicyError, match=reason) as told:
        require_unquantised(found)
    assert told.value.tensor == "layer.indices_of_codes"
    assert leftover_warnings(found) == []


def test_a_configuration_counts_where_nothing_is_floating() -> None:
    config = {"quantization_config": {"quant_method": "new"}}
    with pytest.raises(PolicyError, match="it may hold quantized values"):
        require_unquantised(from_arrays({"w": np.zeros(4, "i8")}, config=config))
    require_unquantised(from_arrays({}, config=config))
    assert leftover_warnings(from_arrays({}, config=config)) == []


@pytest.mark.parametrize(("config", "method"), CONFIGS)
def test_plain_tensors_are_plain_whatever_the_configuration_says(
    config: dict[str, Any], method: str
) -> None:
    arrays = {"w": F4.astype("f2"), "norm": F4[0], "position_ids": np.zeros((1, 4), "i8")}
    arrays |= {"h.0.attn.bias": np.zeros((1, 1, 4, 4), "u1"), "causal_mask": np.ones((4, 4), "?")}
    found = from_arrays(arrays, config=config)
    require_unquantised(found)
    (warning,) = leftover_warnings(found)
    assert warning == (
        f"config.json has a quantization_config ({method}), but the tensors are plain F16 and F32; "
        "outputs omit it"
    )


LEFTOVER = {
    "model_type": "bert",
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "text_config": {"quantization_config": {"quant_method": "bitsandbytes"}, "a": 1},
}
OUTPUTS = {
    "convert": ["convert", "tuned"],
    "convert to bf16": ["convert", "tuned", "--dtype", "bf16"],
    "mix": ["mix", "base", "tuned"],
    "interpolate": ["interpolate", "base", "tuned"],
}


@pytest.mark.parametrize("words", OUTPUTS.values(), ids=OUTPUTS.keys())
def test_outputs_have_no_leftover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, seed in (("base", 1), ("tuned", 2)):
        arrays = cases.model("bert", seed=seed)
        cases.write_directory(tmp_path / name, arrays, config=LEFTOVER)
    assert cases.wsurg(*words, "-o", "out") == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {"model_type": "bert", "text_config": {"a": 1}}
    record = json.loads((tmp_path / "out" / "wsurg-record.json").read_text())
    said = [warning for warning in record["warnings"] if "quantization_config" in warning]
    assert len(said) == 1
    given = (tmp_path / "tuned" / "config.json").read_bytes()
    hashed = {f["name"]: f["sha256"] for f in record["inputs"][-1]["files"]}
    assert hashed["config.json"] == hashlib.sha256(given).hexdigest()
    proof = [] if words[0] != "mix" else ["--base", "base", "--tuned", "tuned"]
    assert cases.wsurg("verify", "out", *proof) == 0
    assert cases.wsurg("replay", "out", "-o", "again") == 0


def test_commands_say_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    cases.write_directory(tmp_path / "base", cases.model("bert"))
    cases.write_directory(tmp_path / "tuned", cases.model("bert", seed=2), config=LEFTOVER)
    for words in (["inspect", "tuned"], ["diff", "base", "tuned"]):
        assert cases.wsurg(*words) == 0
        told = capsys.readouterr()
        assert (told.out + told.err).count("has a quantization_config (bitsandbytes)") == 1


def test_a_quantized_model_that_is_copied_keeps_its_configuration(tmp_path: Path) -> None:
    arrays = {**cases.model("bert"), "layer.qweight": np.zeros((2, 2), "i4")}
    path = cases.write_directory(tmp_path / "in", arrays, config=LEFTOVER)
    assert cases.wsurg("convert", path, "-o", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == LEFTOVER


@pytest.mark.slow
def test_transformers_loads_an_output_without_the_leftover(tmp_path: Path) -> None:
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    module = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    module.save_pretrained(tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    leftover = {"quantization_config": LEFTOVER["quantization_config"]}
    path.write_text(json.dumps({**json.loads(path.read_text()), **leftover}))
    with pytest.raises(ImportError, match="bitsandbytes"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "in")
    assert cases.wsurg("convert", tmp_path / "in", "-o", tmp_path / "out") == 0
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    for name, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_what_only_looks_like_it() -> None:
    plain = {
        "layer.weight": F4,
        "scale": F4,
        "logit_scale": F4,
        "weight_mask": np.zeros((2, 2), "i1"),
        "token_type.weight": np.zeros(4, "u1"),
        "weight_g": F4,
        "position_ids": np.zeros((1, 4), "i8"),
    }
    plain |= {"router_scales": F4, "vision.blocks": F4, "attn.bias": np.zeros((1, 1, 2, 2), "u1")}
    config = {"quantization_config": None, "text_config": {"quantization_config": {}}}
    require_unquantised(from_arrays(plain, config=config))
    assert leftover_warnings(from_arrays(plain, config=config)) == []
