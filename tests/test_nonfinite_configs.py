"""NaN and infinity in configuration files, as Python's json writes them and transformers reads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests import cases, hostile
from tests.hostile import INDEX, SHARDS, weights
from weightsurgery.errors import FormatError
from weightsurgery.formats import open_checkpoint, save
from weightsurgery.formats.strict_json import parse, parse_config
from weightsurgery.formats.vocabulary import read_vocabulary

CONFIG = b'{"time_step_limit": [0.0, Infinity], "low": -Infinity, "scale": NaN, "large": 1e999}'
SPELLED = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"]


@pytest.mark.parametrize("text", SPELLED)
def test_only_configurations_may_hold_them(text: str) -> None:
    data = b'{"a": [%s]}' % text.encode()
    expected = json.loads(data)["a"][0]
    (found,) = parse_config(data, file="config.json")["a"]
    assert found == expected or (math.isnan(found) and math.isnan(expected))
    with pytest.raises(FormatError, match=r"is not JSON|is out of range") as told:
        parse(data, file="x")
    assert told.value.code == "E-JSON-NUMBER"


@pytest.mark.parametrize("text", ["nan", "inf", "+Infinity", "-NaN", "infinity", "Inf"])
def test_other_spellings_are_refused_as_by_python(text: str) -> None:
    data = b"{%s}" % f'"a": {text}'.encode()
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(data)
    with pytest.raises(FormatError, match="config is not valid JSON"):
        parse_config(data, file="config.json")


@pytest.mark.parametrize("name", [INDEX, SHARDS[0]])
def test_headers_and_indexes_stay_strict(tmp_path: Path, name: str) -> None:
    header = b'{"a": NaN}'
    changed = {
        INDEX: b'{"metadata": {"total_size": Infinity}, "weight_map": {}}',
        SHARDS[0]: hostile.raw(header, b""),
    }
    model = hostile.sharded(tmp_path / "model", {name: changed[name]})
    with pytest.raises(FormatError, match="is not JSON") as told:
        open_checkpoint(model)
    hostile.check_told(told.value, file=model / name)


def model(path: Path, **files: bytes) -> Path:
    given = {f"{name}.json": content for name, content in files.items()}
    return hostile.folder(path, {"model.safetensors": weights("a"), **given})


@pytest.mark.parametrize("name", ["config", "generation_config", "tokenizer_config", "tokenizer"])
def test_a_file_with_them_travels_as_it_is(tmp_path: Path, name: str) -> None:
    found = open_checkpoint(model(tmp_path / "model", **{name: CONFIG}))
    save(found, tmp_path / "out")
    assert (tmp_path / "out" / f"{name}.json").read_bytes() == CONFIG
    assert read_vocabulary(found) == {}


def same(value: Any) -> str:
    """Text that is equal where values are, NaN among them."""
    return json.dumps(value, sort_keys=True)


@pytest.mark.parametrize("change", ["a key that loads code", "the dtype"])
def test_what_is_written_back_keeps_the_values(tmp_path: Path, change: str) -> None:
    given = json.loads(CONFIG)
    more = {"auto_map": {}} if change == "a key that loads code" else {"torch_dtype": "float32"}
    text = json.dumps({**given, **more}).encode()
    words = ["--dtype", "bf16"] if change == "the dtype" else []
    path = model(tmp_path / "model", config=text)
    assert cases.wsurg("convert", path, *words, "-o", tmp_path / "out") == 0
    written = json.loads((tmp_path / "out" / "config.json").read_bytes())
    expected = {"torch_dtype": "bfloat16"} if words else {}
    assert same(written) == same({**given, **expected})
    assert cases.wsurg("verify", tmp_path / "out") == 0


def test_a_model_type_that_is_no_text_is_not_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model(tmp_path / "model", config=b'{"model_type": NaN}')
    assert cases.wsurg("inspect", path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["model_type"] is None


@pytest.mark.parametrize("command", ["diff", "mix"])
def test_commands_take_such_models(tmp_path: Path, command: str) -> None:
    config = b'{"model_type": "mamba2", "vocab_size": Infinity, "time_step_limit": [0.0, Infinity]}'
    path = model(tmp_path / "model", config=config)
    out = ["-o", tmp_path / "out"] if command == "mix" else []
    assert cases.wsurg(command, path, path, *out) == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["keep", "bf16"])
def test_transformers_loads_what_is_written(tmp_path: Path, dtype: str) -> None:
    import torch
    import transformers

    config = transformers.Mamba2Config(
        vocab_size=32,
        hidden_size=16,
        state_size=8,
        num_heads=4,
        head_dim=8,
        n_groups=1,
        num_hidden_layers=1,
        expand=2,
    )
    transformers.Mamba2ForCausalLM(config).save_pretrained(tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    given = {**json.loads(path.read_text()), "time_step_limit": [0.0, math.inf], "auto_map": {}}
    path.write_text(json.dumps(given))
    assert cases.wsurg("convert", path.parent, "--dtype", dtype, "-o", tmp_path / "out") == 0
    loaded = transformers.Mamba2ForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert list(loaded.config.time_step_limit) == [0.0, math.inf]
    assert loaded.dtype == (torch.float32 if dtype == "keep" else torch.bfloat16)
