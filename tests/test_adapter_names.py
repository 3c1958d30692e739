"""Adapters whose names are not BASE's: `--map` and `--strip-prefix` say how they correspond."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests import cases
from weightsurgery import apply_adapter, from_arrays, verify_adapter
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.errors import MismatchError, SettingError

FRONT = "base_model.model."
# What a wrapper makes of `model.layers.0.mlp.up_proj`, and how to say so.
WAYS: dict[str, tuple[tuple[str, str], dict[str, Any]]] = {
    "a wrapped model": (
        ("model.", "model.wrapped."),
        {"strip_prefix": "model.wrapped."},
    ),
    "PEFT's own prefix is given too": (
        ("model.", "policy.net."),
        {"strip_prefix": f"{FRONT}policy.net."},
    ),
    "a module": (
        ("model.layers", "decoder.blocks"),
        {"name_map": {"decoder.blocks": "model.layers"}},
    ),
    "the longest front counts": (
        ("model.layers", "net.blocks"),
        {"name_map": {"net": "elsewhere", f"{FRONT}net.blocks": "model.layers"}},
    ),
    "the map wins over the prefix": (
        ("model.layers", "net.blocks"),
        {"strip_prefix": "net.", "name_map": {"net.blocks": "model.layers"}},
    ),
}


def as_adapter(tensors: cases.Arrays, **settings: Any) -> Checkpoint:
    return from_arrays(tensors, label="adapter", config=cases.adapter_config("llama", **settings))


def renamed(tensors: cases.Arrays, old: str, new: str) -> cases.Arrays:
    return {name.replace(FRONT + old, FRONT + new, 1): array for name, array in tensors.items()}


@pytest.mark.parametrize(("change", "settings"), WAYS.values(), ids=WAYS)
def test_other_names_merge_as_bases_own(change: tuple[str, str], settings: dict[str, Any]) -> None:
    base = cases.model("llama", dtype="f4")
    plain = cases.adapter(base, "llama")
    expected = cases.stored(cases.read(apply_adapter(from_arrays(base), as_adapter(plain))))
    adapter = as_adapter(renamed(plain, *change))
    merged = apply_adapter(from_arrays(base), adapter, **settings)
    assert cases.stored(cases.read(merged)) == expected
    assert verify_adapter(from_arrays(base), [adapter], merged, **settings)["proved"]


def test_a_prefix_may_be_bases() -> None:
    base = cases.model("llama", dtype="f4")
    adapter = as_adapter(cases.adapter(base, "llama"))
    expected = cases.read(apply_adapter(from_arrays(base), adapter))
    longer = from_arrays({f"old/{name}": array for name, array in base.items()})
    found = cases.read(apply_adapter(longer, adapter, strip_prefix="old/"))
    assert cases.stored({n.removeprefix("old/"): a for n, a in found.items()}) == cases.stored(
        expected
    )


def test_patterns_of_the_configuration_match_the_adapters_own_names() -> None:
    base = cases.model("llama", dtype="f4")
    plain = cases.adapter(base, "llama")
    patterns = {"alpha_pattern": {"^blocks.0.self_attn.q_proj": 20}}
    of_base = {"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 20}}
    expected = apply_adapter(from_arrays(base), as_adapter(plain, **of_base))
    without = apply_adapter(from_arrays(base), as_adapter(plain))
    adapter = as_adapter(renamed(plain, "model.layers", "blocks"), **patterns)
    found = apply_adapter(from_arrays(base), adapter, name_map={"blocks": "model.layers"})
    values = [cases.stored(cases.read(one)) for one in (found, expected, without)]
    assert values[0] == values[1] != values[2]


def test_a_map_may_be_of_one_of_several_adapters() -> None:
    base = cases.model("llama", dtype="f4")
    plain = cases.adapter(base, "llama")
    given = as_adapter(plain), as_adapter(renamed(plain, "model.layers", "blocks"))
    found = apply_adapter(from_arrays(base), *given, name_map={"blocks": "model.layers"})
    expected = apply_adapter(from_arrays(base), given[0], given[0])
    assert cases.stored(cases.read(found)) == cases.stored(cases.read(expected))


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "prefix": (
        {"strip_prefix": "decoder."},
        SettingError,
        r"no tensor name begins with 'decoder\.",
    ),
    "name": (
        {"name_map": {"model.layer": "model.layers"}},
        SettingError,
        r"adapter: tensor 'model\.layer': the name map names .* mean 'model\.layers'\?",
    ),
    "BASE's name": (
        {"name_map": {"model.layers": "model.blocks"}},
        MismatchError,
        r"BASE has no 'model\.blocks\.0\..*'; the nearest|nearest is 'model\.layers.*\]$",
    ),
    "two that become one": (
        {"name_map": {"model.layers.0": "model.layers.1"}},
        SettingError,
        r"two of its names become 'model\.layers\.1\.[a-z_.]*' in BASE",
    ),
}


@pytest.mark.parametrize(("settings", "kind", "message"), WRONG.values(), ids=WRONG)
def test_a_map_that_fits_nothing_is_refused(
    settings: dict[str, Any], kind: type[Exception], message: str
) -> None:
    base = cases.model("llama", dtype="f4")
    adapter = as_adapter(cases.adapter(base, "llama"))
    with pytest.raises(kind, match=message):
        apply_adapter(from_arrays(base), adapter, **settings)
    with pytest.raises(kind, match=message):
        verify_adapter(from_arrays(base), [adapter], from_arrays(base), **settings)


@pytest.mark.parametrize("way", ["pair", "file", "both", "prefix"])
def test_the_commands_take_pairs_and_files(
    way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = cases.model("llama", dtype="f4")
    base = cases.write_directory(tmp_path / "base", arrays)
    new = "policy/model.layers" if way == "prefix" else "net.blocks"
    adapter = renamed(cases.adapter(arrays, "llama"), "model.layers", new)
    config = cases.adapter_config("llama", base_model_name_or_path="base")
    cases.write_adapter(tmp_path / "adapter", adapter, config)
    (tmp_path / "map.json").write_text(json.dumps({"net": "model", "net.blocks": "model.layers"}))
    pair = ["--map", "net.blocks=model.layers"]
    file = ["--map", tmp_path / "map.json"]
    prefix = ["--strip-prefix", "policy/"]
    names = {"pair": pair, "file": file, "both": [*file, *pair], "prefix": prefix}[way]
    given, out = (base, tmp_path / "adapter"), tmp_path / "out"
    assert cases.wsurg("apply-adapter", *given, "-o", out) == 4
    assert cases.wsurg("apply-adapter", *given, "-o", out, *names) == 0
    assert "proved" in capsys.readouterr().out
    assert cases.wsurg("verify-adapter", *given, out) == 4
    assert cases.wsurg("verify-adapter", *given, out, *names) == 0
    assert cases.wsurg("verify", out) == 0
    assert cases.wsurg("replay", out, "-o", tmp_path / "again") == 0
    assert cases.digests(out) == cases.digests(tmp_path / "again")


QUERY = "layer.0.attention.self.query"
OWN = "encoder.layer.0.attention.own"
MISSING: dict[str, tuple[tuple[str, str], str]] = {
    "another name": (
        ("self.query", "own.query"),
        f"'encoder.{QUERY}.weight' [6, 6]; if that is the same, --map {OWN}={OWN[:-3]}self",
    ),
    "another layer": (
        ("layer.0.attention.self.query", "layer.77.attention.self.query"),
        f"it has 2 tensors of other numbers, such as 'encoder.{QUERY}.weight'",
    ),
    "another shape": (
        ("attention.self.query", "intermediate.dense2"),
        "the nearest, 'encoder.layer.0.intermediate.dense.weight', is [9, 6], not [6, 6]",
    ),
    "nothing like it": (
        ("encoder.layer.0.attention.self.query", "zzz"),
        "BASE has no 'zzz.weight' that it could adapt",
    ),
}


@pytest.mark.parametrize(("change", "expected"), MISSING.values(), ids=MISSING)
def test_a_missing_target_names_the_nearest(change: tuple[str, str], expected: str) -> None:
    base = cases.model("bert", dtype="f4")
    factors = cases.adapter(base, "bert")
    made = {name.replace(*change): array for name, array in factors.items()}
    assert made != factors
    adapter = from_arrays(made, label="adapter", config=cases.adapter_config("bert"))
    with pytest.raises(MismatchError, match=f"{re.escape(expected)}$"):
        apply_adapter(from_arrays(base), adapter)


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_the_nearest_is_the_one_that_was_meant(family: str) -> None:
    base = cases.model(family, dtype="f4")
    factors = cases.adapter(base, family)
    module = next(name for name in factors if name.endswith(".lora_A.weight")).split(".lora")[0]
    made = {name.replace(f"{module}.", f"{module}_1."): a for name, a in factors.items()}
    adapter = from_arrays(made, label="adapter", config=cases.adapter_config(family))
    expected = (
        rf"the nearest is '{re.escape(module.removeprefix(FRONT))}\.weight' .*; if that is the"
    )
    with pytest.raises(MismatchError, match=expected):
        apply_adapter(from_arrays(base), adapter)


def test_nothing_fits_another_model() -> None:
    base = from_arrays(cases.model("llama", dtype="f4"))
    factors = cases.adapter(cases.model("bert"), "bert")
    adapter = from_arrays(factors, label="adapter", config=cases.adapter_config("bert"))
    with pytest.raises(
        MismatchError, match=r"is this the model that the adapter was trained on\?$"
    ):
        apply_adapter(base, adapter)
