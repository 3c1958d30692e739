"""The facts about architectures: the file, its loader, and whether transformers still agrees."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from weightsurgery.architecture import facts
from weightsurgery.architecture.facts import architecture_of, known_types, peft_renames

PATH = Path(facts.__file__).with_name("facts.jsonl")
HEADER, *LINES = [json.loads(line) for line in PATH.read_bytes().splitlines()]
PAIRS = [(line["model_type"], name) for line in LINES for name in line["classes"]]
BIGGEST = 1_300_000
SAMPLE = 40


def described(model_type: object, *names: object) -> facts.Architecture | None:
    return architecture_of({"model_type": model_type, "architectures": list(names)})


def test_the_file_is_compact_ascii_sorted_by_model_type() -> None:
    content = PATH.read_bytes()
    assert content.isascii()
    assert len(content) < BIGGEST
    types = [line["model_type"] for line in LINES]
    assert types == sorted(set(types))
    assert known_types() == tuple(types)


def test_every_line_loads_and_every_pattern_compiles() -> None:
    for model_type, name in PAIRS:
        found = described(model_type, name)
        assert found is not None
        assert (found.model_type, found.name) == (model_type, name)
        assert found.is_base == (found.prefix == "")
        assert set(found.vocabulary) <= found.parameters
        assert {template(name) for name in found.final} <= found.parameters
        for rule in found.rules:
            assert rule.pattern.groupindex.keys() >= {"g0"}
        for tie in found.ties:
            assert set(tie.when) <= {"0", "1"}
            assert "1" in tie.when
            assert len(tie.when) == (9 if found.text_config_key else 3)


def template(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def test_the_embedding_and_the_head_are_parameters() -> None:
    for model_type, name in PAIRS:
        found = described(model_type, name)
        assert found is not None
        for weight in filter(None, (found.embedding, found.head)):
            assert template(weight) in found.parameters, name


def test_what_a_text_model_is() -> None:
    found = described("bert", "BertForMaskedLM")
    assert found is not None
    assert (found.prefix, found.is_base, found.text, found.text_config_key) == (
        "bert",
        False,
        "",
        "",
    )
    assert found.embedding == "bert.embeddings.word_embeddings.weight"
    assert found.head == "cls.predictions.decoder.weight"
    assert "bert.encoder.layer.*.attention.self.query.weight" in found.parameters
    assert "bert.pooler.dense.weight" not in found.parameters
    assert found.vocabulary == {
        "bert.embeddings.word_embeddings.weight": 0,
        "cls.predictions.bias": 0,
        "cls.predictions.decoder.bias": 0,
        "cls.predictions.decoder.weight": 0,
    }
    weight = next(tie for tie in found.ties if tie.target == "cls.predictions.decoder.weight")
    assert (weight.source, weight.when) == ("bert.embeddings.word_embeddings.weight", "101")


def test_what_a_multimodal_model_is() -> None:
    found = described("qwen2_vl", "Qwen2VLForConditionalGeneration")
    assert found is not None
    assert (found.prefix, found.text) == ("model", "model.language_model")
    assert found.embedding == "model.language_model.embed_tokens.weight"
    assert found.ties == (facts.Tie("lm_head.weight", found.embedding, "001001111"),)


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({}, False),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"text_config": {"tie_word_embeddings": True}, "tie_word_embeddings": False}, True),
        ({"text_config": {"tie_word_embeddings": False}, "tie_word_embeddings": True}, True),
        ({"text_config": "text", "tie_word_embeddings": None}, False),
    ],
)
def test_which_ties_hold_by_the_flags_of_both_configs(config: dict[str, Any], tied: bool) -> None:
    found = described("qwen2_vl", "Qwen2VLForConditionalGeneration")
    assert found is not None
    assert found.ties_of(config) == (found.ties if tied else ())


def test_a_plain_config_has_one_flag() -> None:
    found = described("gpt2", "GPT2LMHeadModel")
    assert found is not None
    assert found.ties_of({}) == found.ties_of({"tie_word_embeddings": True}) == found.ties
    assert found.ties_of({"tie_word_embeddings": False}) == ()


def test_fused_experts_have_their_operations() -> None:
    found = described("mixtral", "MixtralForCausalLM")
    assert found is not None
    fuse = next(rule for rule in found.rules if rule.operations)
    assert fuse.kind == "WeightConverter"
    assert fuse.operations == (("MergeModulelist", {"dim": 0}), ("Concatenate", {"dim": 1}))
    assert fuse.pattern.search("model.layers.0.mlp.experts.7.w1.weight")


def test_legacy_rules_come_last() -> None:
    found = described("llama", "LlamaForCausalLM")
    assert found is not None
    assert [rule.sources[0] for rule in found.rules[:2]] == [
        rule["sources"][0] for rule in HEADER["legacy"][:2]
    ]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "no-such-type"},
        {"model_type": ""},
        {"model_type": 'bert","classes":{'},
        {"model_type": "a" * 10**6},
        {"model_type": "b\ud800"},
        {"model_type": None},
        {"model_type": ["bert"]},
        {"model_type": {}},
        {"model_type": "bert", "architectures": "BertModel"},
        {"model_type": "bert", "architectures": [["BertModel"]]},
        {"model_type": "bert", "architectures": [{}]},
        {"model_type": "bert", "architectures": [1]},
        {"model_type": "bert", "architectures": {"0": "BertModel"}},
    ],
    ids=lambda config: repr(config)[:40],
)
def test_unknown_and_hostile_configs_have_no_facts(config: dict[str, Any]) -> None:
    assert architecture_of(config) is None


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("llama", "LlamaForCausalLM"),
        ("gpt2", "GPT2LMHeadModel"),
        ("t5", "T5ForConditionalGeneration"),
        ("bert", "BertLMHeadModel"),
        ("roberta", "RobertaForCausalLM"),
        ("distilbert", "DistilBertForMaskedLM"),
        ("bart", "BartForConditionalGeneration"),
        ("marian", "MarianMTModel"),
        ("mllama", "MllamaForConditionalGeneration"),
        ("vit", "ViTModel"),
    ],
)
@pytest.mark.parametrize("named", [{}, {"architectures": None}, {"architectures": ["Mine"]}])
def test_an_unknown_class_falls_back_on_one_with_a_head(
    model_type: str, name: str, named: dict[str, Any]
) -> None:
    found = architecture_of({"model_type": model_type, **named})
    assert found is not None
    assert found.name == name


def test_peft_renames_are_there() -> None:
    held = peft_renames()
    assert held["targets"]["mixtral"]["w1"] == "gate_up_proj"
    assert held["types"]["mixtral"] == "mixtral"
    assert held["rules"][0].targets == ("model.",)


def test_one_type_loads_in_milliseconds() -> None:
    for cached in (facts._contents, facts._header, facts._legacy, facts._line, facts._architecture):
        cached.cache_clear()
    start = time.process_time()
    assert described("qwen2", "Qwen2ForCausalLM")
    assert time.process_time() - start < 0.1  # a few milliseconds; CI machines are slow


def test_the_loader_imports_nothing_heavy() -> None:
    program = (
        "import sys; from weightsurgery.architecture.facts import architecture_of;"
        "architecture_of({'model_type': 'bert'});"
        "sys.exit(bool({'torch', 'transformers', 'peft', 'numpy'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
def test_transformers_still_agrees() -> None:
    """A spread-out sample; `python -m weightsurgery.architecture.generate --check` compares all."""
    for library in ("transformers", "peft"):
        assert importlib.metadata.version(library) == HEADER[library]
    from weightsurgery.architecture.generate import generate

    types = list(known_types()[:: len(known_types()) // SAMPLE])
    stored = PATH.read_text("ascii").splitlines()
    for line in generate(types)[1:]:
        assert line in stored, line[:80]


@pytest.mark.slow
def test_some_types_are_replaced_and_the_others_stay() -> None:
    from weightsurgery.architecture.generate import merge

    lines = (f'{{"model_type":"{kind}","n":1}}' for kind in "abd")
    stored = ['{"not_built":{"a/A":"old","c/C":"old"}}', *lines]
    renewed = ['{"not_built":{"a/A":"new"}}', '{"model_type":"c","n":2}']
    assert merge(stored, renewed, ["a", "c"]) == [
        '{"not_built":{"a/A":"new"}}',
        '{"model_type":"b","n":1}',
        '{"model_type":"c","n":2}',
        '{"model_type":"d","n":1}',
    ]
