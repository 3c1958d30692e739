"""Models opened for computing: what is loaded, and how each kind of bad directory is told."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import tiny_models
from weightsurgery.errors import (
    FormatError,
    MismatchError,
    PolicyError,
    SettingError,
    StorageError,
)
from weightsurgery.models import Quiet, load_model, pick_device

WEIGHTS = "model.safetensors"
Arrays = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for make in (tiny_models.bert, tiny_models.gpt2, tiny_models.llama):
        make(root / make.__name__)
    return root


@pytest.fixture
def variant(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a model with a changed config, changed weights, or files rewritten or removed."""

    def make(
        name: str = "bert",
        *,
        config: dict[str, Any] | None = None,
        arrays: Callable[[Arrays], Arrays] | None = None,
        files: dict[str, str | None] | None = None,
    ) -> Path:
        path = tmp_path / "variant"
        shutil.copytree(folder / name, path)
        given = json.loads((path / "config.json").read_text()) | (config or {})
        given = {key: value for key, value in given.items() if value is not None}
        (path / "config.json").write_text(json.dumps(given))
        if arrays is not None:
            changed = arrays(load_file(path / WEIGHTS))
            save_file(changed, path / WEIGHTS, {"format": "pt"})
        for file, text in (files or {}).items():
            (path / file).unlink() if text is None else (path / file).write_text(text)
        return path

    return make


# --- what is loaded ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "task", "count"),
    [("bert", "classification", 41), ("gpt2", "causal", 28), ("llama", "causal", 21)],
)
def test_a_model_is_ready_to_compute(folder: Path, name: str, task: str, count: int) -> None:
    import torch

    model = load_model(folder / name, device="cpu")
    assert model.task == task
    assert not model.module.training
    assert model.device.type == "cpu"
    assert {parameter.dtype for parameter in model.names.values()} == {torch.float32}
    stored = load_file(folder / name / WEIGHTS)
    assert len(model.names) == count
    for tensor, parameter in model.names.items():
        assert (parameter.detach().numpy() == stored[tensor]).all(), tensor
    assert model.tokenizer("the film")["input_ids"]


def test_labels_have_numbers_and_names(variant: Callable[..., Path]) -> None:
    names = {"0": "bad", "1": "good"}
    model = load_model(variant(config={"id2label": names}), device="cpu")
    assert model.labels == {0: "bad", 1: "good"}


def test_tied_weights_are_one_parameter(folder: Path, variant: Callable[..., Path]) -> None:
    def with_copy(arrays: Arrays) -> Arrays:
        return arrays | {"lm_head.weight": arrays["transformer.wte.weight"].copy()}

    once = load_model(folder / "gpt2", device="cpu")
    twice = load_model(variant("gpt2", arrays=with_copy), device="cpu")
    assert once.names.keys() == twice.names.keys()
    assert "transformer.wte.weight" in once.names
    assert twice.module.lm_head.weight is twice.names["transformer.wte.weight"]


def test_names_are_those_on_disk(variant: Callable[..., Path]) -> None:
    """A classifier's file may lack the prefix that the module has."""

    def without_prefix(arrays: Arrays) -> Arrays:
        return {name.removeprefix("bert."): array for name, array in arrays.items()}

    path = variant(arrays=without_prefix)
    model = load_model(path, device="cpu")
    assert set(model.names) == set(load_file(path / WEIGHTS))


def test_weights_are_widened(variant: Callable[..., Path]) -> None:
    def halved(arrays: Arrays) -> Arrays:
        return {name: array.astype("f2") for name, array in arrays.items()}

    path = variant(arrays=halved)
    model = load_model(path, device="cpu")
    for name, array in load_file(path / WEIGHTS).items():
        assert (model.names[name].detach().numpy() == array.astype("f4")).all()


def test_the_task_may_be_told(variant: Callable[..., Path]) -> None:
    path = variant(config={"architectures": None})
    model = load_model(path, task="classification", device="cpu")
    assert model.task == "classification"


