"""convert: rounding against whole arrays, what overflows, what stays, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import cases, reference
from weightsurgery.checkpoint import from_arrays
from weightsurgery.cli import main
from weightsurgery.errors import NonFiniteError, PolicyError, SettingError
from weightsurgery.formats import open_checkpoint, save
from weightsurgery.masks import changed_mask
from weightsurgery.operators.convert import convert
from weightsurgery.stream import Engine

TARGETS = {"bf16": cases.BF16, "f16": np.dtype(np.float16), "f32": np.dtype(np.float32)}
EVERY_TARGET = pytest.mark.parametrize("target", TARGETS)


def numbers(dtype: np.dtype) -> np.ndarray:
    """Numbers of all sizes, ties between two of a narrower dtype, and what is not a number."""
    rng = np.random.default_rng(3)
    spread = rng.normal(size=3000) * 10.0 ** rng.integers(-6, 4, 3000)
    ties = (2048 + np.arange(200)) * (1 + 2.0**-12) + 2.0**-30
    odd = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 65504.0, 65519.9])
    with np.errstate(over="ignore", under="ignore"):
        return np.concatenate([spread, ties, odd]).astype(np.float32).astype(dtype)


def whole(checkpoint, name: str = "w") -> np.ndarray:
    return cases.read(checkpoint)[name]


@EVERY_TARGET
@pytest.mark.parametrize("source", cases.DTYPES)
def test_every_number_is_rounded_once(source: str, target: str) -> None:
    array = numbers(cases.DTYPES[source])
    found = whole(convert(from_arrays({"w": array}), dtype=target, allow_nonfinite=True))
    if array.dtype == TARGETS[target]:
        assert found.tobytes() == array.tobytes()
        return
    expected = reference.rounded(reference.widened(array), TARGETS[target])
    real = ~np.isnan(reference.widened(array))
    assert found.dtype == TARGETS[target]
    assert found[real].tobytes() == expected[real].tobytes()
    assert np.isnan(reference.widened(found[~real])).all()


def test_a_double_is_not_rounded_twice() -> None:
    """In two steps 1 + 2**-8 + 2**-40 would lose its last bit, and then go to even: 1."""
    array = np.array([1 + 2.0**-8 + 2.0**-40])
    assert float(whole(convert(from_arrays({"w": array}), dtype="bf16"))[0]) == 1 + 2.0**-7


@EVERY_TARGET
def test_what_is_no_float_stays(target: str) -> None:
    arrays = cases.model("bert")
    found = cases.read(convert(from_arrays(arrays), dtype=target))
    for name, array in arrays.items():
        floating = array.dtype.kind not in "ib"
        assert found[name].dtype == (TARGETS[target] if floating else array.dtype)
        assert floating or found[name].tobytes() == array.tobytes()


def test_keep_copies_every_byte(tmp_path: Path) -> None:
    cases.write_directory(tmp_path / "in", cases.model("llama"), shards=2)
    record = save(convert(open_checkpoint(tmp_path / "in")), tmp_path / "out")
    assert cases.stored_in(tmp_path / "out") == cases.stored_in(tmp_path / "in")
    assert {entry["status"] for entry in record["tensors"].values()} == {"copied"}
    assert record["recipe"]["operator"] == "convert"


def test_overflow_is_refused_with_counts(tmp_path: Path) -> None:
    large = {
        "a": np.array([7e4, 1.0, -7e4, np.inf, np.nan], np.float32),
        "b": np.array([65519.0, 65520.0], np.float32),
        "c": np.array([1.0, np.nan, -np.inf], np.float32),
    }
    given = from_arrays(large)
    reason = (
        r"3 finite numbers are too large for F16 .* 'a' \(2 of 5\), 'b' \(1 of 2\); .*allow-non"
    )
    with pytest.raises(NonFiniteError, match=reason):
        convert(given, dtype="f16")
    allowed = convert(given, dtype="f16", allow_nonfinite=True)
    record = save(allowed, tmp_path / "out.safetensors")
    assert record["report"]["convert"]["overflow"] == {"a": 2, "b": 1}
    assert any("3 finite numbers" in warning for warning in record["warnings"])
    assert whole(allowed, "a")[:4].tolist() == [np.inf, 1.0, -np.inf, np.inf]
    assert convert(given, dtype="bf16").notes["convert"] == {"overflow": {}, "kept": {}}


def test_overflow_names_a_few_tensors_of_many() -> None:
    given = from_arrays({f"w{i}": np.full(2, 1e39) for i in range(9)})
    with pytest.raises(NonFiniteError, match=r"18 finite .*'w4' \(2 of 2\) and 4 more tensors"):
        convert(given, dtype="f32")


def test_the_largest_floats_overflow_in_bf16() -> None:
    given = from_arrays({"w": np.array([np.finfo(np.float32).max], np.float32)})
    with pytest.raises(NonFiniteError, match="1 finite number is too large for BF16"):
        convert(given, dtype="bf16")


def test_only_what_can_overflow_is_read_beforehand() -> None:
    arrays = {"half": np.ones(4, np.float16), "single": np.ones(4, np.float32)}
    watched, reads = cases.counted(from_arrays(arrays))
    convert(watched, dtype="f32")
    assert reads == []
    convert(watched, dtype="f16")
    assert reads == [("single", 0, 4)]


@pytest.mark.parametrize("block", [1 << 20, 16], ids=["whole", "cut"])
def test_counts_do_not_depend_on_workers(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.where(np.arange(100) % 7, 1, 1e6).astype(np.float32).reshape(10, 10)
    cases.shrink_blocks(monkeypatch, block)
    for workers in cases.WORKERS:
        made = convert(
            from_arrays({"w": array}),
            dtype="f16",
            allow_nonfinite=True,
            engine=Engine(workers=workers),
        )
        assert made.notes["convert"]["overflow"] == {"w": 15}


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_the_config_tells_the_new_dtype(key: str, tmp_path: Path) -> None:
    config = {"model_type": "bert", key: "float32"}
    cases.write_directory(tmp_path / "in", cases.model("bert"), config=config)
    save(convert(open_checkpoint(tmp_path / "in"), dtype="bf16"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {**config, key: "bfloat16"}
    assert json.loads((tmp_path / "in" / "config.json").read_text()) == config


def test_every_part_of_a_model_tells_the_new_dtype(tmp_path: Path) -> None:
    def config(first: str, second: str, third: str) -> dict[str, Any]:
        return {
            "model_type": "two-parts",
            "dtype": first,
            "text_config": {"torch_dtype": second, "vocab_size": 11, "dtype": None},
            "vision_config": {"layers": [{"dtype": third}, "float32"], "embed_dtype": "float32"},
            "index": {"dtype": "int8"},
            "loading": {"torch_dtype": "auto"},
        }

    before = config("float32", "bfloat16", "torch.float16")
    cases.write_directory(tmp_path / "in", cases.model("bert"), config=before)
    made = convert(open_checkpoint(tmp_path / "in"), dtype="f16")
    save(made, tmp_path / "out")
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after == dict(made.config) == config("float16", "float16", "float16")


def test_a_config_that_tells_none_stays(tmp_path: Path) -> None:
    cases.write_directory(tmp_path / "in", cases.model("bert"), config={"model_type": "bert"})
    save(convert(open_checkpoint(tmp_path / "in"), dtype="f16"), tmp_path / "out")
    before, after = ((tmp_path / n / "config.json").read_bytes() for n in ("in", "out"))
    assert before == after


def test_quantised_weights_are_copied_but_not_rounded() -> None:
    arrays = {"w": np.ones(2, np.float32), "codes": np.ones((2, 3), np.int16)}
    given = from_arrays(arrays, config={"quantization_config": {"bits": 4}})
    assert cases.stored(cases.read(convert(given))) == cases.stored(cases.read(given))
    with pytest.raises(PolicyError, match="quantization_config"):
        convert(given, dtype="f16")


def test_the_mask_of_a_conversion_is_full() -> None:
    made = convert(from_arrays({"w": np.ones(11, np.float32)}), dtype="bf16")
    assert whole(changed_mask(made)).tolist() == [255, 7]


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    told = capsys.readouterr()
    return int(ended.value.code or 0), told.out, told.err


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    weight = torch.arange(6.0).reshape(2, 3)
    torch.save({"w": weight, "tied": weight}, "m.pt")
    start = ["convert", "m.pt", "--dtype", "f16", "-o", "m.safetensors"]
    code, out, _ = run([*start, "--dry-run", "--json"], capsys)
    assert (code, json.loads(out)["tensors"]) == (0, {"edited": 2})
    assert not Path("m.safetensors").exists()
    code, out, _ = run([*start, "--json"], capsys)
    assert (code, json.loads(out)["recipe"]["settings"]) == (
        0,
        {"dtype": "f16", "exclude": [], "allow_nonfinite": False},
    )
    assert "tied, w share memory" in json.loads(out)["warnings"][0]
    assert whole(open_checkpoint("m.safetensors")).tolist() == weight.tolist()
    assert run(start, capsys)[0] == 5
    assert run([*start, "--overwrite", "--no-hash"], capsys)[0] == 0


def test_shards_of_a_pickled_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    torch.save({f"w{i}": torch.full((4,), float(i)) for i in range(4)}, "in/pytorch_model.bin")
    arguments = ["convert", "in", "--max-shard-size", "32", "-o", "out"]
    assert run(arguments, capsys)[0] == 0
    assert len(list(Path("out").glob("model-*-of-00002.safetensors"))) == 2
    assert not list(Path("out").glob("*.bin"))


# --- tensors that keep their dtype ------------------------------------------------------------

BIAS = "model.layers.0.mlp.gate.e_score_correction_bias"
ROUTED = {
    "model.embed_tokens.weight": np.ones((4, 2), cases.BF16),
    "model.layers.0.mlp.gate.weight": np.ones((4, 2), np.float32),
    BIAS: (7.8 + np.arange(64) / 1000).astype(np.float32),
}


def kept(arrays: cases.Arrays, target: str, **config: Any) -> dict[str, str]:
    """The tensors that stay as they are, with their reasons."""
    given = from_arrays(arrays, config=config)
    made = convert(given, dtype=target)
    found = made.notes["convert"]["kept"]
    read = cases.read(made)
    for name, array in arrays.items():
        if name in found:
            assert read[name].tobytes() == array.tobytes()
            assert read[name].dtype == array.dtype != TARGETS[target]
        else:
            assert read[name].dtype == TARGETS[target]
    told = [warning for warning in made.warnings if "as stored because" in warning]
    assert len(told) == bool(found)
    return found


@pytest.mark.parametrize("target", ["bf16", "f16"])
@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe", "unknown", None])
def test_a_routers_bias_stays(target: str, model_type: str | None) -> None:
    config = {"model_type": model_type, "torch_dtype": "bfloat16"} if model_type else {}
    assert kept(ROUTED, target, **config) == {BIAS: "float32 in transformers"}


def test_in_float32_nothing_is_kept() -> None:
    assert kept({BIAS: np.ones(3, cases.BF16)}, "f32", model_type="deepseek_v3") == {}


T5 = {
    "encoder.block.0.layer.1.DenseReluDense.wi.weight": np.ones((4, 2), np.float32),
    "encoder.block.0.layer.1.DenseReluDense.wo.weight": np.ones((2, 4), np.float32),
}


def test_some_are_kept_from_f16_alone() -> None:
    """T5's `wo` overflows in F16, not in BF16."""
    (_, wo) = T5
    assert kept(T5, "f16", model_type="t5") == {wo: "float32 in transformers"}
    assert kept(T5, "bf16", model_type="t5") == {}
    assert kept(T5, "f16", model_type="bert") == {}


