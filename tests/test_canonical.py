"""Canonical names: what a stored tensor is, whatever the file calls it."""

from __future__ import annotations

import numpy as np
import pytest

from weightsurgery.alignment import align
from weightsurgery.architecture.canonical import _Reader, read_names, template, unwrapped
from weightsurgery.architecture.composite import find_architecture
from weightsurgery.architecture.facts import architecture_of, known_types
from weightsurgery.checkpoint import from_arrays
from weightsurgery.name_map import match_names

BERT = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
BERT_BASE = {"model_type": "bert", "architectures": ["BertModel"]}
VISION = {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]}
GEMMA = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
GEMMA_TEXT = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
NEOX = {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}
HUBERT = {"model_type": "hubert", "architectures": ["HubertModel"]}

Config = dict[str, object]


def canonical(name: str, config: Config) -> str:
    return read_names([name], architecture_of(config)).places[name].canonical


ALIKE: dict[str, list[tuple[Config, str]]] = {
    "gamma": [
        (BERT, "bert.encoder.layer.0.output.LayerNorm.gamma"),
        (BERT, "bert.encoder.layer.0.output.LayerNorm.weight"),
        (BERT_BASE, "encoder.layer.0.output.LayerNorm.weight"),
        (BERT_BASE, "bert.encoder.layer.0.output.LayerNorm.gamma"),
        ({}, "encoder.layer.0.output.LayerNorm.gamma"),
    ],
    "vision and language": [
        (VISION, "model.layers.3.mlp.up_proj.weight"),
        (VISION, "model.language_model.layers.3.mlp.up_proj.weight"),
    ],
    "the vision part": [(VISION, "visual.blocks.0.norm1.weight"),
                        (VISION, "model.visual.blocks.0.norm1.weight")],
    "text only": [
        (GEMMA, "language_model.model.layers.1.mlp.up_proj.weight"),
        (GEMMA, "model.language_model.layers.1.mlp.up_proj.weight"),
        (GEMMA_TEXT, "model.layers.1.mlp.up_proj.weight"),
    ],
    "an output head": [(NEOX, "embed_out.weight"), (NEOX, "lm_head.weight")],
    "weight normalization": [
        (HUBERT, "encoder.pos_conv_embed.conv.weight_g"),
        (HUBERT, "encoder.pos_conv_embed.conv.parametrizations.weight.original0"),
    ],
    "wrappers": [
        (BERT, "bert.encoder.layer.0.output.dense.weight"),
        (BERT, "bert.encoder.layer.0._fsdp_wrapped_module.output.dense.weight"),
        (BERT, "_fsdp_wrapped_module.bert.encoder.layer.0.output.dense.weight"),
        (BERT, "module._orig_mod.bert.encoder.layer.0.output.dense.weight"),
        (BERT, "base_model.model.bert.encoder.layer.0.output.dense.base_layer.weight"),
        (BERT, "_orig_mod.bert.encoder.layer.0._checkpoint_wrapped_module.output.dense.weight"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("spellings", ALIKE.values(), ids=ALIKE)
def test_spellings_of_one_tensor(spellings: list[tuple[Config, str]]) -> None:
    assert len({canonical(name, config) for config, name in spellings}) == 1


def test_experts_of_a_text_model_of_another_type_are_converted() -> None:
    config = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": {"model_type": "qwen3_moe"},
    }
    name = "model.language_model.layers.0.mlp.experts.3.up_proj.weight"
    place = read_names([name], find_architecture(config)).places[name]
    assert place.target == "layers.0.mlp.experts.gate_up_proj"


def test_a_head_goes_with_no_other_head() -> None:
    """ALBERT's sentence-order head is no classifier, though its name ends like one."""
    albert = {"model_type": "albert"}
    words = {"albert.embeddings.word_embeddings.weight": np.ones((9, 2), np.float32)}
    head = {"classifier.weight": np.ones((2, 2), np.float32)}
    theirs = {f"sop_classifier.{name}": array for name, array in head.items()}
    for base, tuned in ((theirs, head), (head, theirs)):
        sides = [
            from_arrays(words | given, config=albert | {"architectures": [f"AlbertFor{name}"]})
            for given, name in (
                (base, "PreTraining" if base is theirs else "SequenceClassification"),
                (tuned, "PreTraining" if tuned is theirs else "SequenceClassification"),
            )
        ]
        found = {p.name: p.base for p in align(*sides).pairs}
        assert found[next(iter(tuned))] is None


def test_a_doubled_prefix_is_the_tensor_that_is_loaded() -> None:
    name = "bert.encoder.layer.0.output.dense.weight"
    found = read_names(sorted([name, f"bert.{name}"]), architecture_of(BERT))
    assert found.places[f"bert.{name}"].canonical == "encoder.layer.0.output.dense.weight"
    assert found.ambiguous == (name,)


APART = {
    "another layer": ("bert.encoder.layer.0.x.bias", "bert.encoder.layer.1.x.bias"),
    "a module called module": ("bert.module.weight", "bert.weight"),
    "a head": ("classifier.weight", "bert.classifier2.weight"),
}  # fmt: skip


@pytest.mark.parametrize(("one", "other"), APART.values(), ids=APART)
def test_names_of_two_tensors(one: str, other: str) -> None:
    assert canonical(one, BERT) != canonical(other, BERT)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod."])
def test_a_wrapped_copy_cannot_take_a_tensor_s_place(wrapper: str) -> None:
    """transformers reads the name without the wrapper, however the two are sorted."""
    name = "bert.pooler.dense.bias"
    found = read_names(sorted([name, wrapper + name]), architecture_of(BERT))
    assert found.places[name].canonical == "pooler.dense.bias"
    assert found.places[wrapper + name].canonical == wrapper + name
    assert found.ambiguous == (wrapper + name,)


@pytest.mark.parametrize("name", ["", ".", "a" * 5000, "model." + "x.0." * 900 + "w", "%s.%d.0"])
def test_odd_names_keep_their_words(name: str) -> None:
    assert canonical(name, VISION | {"model_type": "nothing"}) == name
    assert read_names([name], architecture_of(BERT)).places[name].canonical == name


def test_wrappers_alone_leave_the_name() -> None:
    assert unwrapped("module.weight") == "module.weight"
    assert unwrapped("module.final_logits_bias") == "final_logits_bias"
    assert unwrapped("base_model.model.weight") == "base_model.model.weight"


@pytest.mark.parametrize("kind", known_types()[::12])
def test_names_that_differ_in_numbers_are_looked_at_once(kind: str) -> None:
    """The short cut gives what rules give: each parameter at two numbers, alone and together."""
    known = architecture_of({"model_type": kind})
    assert known is not None
    names = [
        template(name).replace("*", number) for name in sorted(known.parameters) for number in "37"
    ]
    together = read_names(names, known)
    reader = _Reader(known, names)
    for name in names:
        form, place = reader._form(name), together.places[name]
        if name not in together.ambiguous:
            assert (place.canonical, place.target) == (form.canonical, form.target)
            assert place.model_name == form.loaded.target


def test_a_name_map_decides_before_all_else() -> None:
    names = ["bert.pooler.dense.bias", "bert.embeddings.LayerNorm.bias"]
    arrays = {name: np.full(3, i, np.float32) for i, name in enumerate(names)}
    base, tuned = (from_arrays(arrays, config=BERT) for _ in range(2))
    mapped = match_names(base, tuned, name_map={names[0]: names[1], names[1]: names[0]})
    found = align(mapped, tuned)
    assert [float(p.base.read(0, 1)[0]) for p in found.pairs if p.base] == [0.0, 1.0]
    assert [p.name for p in found.pairs] == names[::-1]