def test_transformers_is_quiet_and_as_before(
    variant: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    def with_more(arrays: Arrays) -> Arrays:
        return arrays | {"extra": np.zeros(3, np.float32)}

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(variant(arrays=with_more), device="cpu")
    assert capfd.readouterr() == ("", "")
    with pytest.raises(KeyError), Quiet():
        raise KeyError
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


# --- what is refused --------------------------------------------------------------------------


def refused(path: Path, kind: type, reason: str, **settings: Any) -> None:
    with pytest.raises(kind, match=f"^{re.escape(f'{path}: {reason}')}") as told:
        load_model(path, **{"device": "cpu", **settings})
    assert type(told.value) is kind


@pytest.mark.parametrize(
    ("config", "kind", "reason"),
    [
        (
            {"architectures": ["BertModel"]},
            MismatchError,
            "config.json names the architecture 'BertModel'; expected a classifier or a causal",
        ),
        ({"architectures": None}, MismatchError, "config.json names the architecture ''; expected"),
        ({"architectures": "Bert"}, MismatchError, "config.json names the architecture ''"),
        (
            {"model_type": "zzz"},
            MismatchError,
            "transformers cannot load it: The checkpoint you are trying to load has model type",
        ),
        (
            {"num_attention_heads": 3},
            MismatchError,
            "transformers cannot load it: The hidden size (16) is not a multiple of the number",
        ),
        (
            {"id2label": {"0": "a", "1": "b", "2": "c"}},
            MismatchError,
            "tensor 'classifier.bias': has shape [2]; config.json makes it [3]",
        ),
        (
            {"model_type": "zzz", "auto_map": {"AutoConfig": "x.Y"}},
            PolicyError,
            "needs code that lies beside the weights",
        ),
    ],
)
def test_a_config_of_another_kind_is_refused(
    variant: Callable[..., Path], config: dict[str, Any], kind: type, reason: str
) -> None:
    refused(variant(config=config), kind, reason)


def test_a_config_with_values_of_another_type_is_refused(variant: Callable[..., Path]) -> None:
    path = variant(config={"hidden_size": "wide"})
    with pytest.raises(MismatchError, match="hidden_size"):
        load_model(path, device="cpu")


def test_code_beside_the_weights_is_not_run(variant: Callable[..., Path], tmp_path: Path) -> None:
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')"
    config = {"model_type": "zzz", "auto_map": {"AutoConfig": "trap.Config"}}
    path = variant(config=config, files={"trap.py": trap})
    refused(path, PolicyError, "needs code that lies beside the weights")
    assert not (tmp_path / "ran").exists()


# --- what would fetch or import code ----------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"attn_implementation": "evil-org/kernel"},
        {"_attn_implementation": "evil-org/kernel"},
        {"_attn_implementation": "paged|evil-org/kernel@v1:attention"},
        {"attn_implementation": {"": "sdpa", "text_config": "evil-org/kernel"}},
        {"attn_implementation": "kernels-community"},
        {"experts_implementation": "evil-org/kernel"},
        {"text_config": {"_attn_implementation": "evil-org/kernel"}},
        {"per_layer_config": [{"0": {"attn_implementation": "evil-org/kernel"}}]},
    ],
    ids=str,
)
def test_code_from_a_repository_is_refused(
    variant: Callable[..., Path], config: dict[str, Any]
) -> None:
    path = variant("gpt2", config=config)
    with pytest.raises(
        PolicyError, match="_implementation names code from a repository: '"
    ) as told:
        load_model(path, device="cpu")
    assert told.value.exit_code == 5
    assert told.value.file == str(path)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What transformers would have fetched or imported to compute with."""
    found: list[Any] = []
    for where in (
        "transformers.modeling_utils.lazy_import_flash_attention",
        "transformers.integrations.hub_kernels.get_kernel",
    ):
        monkeypatch.setattr(where, lambda *given, **_: found.append(given))
    return found


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize(
    ("asked", "used"),
    [
        (None, "sdpa"),
        ("sdpa", "sdpa"),
        ("eager", "eager"),
        ("flash_attention_2", "sdpa"),
        ("flash_attention_3", "sdpa"),
        ("flex_attention", "sdpa"),
        ({"": "flash_attention_2"}, "sdpa"),
        ("of no known kind", "sdpa"),
        (3, "sdpa"),
    ],
)
def test_torch_computes_the_attention(
    variant: Callable[..., Path], fetched: list[Any], key: str, asked: Any, used: str
) -> None:
    model = load_model(variant("gpt2", config={key: asked}), device="cpu")
    assert model.module.config._attn_implementation == used
    assert fetched == []


@pytest.mark.parametrize(
    "config",
    [
        {"use_kernels": True, "kernel_config": {"RMSNorm": "evil-org/kernel:RMSNorm"}},
        {"experts_implementation": "deepgemm"},
        {"_experts_implementation": "sonicmoe"},
        {"auto_map": {"AutoModelForCausalLM": "evil-org/model--modeling.Model"}},
    ],
)
def test_other_keys_fetch_nothing(
    variant: Callable[..., Path], fetched: list[Any], config: dict[str, Any]
) -> None:
    model = load_model(variant("llama", config=config), device="cpu")
    assert fetched == []
    assert type(model.module).__module__ == "transformers.models.llama.modeling_llama"
    assert not model.module.use_kernels
    assert model.module.config._experts_implementation not in ("deepgemm", "sonicmoe")


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "of no known kind"])
@pytest.mark.parametrize("depth", [0, 1])
def test_quantized_weights_are_refused(
    variant: Callable[..., Path], method: str, depth: int
) -> None:
    config = {"quantization_config": {"quant_method": method, "load_in_8bit": True}}
    path = variant(
        config={"text_config": config} if depth else config,
        arrays=lambda given: {**given, "codes": np.ones((2, 2), "i2")},
    )
    with pytest.raises(PolicyError, match=rf"tensor 'codes': config\.json has a .*\({method}\)"):
        load_model(path, device="cpu")


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8", "of no known kind"])
def test_a_leftover_quantization_config_changes_nothing(
    variant: Callable[..., Path], folder: Path, method: str
) -> None:
    config = {"quantization_config": {"quant_method": method, "load_in_8bit": True}}
    model = load_model(variant(config=config), device="cpu")
    expected = load_model(folder / "bert", device="cpu")
    assert model.checkpoint.warnings[0].startswith(
        f"config.json has a quantization_config ({method}"
    )
    assert not hasattr(model.module.config, "quantization_config")
    for name, parameter in expected.names.items():
        assert model.names[name].equal(parameter)


WITHOUT = {"tokenizer.json": None, "tokenizer_config.json": None}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (WITHOUT, "no vocabulary"),
        ({"tokenizer.json": None}, "no vocabulary"),
        ({"tokenizer.json": "{"}, ""),
        ({"tokenizer.json": "{}"}, ""),
    ],
)
def test_a_missing_or_broken_tokenizer_is_told(
    variant: Callable[..., Path], files: dict[str, str | None], reason: str
) -> None:
    path = variant(files=files)
    with pytest.raises(MismatchError, match=f"no tokenizer that can be loaded: {reason}") as told:
        load_model(path, device="cpu")
    assert told.value.exit_code == 4
    assert told.value.hint == "put tokenizer.json and tokenizer_config.json beside the weights"


def without_head(arrays: Arrays) -> Arrays:
    return {name: array for name, array in arrays.items() if "classifier" not in name}


def with_old_names(arrays: Arrays) -> Arrays:
    """LayerNorm's parameters as BERT's first files call them, which transformers renames."""
    return {name.replace("Norm.weight", "Norm.gamma"): array for name, array in arrays.items()}


def with_whole_numbers(arrays: Arrays) -> Arrays:
    return arrays | {"classifier.bias": np.zeros(2, np.int32)}


def with_another_shape(arrays: Arrays) -> Arrays:
    return arrays | {"classifier.weight": np.zeros((2, 17), np.float32)}


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        (
            without_head,
            "tensor 'classifier.bias': lacks 2 of the weights that a BertForSequenceClassificat",
        ),
        (with_another_shape, "tensor 'classifier.weight': has shape [2, 17]; config.json makes it"),
        (
            with_whole_numbers,
            "tensor 'classifier.bias': no stored tensor holds the elements of this parameter",
        ),
    ],
)
def test_weights_that_do_not_fit_are_told(
    variant: Callable[..., Path], arrays: Callable[[Arrays], Arrays], reason: str
) -> None:
    refused(variant(arrays=arrays), MismatchError, reason)


def test_names_of_older_versions_stay_those_on_disk(variant: Callable[..., Path]) -> None:
    path = variant(arrays=with_old_names)
    model = load_model(path, device="cpu")
    stored = load_file(path / WEIGHTS)
    assert set(model.names) == set(stored)
    for name, parameter in model.names.items():
        assert (parameter.detach().numpy() == stored[name]).all(), name


def test_a_model_of_another_task_is_refused(folder: Path) -> None:
    refused(folder / "gpt2", MismatchError, "tensor 'score.weight': lacks 1", task="classification")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"task": "regression"}, "task is 'regression'; expected auto, classification or causal"),
        ({"device": "abacus"}, "device 'abacus' is not available: .*; use cpu or auto"),
        ({"device": "meta"}, "device 'meta' is not available: it holds no numbers; use cpu"),
        ({"device": ""}, "device '' is not available: .*; use cpu or auto"),
    ],
)
def test_a_task_or_device_there_is_not(folder: Path, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(SettingError, match=reason):
        load_model(folder / "bert", **settings)


def test_devices_are_found() -> None:
    import torch

    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")


def test_a_single_file_is_refused(folder: Path) -> None:
    path = folder / "bert" / WEIGHTS
    reason = "a single file; expected a model directory with config.json and tokenizer"
    refused(path, SettingError, f"{reason}; give its folder, '{path.parent}'")
    alone = folder / "alone" / WEIGHTS
    alone.parent.mkdir()
    alone.write_bytes(path.read_bytes())
    refused(alone, SettingError, f"{reason}; put them beside it and give the folder")


def test_weights_go_through_the_strict_reader(variant: Callable[..., Path]) -> None:
    path = variant()
    (path / WEIGHTS).write_bytes(b"\xff" * 100)
    with pytest.raises(FormatError, match=r"model\.safetensors: "):
        load_model(path, device="cpu")


def test_an_absent_directory_is_told(tmp_path: Path) -> None:
    refused(tmp_path / "absent", StorageError, "no such file or directory")