def test_what_is_kept_is_not_widened() -> None:
    """A BF16 number is exact in float32, so that nothing is lost as it is."""
    wi, wo = T5
    arrays = {wi: np.ones(2, cases.BF16), wo: np.full(2, 1e30).astype(cases.BF16)}
    assert kept(arrays, "f16", model_type="t5") == {wo: "float32 in transformers"}


def test_many_kept_tensors_are_one_line() -> None:
    arrays = {BIAS.replace("0", str(i)): np.ones(2, np.float32) for i in range(5)}
    (told,) = convert(from_arrays(arrays), dtype="bf16").warnings
    assert told.startswith(
        "kept 5 tensors as stored because transformers keeps them in float32: 'model"
    )
    assert told.endswith(" and 2 more")


def test_excluded_tensors_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = from_arrays(ROUTED)
    made = convert(given, dtype="f16", exclude=("*gate.weight", "*embed*"))
    assert made.notes["convert"]["kept"] == {
        "model.embed_tokens.weight": "excluded",
        "model.layers.0.mlp.gate.weight": "excluded",
        BIAS: "float32 in transformers",
    }
    assert cases.stored(cases.read(made)) == cases.stored(ROUTED)
    for dtype in ("keep", "f16"):
        with pytest.raises(SettingError, match="'nothing' matches no tensor") as caught:
            convert(given, dtype=dtype, exclude=("*", "nothing"))
        assert caught.value.code == "E-NO-MATCH"
    path = cases.write_directory(tmp_path / "in", ROUTED, config={"model_type": "deepseek_v3"})
    words = ["convert", str(path), "--dtype", "f16", "-o", str(tmp_path / "out")]
    excluded = [*words, "--exclude", "*gate.weight", "--exclude", "*embed*"]
    assert run(excluded, capsys)[0] == 0
    record = json.loads((tmp_path / "out" / "wsurg-record.json").read_text())
    assert record["report"]["convert"]["kept"] == made.notes["convert"]["kept"]
    assert record["recipe"]["settings"]["exclude"] == ["*gate.weight", "*embed*"]
    assert any(BIAS in warning for warning in record["warnings"])
    assert cases.wsurg("replay", tmp_path / "out", "-o", tmp_path / "again") == 0
    assert run([*words, "--exclude", "nothing", "--overwrite"], capsys)[0] == 2
    code, _, told = run(["convert", str(path), "--exclude", "*", "-o", "x"], capsys)
    assert (code, "--exclude is for --dtype bf16 or f16 or f32" in told) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["bf16", "f16"])
