"""Models whose parts may be of any type: an encoder beside a decoder, any text model with images.

The facts about such a class hold for the parts that it has by default, so those of other parts are
put in their place here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from weightsurgery.architecture.facts import (
    Architecture,
    Rule,
    Tie,
    architecture_of,
    class_ending,
    class_of,
    legacy_rules,
    nested,
)

_ENDINGS = {"encoder": ("Model",), "decoder": ("ForCausalLM", "LMHeadModel")}


def find_architecture(config: Mapping[str, Any]) -> Architecture | None:
    """Find the facts about a model, also of one that is made of two.

    Args:
        config: The contents of config.json.

    Returns:
        Facts of the class; of an encoder and a decoder together where the class is made of any
        two. None for what is not known.
    """
    found = architecture_of(config)
    if found is not None:
        return _with_parts(found, config)
    parts = {key: _part(config.get(key), endings) for key, endings in _ENDINGS.items()}
    known = {key: part for key, part in parts.items() if part is not None}
    if len(known) < len(parts):
        return None
    decoder = known["decoder"]
    return Architecture(
        name=class_of(config) or "EncoderDecoderModel",
        model_type=str(config.get("model_type")),
        prefix="",
        is_base=True,
        base_prefix="",
        text="",
        text_config_key="",
        parts={},
        embedding=f"decoder.{decoder.embedding}" if decoder.embedding else "",
        head=f"decoder.{decoder.head}" if decoder.head else "",
        vocabulary={f"{k}.{n}": a for k, part in known.items() for n, a in part.vocabulary.items()},
        stacks={f"{k}.{n}": t for k, part in known.items() for n, t in part.stacks.items()},
        rules=(*(r for k, part in known.items() for r in _rules(k, part)), *legacy_rules()),
        final=frozenset(f"{key}.{n}" for key, part in known.items() for n in part.final),
        parameters=frozenset(f"{key}.{n}" for key, part in known.items() for n in part.parameters),
        ties=tuple(t for k, part in known.items() for t in _ties(k, part, config[k])),
        float32=tuple(n for part in known.values() for n in part.float32),
        float32_strict=tuple(n for part in known.values() for n in part.float32_strict),
    )


def _with_parts(known: Architecture, config: Mapping[str, Any]) -> Architecture:
    """Facts of a class with those of its parts that are of another type than by default.

    The experts of any part are fused; the text model's ties and vocabulary are its own.
    """
    for key, usual in known.parts.items():
        part = nested(config, key)
        kind = part.get("model_type") if isinstance(part, Mapping) else None
        other = architecture_of({"model_type": kind}) if kind != usual else None
        if other is None or not isinstance(part, Mapping):
            continue
        converters = [rule for rule in other.rules if rule.operations]
        known = replace(
            known,
            rules=(*converters, *known.rules),
            float32=(*known.float32, *other.float32),
            float32_strict=(*known.float32_strict, *other.float32_strict),
        )
        default = architecture_of({"model_type": usual})
        module = known.head.removesuffix(default.head) if default and default.head else ""
        if key == known.text_config_key and module.endswith("."):
            own = {f"{module}{name}": axis for name, axis in other.vocabulary.items()}
            known = replace(
                known,
                embedding=f"{module}{other.embedding}" if other.embedding else "",
                head=f"{module}{other.head}" if other.head else "",
                vocabulary={**known.vocabulary, **own},
                stacks={**known.stacks, **{f"{module}{n}": t for n, t in other.stacks.items()}},
                ties=(*known.ties, *_ties(module.removesuffix("."), other, part, known)),
            )
    return known


def _part(config: object, endings: tuple[str, ...]) -> Architecture | None:
    """Facts of a part: of the class that such a part has, whatever its config.json names."""
    kind = config.get("model_type") if isinstance(config, Mapping) else None
    if not isinstance(kind, str):
        return None
    name = class_ending(kind, endings)
    return architecture_of({"model_type": kind, "architectures": [name]}) if name else None


def _rules(key: str, part: Architecture) -> list[Rule]:
    """A part's rules, which look at its names alone."""
    legacy = legacy_rules()
    return [
        replace(rule, scope=".".join(filter(None, (key, rule.base, rule.scope))), base="")
        for rule in part.rules
        if rule not in legacy
    ]


def _ties(
    key: str, part: Architecture, config: Mapping[str, Any], whole: Architecture | None = None
) -> list[Tie]:
    """A part's ties, which its own configuration switches, as ties of the whole model."""
    held = part.ties_of(config)
    states = 9 if whole is not None and whole.text_config_key else 3
    return [
        Tie(f"{key}.{tie.target}", f"{key}.{tie.source}", ("1" if tie in held else "0") * states)
        for tie in part.ties
    ]
