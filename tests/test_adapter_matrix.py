"""Every variant of a LoRA adapter on every kind of model: PEFT is the oracle.

What PEFT merges is what we merge, to the last bit or nearly; the merged model computes what the
adapted one does; and each merge, PEFT's or ours, is proved.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import cases
from tests import peft_models as models
from weightsurgery import apply_adapter, open_checkpoint, save, verify_adapter
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.errors import SurgeryError

pytestmark = models.WARNINGS


@dataclass(frozen=True)
class Family:
    """A kind of model, and its names for what variants adapt.

    Attributes:
        make: A new model; `tied` ties its head to its embedding, where there are two.
        layers: Ends of names of matrices, in the order in which PEFT would sort them.
        one: The full name of one of them that is not called like the first.
        embedding: Of words.
        head: The output layer.
        saved: Modules to save.
        parameters: To be adapted directly.
        every: All matrices, as PEFT is told.
    """

    make: Callable[[bool], Any]
    layers: tuple[str, ...]
    one: str
    embedding: str
    head: str
    saved: tuple[str, ...]
    parameters: tuple[str, ...]
    every: Any = "all-linear"


def decoder(make: Callable[..., Any], **options: Any) -> Callable[[bool], Any]:
    return lambda tied: make(tie_word_embeddings=tied, initializer_range=0.2, **options)


def encoder(tied: bool) -> Any:
    make = models.bert_with_head if tied else models.bert
    return make(tie_word_embeddings=tied, initializer_range=0.2)


EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_LLAMA = ("model.layers.1.self_attn.v_proj", "embed_tokens", "lm_head", ("norm", "lm_head"))
_CONV = ("one", "pixel", "two", "head")
FAMILIES = {
    "bert": Family(
        encoder,
        ("query", "value", "output.dense"),
        "bert.encoder.layer.1.attention.self.value",
        "word_embeddings",
        "cls.predictions.decoder",
        ("LayerNorm", "classifier"),
        ("value.weight",),
    ),
    "gpt2": Family(
        decoder(models.gpt2),
        ("c_attn", "c_fc", "c_proj"),  # of which one is square
        "transformer.h.1.mlp.c_fc",
        "wte",
        "lm_head",
        ("ln_1", "lm_head"),
        ("c_fc.weight",),
    ),
    "llama": Family(
        decoder(models.llama, attention_bias=True, mlp_bias=True),
        ("down_proj", "q_proj", "v_proj"),
        *_LLAMA,
        ("q_proj.weight",),
    ),
    "conv": Family(
        lambda _tied: models.Convolutions(),
        _CONV,
        "two",
        "words",
        "head",
        ("norm", "head"),
        ("head.weight",),
        [*_CONV],
    ),
    "moe": Family(decoder(models.qwen2_moe), ("q_proj", "v_proj"), *_LLAMA, EXPERTS),
    "fused moe": Family(decoder(models.gpt_oss), ("q_proj", "v_proj"), *_LLAMA, EXPERTS),
}

Settings = dict[str, Any]
# What differs from a plain LoRA of the family's layers.
VARIANTS: dict[str, Callable[[Family], Settings]] = {
    "LoRA": lambda of: {"target_modules": of.every, "lora_alpha": 7},
    "rsLoRA": lambda _: {"use_rslora": True},
    "DoRA": lambda _: {"use_dora": True},
    "lora_bias": lambda _: {"lora_bias": True},
    "bias lora_only": lambda _: {"bias": "lora_only"},
    "bias all": lambda _: {"bias": "all"},
    "fan_in_fan_out": lambda _: {"fan_in_fan_out": True},
    "embedding": lambda of: {"target_modules": [of.embedding]},
    "DoRA of an embedding": lambda of: {"target_modules": [of.embedding], "use_dora": True},
    "rank_pattern": lambda of: {"rank_pattern": {of.layers[0]: 2, of.one: 6}},
    "alpha_pattern": lambda of: {"alpha_pattern": {f"^{of.one}": 5, of.layers[0]: 3}},
    "modules_to_save": lambda of: {"modules_to_save": [*of.saved]},
    "tokens": lambda of: {"trainable_token_indices": {of.embedding: [5, 1, 31]}},
    "tokens of the embedding": lambda _: {"trainable_token_indices": [5, 1, 31]},
    "parameters": lambda of: {"target_modules": [], "target_parameters": [*of.parameters]},
    "parameters beside layers": lambda of: {"target_parameters": [*of.parameters]},
    "tied head": lambda of: {"target_modules": [of.head, *of.layers]},
    "several with weights": lambda _: {"lora_alpha": 5},
}
BESIDE = "Trying to wrap an `nn.Parameter` of layer .* not also targeted"
# Where a variant cannot be: who refuses it, and in which words.
CANNOT: dict[tuple[str, str], tuple[type[Exception], str]] = {
    ("tokens of the embedding", "conv"): (ValueError, "'embed_tokens'} not found"),
    # PEFT adapts a layer, or its weight directly; only experts have parameters that are no layer's.
    **{
        ("parameters beside layers", family): (ValueError, BESIDE)
        for family in ("bert", "gpt2", "llama", "conv")
    },
}
NO_TIE = {("tied head", "conv"): "its head and its embedding have other shapes"}
CELLS = [cell for cell in itertools.product(VARIANTS, FAMILIES) if cell not in CANNOT | NO_TIE]
WEIGHTS = (0.5, -2.0)  # of several adapters


@dataclass(frozen=True)
class Cell:
    """A variant of an adapter of a kind of model, with random numbers for trained ones.

    Attributes:
        base: The model's files.
        adapters: PEFT's files, one adapter or two.
        weight: Of each, or none.
        plain: The model.
        adapted: The model with the adapters on it.
        theirs: PEFT's merge, without or with safe_merge, in the files that it writes.
        untie: Whether the head must be untied for it.
    """

    base: Checkpoint
    adapters: list[Checkpoint]
    weight: tuple[float, ...]
    plain: Any
    adapted: Any
    theirs: Callable[[bool], Checkpoint]
    untie: bool

    def merge(self, **options: Any) -> Checkpoint:
        settings = {"weight": self.weight, "force_base": True, "untie": self.untie, **options}
        return apply_adapter(self.base, *self.adapters, **settings)

    def merge_one_by_one(self) -> Checkpoint:
        """Rounded after each adapter."""
        merged = self.base
        for adapter, weight in zip(self.adapters, self.weight or (1.0,), strict=True):
            merged = apply_adapter(
                merged, adapter, weight=[weight], force_base=True, untie=self.untie
            )
        return merged


class Bench:
    """Makes models and adapters of them, each once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @functools.cache  # noqa: B019  # it lives as long as the module's tests
    def plain(self, family: str, tied: bool, dtype: Any) -> tuple[Any, Checkpoint]:
        """A model and its files."""
        torch.manual_seed(1)
        model = FAMILIES[family].make(tied).to(dtype)
        return model, write(model, self.folder / f"{family}-{tied}-{dtype}")

    @functools.cache  # noqa: B019
    def cell(self, variant: str, family: str, dtype: Any) -> Cell:
        of, tied = FAMILIES[family], variant == "tied head"
        folder = self.folder / f"{variant}-{family}-{dtype}"
        plain, base = self.plain(family, tied, dtype)
        settings = {"target_modules": [*of.layers], **VARIANTS[variant](of)}
        names = ["default", "other"] if variant.startswith("several") else ["default"]
        model = adapted(plain, settings, names)
        model.save_pretrained(folder)
        several = len(names) > 1
        weight = WEIGHTS if several else ()
        for layer in model.modules():
            for name, by in zip(names, weight, strict=False):
                if isinstance(layer, peft.tuners.lora.LoraLayer):
                    layer.set_scale(name, by)
        adapters = [open_checkpoint(folder / n.replace("default", "")) for n in names]

        @functools.cache
        def theirs(safe: bool) -> Checkpoint:
            # A tied tensor would be changed for the head and the embedding both.
            apart = untied(plain, folder) if tied else copy.deepcopy(model)
            which = names if several else None
            merged = apart.merge_and_unload(safe_merge=safe, adapter_names=which)
            return write(merged, folder / f"merged-{safe}")

        return Cell(base, adapters, weight, plain, model, theirs, tied)


