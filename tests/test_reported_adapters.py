"""Adapters as trainers leave them: split factors, other weights beside them, low precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests import cases
from weightsurgery import apply_adapter, from_arrays, open_checkpoint, save, verify_adapter
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.errors import FormatError, MismatchError, PolicyError

FRONT = "base_model.model."
LAYER = "model.layers.0."
PHI3 = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}
SPLIT = {
    "self_attn.q_proj": (12, 6),
    "self_attn.k_proj": (4, 6),
    "self_attn.v_proj": (4, 6),
    "mlp.gate_proj": (8, 6),
    "mlp.up_proj": (8, 6),
}


def fused() -> cases.Arrays:
    rng = np.random.default_rng(0)
    shapes = {"self_attn.qkv_proj": (20, 6), "mlp.gate_up_proj": (16, 6), "mlp.down_proj": (6, 8)}
    return {f"{LAYER}{n}.weight": rng.normal(size=s).astype("f4") for n, s in shapes.items()}


def factors(shapes: dict[str, tuple[int, int]], front: str = FRONT + LAYER) -> cases.Arrays:
    rng = np.random.default_rng(1)
    made = {}
    for name, (rows, columns) in shapes.items():
        made[f"{front}{name}.lora_A.weight"] = rng.normal(size=(2, columns)).astype("f4")
        made[f"{front}{name}.lora_B.weight"] = rng.normal(size=(rows, 2)).astype("f4")
    return made


def change_of(adapter: cases.Arrays, name: str) -> Any:
    a, b = (adapter[f"{FRONT}{LAYER}{name}.lora_{n}.weight"] for n in "AB")
    return 2 * b @ a


def adapter_of(tensors: cases.Arrays, **config: Any) -> Checkpoint:
    return from_arrays(tensors, config=cases.adapter_config(r=2, lora_alpha=4, **config))


@pytest.mark.parametrize("alone", [[*SPLIT], *([name] for name in SPLIT)], ids="+".join)
def test_split_factors_are_added_to_the_rows_of_a_fused_matrix(alone: list[str]) -> None:
    base, adapter = fused(), factors({name: SPLIT[name] for name in alone})
    expected = {name: array.copy() for name, array in base.items()}
    first = {"q_proj": 0, "k_proj": 12, "v_proj": 16, "gate_proj": 0, "up_proj": 8}
    for name in alone:
        kind = name.rpartition(".")[2]
        stored = (
            "self_attn.qkv_proj" if kind in ("q_proj", "k_proj", "v_proj") else "mlp.gate_up_proj"
        )
        start = first[kind]
        expected[f"{LAYER}{stored}.weight"][start : start + SPLIT[name][0]] += change_of(
            adapter, name
        )
    merged = apply_adapter(from_arrays(base, config=PHI3), adapter_of(adapter))
    for name, array in cases.read(merged).items():
        np.testing.assert_allclose(array, expected[name], atol=1e-5)


def test_rows_that_interleave_are_not_split() -> None:
    base = from_arrays(fused(), config={"model_type": "codegen"})
    with pytest.raises(MismatchError, match=r"BASE has no .*q_proj\.weight'"):
        apply_adapter(base, adapter_of(factors({"self_attn.q_proj": (12, 6)})))


@pytest.mark.parametrize(
    "change",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.replace("mlp", "mlp._orig_mod"),
    ],
    ids=["compiled", "distributed", "named", "compiled inside"],
)
def test_wrappers_and_the_adapters_name_are_ignored_with_a_warning(change: Any) -> None:
    base = from_arrays(fused(), config=PHI3)
    plain = factors({"mlp.down_proj": (6, 8)})
    expected = apply_adapter(base, adapter_of(plain))
    found = apply_adapter(base, adapter_of({change(n): a for n, a in plain.items()}))
    assert cases.stored(cases.read(found)) == cases.stored(cases.read(expected))
    assert [w for w in found.warnings if "was ignored" in w]
    assert not [w for w in expected.warnings if "was ignored" in w]


def test_names_without_pefts_prefix_are_transformers_own() -> None:
    base = from_arrays(fused(), config=PHI3)
    plain = factors({"mlp.down_proj": (6, 8)})
    expected = apply_adapter(base, adapter_of(plain))
    found = apply_adapter(base, adapter_of({n.removeprefix(FRONT): a for n, a in plain.items()}))
    assert cases.stored(cases.read(found)) == cases.stored(cases.read(expected))


def test_copies_of_a_saved_module_are_one_unless_they_differ() -> None:
    base = from_arrays({**fused(), "lm_head.weight": np.ones((5, 6), "f4")}, config=PHI3)
    head = np.full((5, 6), 3, "f4")
    names = [f"{FRONT}lm_head.{n}weight" for n in ("", "modules_to_save.", "original_module.")]
    tensors = dict(zip(names, (head, head, np.ones((5, 6), "f4")), strict=True))
    config = {"modules_to_save": ["lm_head"]}
    merged = apply_adapter(base, adapter_of(tensors, **config))
    assert cases.read(merged)["lm_head.weight"].tolist() == head.tolist()
    unused = {one["tensor"] for one in merged.notes["adapters"][0]["unused"]}
    assert len(unused) == 2
    assert names[2] in unused
    tensors[names[1]] = head + 1
    with pytest.raises(FormatError, match="has the same role"):
        apply_adapter(base, adapter_of(tensors, **config))


def on_disk(place: Path) -> tuple[Path, Path]:
    """A model with a projector, and an adapter's folder."""
    arrays = {**fused(), "model.projector.weight": np.ones((3, 6), "f4")}
    base = cases.write_directory(place / "base", arrays, config=PHI3)
    (base / "tokenizer.json").write_text('{"old": 1}')
    settings = cases.adapter_config(r=2, lora_alpha=4, base_model_name_or_path="base")
    cases.write_adapter(place / "adapter", factors({"mlp.down_proj": (6, 8)}), settings)
    return base, place / "adapter"


