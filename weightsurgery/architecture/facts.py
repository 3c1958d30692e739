"""Read `facts.jsonl`: what transformers does with each architecture's checkpoint.

The file's first line is a header; each other line holds one model type. Only the line that is
wanted is parsed. `generate` writes the file; nothing here imports torch or transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

_PATH = Path(__file__).with_name("facts.jsonl")
_LONGEST_TYPE = 100
_TIE = "tie_word_embeddings"
# Classes to fall back on, by how their names end, the first choice first.
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "MTModel", "ForMaskedLM")


@dataclass(frozen=True)
class Rule:
    """One rule by which transformers renames or converts stored tensors while loading.

    Attributes:
        kind: The class in transformers: WeightRenaming, WeightConverter and so on.
        match: Regular expression; group g0 belongs to the first source, g1 to the second.
        sources: Patterns of stored names.
        targets: What replaces them.
        scope: Prefix of the submodel that the rule is for; None for the whole model.
        base: The base model prefix, optional before `scope`.
        operations: The operations on the tensors: each one's class and settings.
        offset: What is added to an index in the name.
    """

    kind: str
    match: str
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    scope: str | None
    base: str
    operations: tuple[tuple[str, Mapping[str, Any]], ...]
    offset: int

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """`match`, compiled."""
        return re.compile(self.match)


@dataclass(frozen=True)
class Tie:
    """Two names for one tensor.

    Attributes:
        target: The name that is tied, usually the output head's.
        source: The name that it is tied to, usually the input embedding's.
        when: One character for each state of config.json's `tie_word_embeddings` (absent, false,
            true): "1" where the two are tied. If the config has a nested text config, three for
            each state of the top level, by the state in the text config.
    """

    target: str
    source: str
    when: str


@dataclass(frozen=True)
class Architecture:
    """What transformers does with checkpoints of one class.

    Templates are state-dict names with "*" for each segment that is a number.

    Attributes:
        name: The class.
        model_type: The model type.
        prefix: Attribute that holds the base model; "" if the class is the base model.
        is_base: True if the class is itself the base model.
        base_prefix: A base model's prefix within other classes; else "".
        text: Path of the text model inside a multimodal model; "" for a plain text model.
        text_config_key: Dotted key of the nested text config; "" if there is none.
        parts: The model type of each nested config, by its dotted key, that the facts hold for. A
            config.json with another one has other `parameters` and `rules` in that part.
        embedding: Name of the input embedding's weight; "" if there is none.
        head: Name of the output head's weight; "" if there is none.
        vocabulary: The dimension that grows with the vocabulary, by template.
        stacks: Templates of the parameters of modules that hold the matrices of several experts in
            one tensor, in the module's order; true where a matrix is inputs by outputs.
        rules: Rules in the order in which transformers applies them.
        final: Templates or names that the rules would rename, yet the model has them as they are.
        parameters: Templates of all parameters and persistent buffers.
        ties: Tied weights.
        float32: Modules kept in float32 where float16 is requested.
        float32_strict: Modules kept in float32 where float16 or bfloat16 is requested.
    """

    name: str
    model_type: str
    prefix: str
    is_base: bool
    base_prefix: str
    text: str
    text_config_key: str
    parts: Mapping[str, str]
    embedding: str
    head: str
    vocabulary: Mapping[str, int]
    stacks: Mapping[str, int]
    rules: tuple[Rule, ...]
    final: frozenset[str]
    parameters: frozenset[str]
    ties: tuple[Tie, ...]
    float32: tuple[str, ...]
    float32_strict: tuple[str, ...]

    def ties_of(self, config: Mapping[str, Any]) -> tuple[Tie, ...]:
        """The ties that hold for a model.

        Args:
            config: The contents of its config.json.
        """
        place = _flag(config)
        if self.text_config_key:
            place = 3 * place + _flag(nested(config, self.text_config_key))
        return tuple(tie for tie in self.ties if tie.when[place] == "1")


def architecture_of(config: Mapping[str, Any]) -> Architecture | None:
    """Find the facts about a model by its config.json; see `composite` for models of any two.

    Args:
        config: The contents of config.json.

    Returns:
        Facts of the class in "architectures"; if it is missing or unknown, of the model type's
        class with a language-model head, or else of its base model. None for an unknown type.
    """
    model_type, name = config.get("model_type"), class_of(config)
    if not isinstance(model_type, str) or name is None:
        return None
    return _architecture(model_type, name)


def class_of(config: Mapping[str, Any]) -> str | None:
    """The class that config.json names, "" if it names none, None if it is malformed.

    Args:
        config: The contents of config.json.
    """
    names = config.get("architectures") or [""]
    name = names[0] if isinstance(names, list) else None
    return name if isinstance(name, str) else None


def class_ending(model_type: str, endings: tuple[str, ...]) -> str:
    """The first class of a model type whose name has one of the endings, "" if none has.

    Args:
        model_type: The type.
        endings: In the order of preference.
    """
    line = _line(model_type)
    names = [*line["classes"]] if line is not None else []
    return next((name for ending in endings for name in names if name.endswith(ending)), "")


def nested(config: Mapping[str, Any], key: str) -> object:
    """What a configuration has under a dotted key, None if it has nothing there.

    Args:
        config: The contents of config.json.
        key: Such as "thinker_config.text_config".
    """
    found: object = config
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


@lru_cache(maxsize=1)
def known_types() -> tuple[str, ...]:
    """The model types that there are facts for, sorted."""
    found = re.findall(rb'^\{"model_type":"([^"]+)"', _contents(), re.MULTILINE)
    return tuple(model_type.decode("ascii") for model_type in found)


def known_classes(model_type: str) -> tuple[str, ...]:
    """The classes of a model type that there are facts for, its base model first.

    Args:
        model_type: One of `known_types`; another has none.
    """
    line = _line(model_type)
    return tuple(line["classes"]) if line else ()


def library_versions() -> Mapping[str, str]:
    """The versions of "transformers" and "peft" that the facts are about."""
    return {name: _header()[name] for name in ("transformers", "peft")}


def classes_not_built() -> Mapping[str, str]:
    """Classes without facts, as "MODEL_TYPE/CLASS", each with the error that building it raised."""
    held: Mapping[str, str] = _header()["not_built"]
    return held


@lru_cache(maxsize=1)
def peft_renames() -> Mapping[str, Any]:
    """What PEFT itself knows of renamed modules.

    Returns:
        "rules": rules applied to an adapter's names before the model's own; "targets": old module
        names and the parameters they are in now; "fused": these parameters' parts, in order, both
        by pattern; "types": the pattern of each model type that has one.
    """
    held: Mapping[str, Any] = _header()["peft_renames"]
    return {**held, "rules": tuple(_rule(rule) for rule in held["rules"])}


@lru_cache(maxsize=1)
def _contents() -> bytes:
    return _PATH.read_bytes()


@lru_cache(maxsize=1)
def _header() -> Mapping[str, Any]:
    held: Mapping[str, Any] = json.loads(_contents().partition(b"\n")[0])
    return held


@lru_cache(maxsize=1)
def legacy_rules() -> tuple[Rule, ...]:
    """The rules that hold for all architectures: spellings of older versions."""
    return tuple(_rule(rule) for rule in _header()["legacy"])


@lru_cache(maxsize=16)
def _line(model_type: str) -> Mapping[str, Any] | None:
    if len(model_type) > _LONGEST_TYPE:
        return None
    start = b'\n{"model_type":%s,' % json.dumps(model_type).encode("ascii")
    at = _contents().find(start)
    if at < 0:
        return None
    held: Mapping[str, Any] = json.loads(_contents()[at + 1 : _contents().index(b"\n", at + 1)])
    return held


@lru_cache(maxsize=16)
def _architecture(model_type: str, name: str) -> Architecture | None:
    line = _line(model_type)
    if line is None:
        return None
    classes = line["classes"]
    if name not in classes:
        name = _default_class(classes)
    record = classes[name]
    prefix = record.get("prefix", "")
    dotted = f"{prefix}." if prefix else ""
    inherited = set(_names(line["backbone"])).difference(_names(record.get("without", {})))
    parameters = {dotted + name for name in inherited}.union(_names(record.get("parameters", {})))
    own = (_rule(line["rules"][place]) for place in record.get("rules", ()))
    return Architecture(
        name=name,
        model_type=model_type,
        prefix=prefix,
        is_base=record.get("base", False),
        base_prefix=record.get("base_prefix", ""),
        text=record.get("text", ""),
        text_config_key=record.get("text_config_key", ""),
        parts=record.get("parts", {}),
        embedding=record.get("embedding", ""),
        head=record.get("head", ""),
        vocabulary=record.get("vocabulary", {}),
        stacks=dict(record.get("stacks", ())),
        rules=(*own, *legacy_rules()),
        final=frozenset(record.get("final", ())),
        parameters=frozenset(parameters),
        ties=tuple(Tie(*tie) for tie in record.get("ties", ())),
        float32=tuple(record.get("float32", ())),
        float32_strict=tuple(record.get("float32_strict", ())),
    )


def _default_class(classes: Mapping[str, Any]) -> str:
    """The class with a language-model head that lacks least of the base model; else that one.

    An encoder-decoder's causal class is its decoder alone, so the first choice is not always it.
    """
    heads = [name for end in _WITH_HEAD for name in classes if name.endswith(end)]
    if heads:
        return min(heads, key=lambda name: len([*_names(classes[name].get("without", {}))]))
    return next((name for name in classes if classes[name].get("base")), next(iter(classes)))


def _flag(config: object) -> int:
    """How a config has `tie_word_embeddings`: absent, false or true."""
    if not isinstance(config, Mapping) or _TIE not in config:
        return 0
    return 2 if config[_TIE] else 1


def _names(tree: Mapping[str, Any], start: str = "") -> Iterator[str]:
    """The dotted names in nested objects."""
    for part, inner in tree.items():
        if inner:
            yield from _names(inner, f"{start}{part}.")
        else:
            yield start + part


def _rule(record: Mapping[str, Any]) -> Rule:
    return Rule(
        kind=record["kind"],
        match=record["match"],
        sources=tuple(record["sources"]),
        targets=tuple(record["targets"]),
        scope=record.get("scope"),
        base=record.get("base", ""),
        operations=tuple((name, settings) for name, settings in record.get("operations", ())),
        offset=record.get("offset", 0),
    )