def adapted(plain: Any, settings: Settings, names: Sequence[str]) -> Any:
    """A copy of a model with trained adapters of these names."""
    torch.manual_seed(2)
    first = peft.LoraConfig(r=4, **settings)
    model = peft.get_peft_model(copy.deepcopy(plain), first)
    for name in names[1:]:
        model.add_adapter(name, peft.LoraConfig(r=3, use_rslora=True, **settings))
    model.base_model.set_adapter([*names])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape).to(parameter.dtype)
    return model


def untied(plain: Any, adapter: Path) -> Any:
    """A copy of a model whose head is a tensor of its own, with an adapter on it."""
    config = copy.deepcopy(plain.config)
    config.tie_word_embeddings = False
    model = type(plain)(config).to(plain.dtype)
    model.load_state_dict(plain.state_dict())
    return peft.PeftModel.from_pretrained(model, adapter)


def write(model: Any, folder: Path) -> Checkpoint:
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors")
    return open_checkpoint(folder)


def read_back(like: Any, folder: Path) -> Any:
    """A model of the same class from files."""
    if hasattr(like, "save_pretrained"):
        return type(like).from_pretrained(folder)
    model = copy.deepcopy(like)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model.eval()(input_ids=models.TOKENS).logits


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("matrix"))


EVERY = pytest.mark.parametrize(
    ("variant", "family"), CELLS, ids=[f"{variant}-{family}" for variant, family in CELLS]
)