@pytest.mark.parametrize("front", ["", FRONT], ids=["the model's names", "PEFT's names"])
def test_weights_beside_an_adapter_are_merged(front: str, tmp_path: Path) -> None:
    base, adapter = on_disk(tmp_path)
    trained = np.full((3, 6), 7, "f4")
    save_file({f"{front}model.projector.weight": trained}, adapter / "projector.safetensors")
    opened = open_checkpoint(base), open_checkpoint(adapter)
    save(apply_adapter(*opened), tmp_path / "out")
    merged = open_checkpoint(tmp_path / "out")
    assert cases.read(merged)["model.projector.weight"].tolist() == trained.tolist()
    assert verify_adapter(opened[0], [opened[1]], merged)["proved"]


def test_weights_beside_an_adapter_that_fit_nothing_are_refused_by_name(tmp_path: Path) -> None:
    base, adapter = on_disk(tmp_path)
    save_file({"v_head.weight": np.ones((1, 6), "f4")}, adapter / "value_head.safetensors")
    with pytest.raises(MismatchError, match=r"value_head\.safetensors: .*; move the file out"):
        apply_adapter(open_checkpoint(base), open_checkpoint(adapter))
    (adapter / "value_head.safetensors").rename(adapter / "non_lora.bin")
    with pytest.raises(FormatError, match=r"non_lora\.bin: not a PyTorch file"):
        open_checkpoint(adapter)
    (adapter / "non_lora.bin").rename(adapter / "optimizer.pt")  # a training's own state
    assert len(open_checkpoint(adapter)) == 2


def test_a_tensor_in_two_of_the_files_is_refused(tmp_path: Path) -> None:
    _, adapter = on_disk(tmp_path)
    same = f"{FRONT}{LAYER}mlp.down_proj.lora_A.weight"
    save_file({same: np.ones((2, 8), "f4")}, adapter / "more.safetensors")
    with pytest.raises(PolicyError, match=r"more\.safetensors both have"):
        open_checkpoint(adapter)


def test_an_adapters_tokenizer_travels_with_a_warning(tmp_path: Path) -> None:
    base, adapter = on_disk(tmp_path)
    opened = open_checkpoint(base)
    assert not apply_adapter(opened, open_checkpoint(adapter)).warnings
    (adapter / "tokenizer.json").write_text('{"new": 1}')
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    merged = apply_adapter(opened, open_checkpoint(adapter))
    (warning,) = merged.warnings
    assert "written in place of BASE's: chat_template.jinja, tokenizer.json" in warning
    save(merged, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == {"new": 1}
    assert cases.wsurg("verify", tmp_path / "out") == 0


def test_a_merge_in_low_precision_is_rounded_otherwise_and_not_proved() -> None:
    rng = np.random.default_rng(3)
    half = ml_dtypes.bfloat16
    name, rank = "mlp.down_proj", 16
    weight = rng.normal(size=(64, 48)).astype(half)
    a, b = (0.1 * rng.normal(size=s) for s in ((rank, 48), (64, rank)))
    tensors = {
        f"{FRONT}{LAYER}{name}.lora_{n}.weight": f.astype("f4") for n, f in (("A", a), ("B", b))
    }
    base = from_arrays({f"{LAYER}{name}.weight": weight}, config=PHI3)
    adapter = from_arrays(tensors, config=cases.adapter_config(r=rank, lora_alpha=24))
    change = (b.astype("f4") @ a.astype("f4")).astype(half)
    scaled = (change.astype("f4") * np.float32(1.5)).astype(half)
    verdicts = {}
    for label, by in (("low precision", scaled), ("no scale", change)):
        after = (weight.astype("f4") + by.astype("f4")).astype(half)
        # One element is further off than its own rounding explains.
        after.reshape(-1)[0] = (after.reshape(-1)[0].astype("f4") * 1.03).astype(half)
        merged = from_arrays({f"{LAYER}{name}.weight": after}, config=PHI3)
        report = verify_adapter(base, [adapter], merged)
        assert not report["proved"]
        verdicts[label] = report["tensors"][0]["verdict"]
    assert verdicts == {"low precision": "rounded otherwise", "no scale": "wrong scale"}