@pytest.mark.parametrize("family", ["DeepseekV3", "T5"])
def test_transformers_keeps_the_same(tmp_path: Path, family: str, target: str) -> None:
    import transformers

    if family == "T5":
        kind = transformers.T5ForConditionalGeneration
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        model = kind(transformers.T5Config(vocab_size=32, **sizes))
    else:
        kind = transformers.DeepseekV3ForCausalLM
        sizes = {"hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 8}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 8}
        heads |= {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
        experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
        layers = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_shared_experts": 1}
        config = transformers.DeepseekV3Config(vocab_size=32, **sizes, **heads, **experts, **layers)
        model = kind(config)
    model.save_pretrained(tmp_path / "in")
    words = ("--dtype", target, "-o", tmp_path / "out")
    assert cases.wsurg("convert", tmp_path / "in", *words) == 0
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[target]
    loaded = kind.from_pretrained(tmp_path / "in", dtype=dtype).state_dict()
    again = kind.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    stored = open_checkpoint(tmp_path / "out")
    wide = {name for name, value in loaded.items() if value.dtype == torch.float32}
    assert bool(wide) == (family == "DeepseekV3" or target == "f16")
    assert {n for n in loaded if n in stored and stored[n].dtype.name == "F32"} == wide & set(
        stored
    )
    for name, value in loaded.items():
        assert again[name].dtype == value.dtype
        assert torch.equal(again[name], value), name


# --- pickled shards without an index ----------------------------------------------------------


def test_pickled_shards_without_an_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for number in (1, 2):
        shard = f"in/pytorch_model-0000{number}-of-00002.bin"
        torch.save({f"w{number}": torch.full((4,), float(number))}, shard)
    start = ["convert", "in", "-o", "out"]
    assert run([*start, "--weights", shard.removeprefix("in/")], capsys)[0] == 5
    code, out, _ = run(start, capsys)
    assert (code, "no index; opened 2 shards, pytorch_model-00001-of-00002.bin to" in out) == (
        0,
        True,
    )
    made = open_checkpoint("out")
    assert set(made.layout.values()) == {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    assert {name: view.read(0, 4).tolist() for name, view in made.items()} == {
        "w1": [1.0] * 4,
        "w2": [2.0] * 4,
    }
    Path(shard).unlink()
    code, _, told = run([*start, "--overwrite"], capsys)
    assert (code, "1 of 2 shards is missing: pytorch_model-00002-of-00002.bin" in told) == (3, True)


PARTS = {
    "model_type": "blip-2",
    "architectures": ["Blip2ForConditionalGeneration"],
    "text_config": {"model_type": "t5"},
}


def test_a_part_of_another_type_is_kept_in_float32_too() -> None:
    kept = "language_model.encoder.block.0.layer.1.DenseReluDense.wo.weight"
    arrays = {kept: np.ones((2, 2), "f4"), "language_model.shared.weight": np.ones((4, 2), "f4")}
    made = convert(from_arrays(arrays, config=PARTS), dtype="f16")
    assert {name: view.dtype.name for name, view in made.items()} == {
        kept: "F32",
        "language_model.shared.weight": "F16",
    }