@EVERY
def test_merges_equal_pefts(variant: str, family: str, bench: Bench) -> None:
    cell = bench.cell(variant, family, torch.float32)
    before, ours, theirs = map(cases.read, (cell.base, cell.merge(), cell.theirs(False)))
    assert ours.keys() == theirs.keys()
    assert any(not np.array_equal(ours[name], before.get(name)) for name in ours)
    for name, expected in theirs.items():
        room = 1e-6 * np.abs(expected).max(initial=0)
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=room, err_msg=name)


@EVERY
def test_the_written_model_computes_what_the_adapted_one_does(
    variant: str, family: str, bench: Bench, tmp_path: Path
) -> None:
    cell = bench.cell(variant, family, torch.float32)
    save(cell.merge(), tmp_path / "merged", hashes=False)
    expected, plain = logits(cell.adapted), logits(cell.plain)
    room = 1e-5 * expected.norm()
    assert (logits(read_back(cell.plain, tmp_path / "merged")) - expected).norm() <= room
    assert (plain - expected).norm() > 10 * room


@EVERY
@pytest.mark.parametrize("safe", [False, True], ids=["once", "twice"])
def test_merges_equal_pefts_in_bf16(variant: str, family: str, safe: bool, bench: Bench) -> None:
    cell = bench.cell(variant, family, torch.bfloat16)
    # What PEFT has in bfloat16 itself (embeddings, parameters) it rounds twice in any case.
    allowed = [cell.merge(rounding="peft"), *([] if safe else [cell.merge_one_by_one()])]
    theirs = cases.read(cell.theirs(safe))
    found = [cases.read(one) for one in allowed]
    for name, expected in theirs.items():
        step = np.spacing(np.abs(expected)).astype("f4")
        off = [np.abs(ours[name].astype("f4") - expected.astype("f4")) for ours in found]
        assert any((one <= step).all() for one in off), name


@EVERY
def test_every_merge_of_ours_and_of_pefts_is_proved(
    variant: str, family: str, bench: Bench
) -> None:
    cell = bench.cell(variant, family, torch.bfloat16)
    ours = (cell.merge(), cell.merge(rounding="peft"), cell.merge_one_by_one())
    for merged in (*ours, *map(cell.theirs, (False, True))):
        report = verify_adapter(cell.base, cell.adapters, merged, weight=cell.weight)
        assert report["proved"], report["tensors"]
        assert any(one["adapted"] for one in report["tensors"])


@pytest.mark.parametrize(("variant", "family"), CANNOT)
def test_what_cannot_be_is_refused(variant: str, family: str, bench: Bench) -> None:
    error, reason = CANNOT[variant, family]
    with pytest.raises(error, match=reason) as told:
        bench.cell(variant, family, torch.float32).merge()
    assert type(told.value) is error


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
@pytest.mark.parametrize("make", [torch.nn.Conv1d, torch.nn.Conv2d])
def test_a_grouped_convolution_is_merged_by_nobody(make: Any, tmp_path: Path) -> None:
    """Its update reaches across the groups, and its weight has no place for that."""
    trained = models.Trained(
        tmp_path,
        lambda: torch.nn.ModuleDict({"one": make(4, 6, 3, groups=2)}),
        {"target_modules": ["one"]},
        torch.float32,
    )
    with pytest.raises(SurgeryError, match=r"one\.lora_A\.weight.*grouped convolution"):
        trained.merge()
    with pytest.raises(NotImplementedError, match="groups > 1"):
        trained.model.merge_and_unload()
