"""What one transformers class does with a checkpoint, found by building and asking it.

Only `generate` imports this module: it needs transformers.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from weightsurgery.architecture.build import build, nested_configs, text_config_path

Json = dict[str, Any]
_TIE = "tie_word_embeddings"
_FLAGS = (None, False, True)  # None: config.json has no such key
_MANY_TIES = 40
_MORE_TOKENS = 64


def template(name: str) -> str:
    """A tensor's name with "*" for each segment that is a number."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def templates(names: Iterable[str]) -> list[str]:
    """The distinct templates of tensor names, sorted."""
    return sorted({template(name) for name in names})


def tree(names: Iterable[str]) -> Json:
    """Dotted names as nested objects, 0 at each name's end; no name may continue another."""
    root: Json = {}
    for name in names:
        node = root
        *parents, last = name.split(".")
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = 0
    return root


def rule_record(transform: Any) -> Json:
    """A transformers weight transform as data; empty fields are left out."""
    record = {
        "kind": type(transform).__name__,
        "match": transform.compiled_sources.pattern,
        "sources": list(transform.source_patterns),
        "targets": list(transform.target_patterns),
        "base": transform.base_model_prefix,
        "offset": getattr(transform, "offset", 0),
        "operations": [_operation(op) for op in getattr(transform, "operations", ())],
    }
    record = {key: value for key, value in record.items() if value}
    if transform.scope_prefix is not None:  # "" differs from None: the base prefix is optional
        record["scope"] = transform.scope_prefix
    return record


def _operation(operation: Any) -> list[Any]:
    settings = inspect.signature(type(operation)).parameters
    held = {key: getattr(operation, key) for key in settings}
    return [type(operation).__name__, {k: v for k, v in held.items() if v is not None}]


def class_record(class_: Any, config: Any) -> tuple[Json, list[Json]]:
    """Facts of one class, and its rules in the order in which they apply.

    Returns:
        The record without "rules" and with all "parameters"; the rules.
    """
    model = build(class_, config)
    names = sorted(model.state_dict(), key=dot_natural_key)
    rules = [rule_record(t) for t in get_model_conversion_mapping(model, add_legacy=False)]
    prefix = model.base_model_prefix
    is_base = not (prefix and hasattr(model, prefix))
    text_path = text_config_path(config)
    parts = dict(nested_configs(model.config))
    embedding = _weight_of(model, "get_input_embeddings")
    record = {
        "prefix": "" if is_base else prefix,
        "base": is_base,
        "base_prefix": prefix if is_base else "",
        "parameters": templates(names),
        "final": _final(model, names),
        "ties": _ties(class_, config, text_path) if _may_tie(model) else [],
        "text_config_key": text_path,
        "parts": {path: part.model_type for path, part in parts.items()},
        "embedding": embedding,
        "head": _weight_of(model, "get_output_embeddings"),
        "text": _text_module(model, embedding, parts.get(text_path)),
        "vocabulary": _vocabulary(class_, config, text_path, model),
        "stacks": _stacks(model),
        "float32": sorted(model._keep_in_fp32_modules),
        "float32_strict": sorted(model._keep_in_fp32_modules_strict),
    }
    return {key: value for key, value in record.items() if value}, rules


def _final(model: Any, names: Sequence[str]) -> list[str]:
    """Own names that the rules would rename to what the model lacks; it keeps these names.

    A template stands for all its names; if the rules treat these differently, each name counts.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    present = model.state_dict()
    kept: dict[str, list[str]] = {}
    others = set()
    for name in names:
        new, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, present)
        if new in present:
            others.add(template(name))
        else:
            kept.setdefault(template(name), []).append(name)
    return sorted(n for t, held in kept.items() for n in (held if t in others else [t]))


def _may_tie(model: Any) -> bool:
    inner = (m for m in model.modules() if isinstance(m, PreTrainedModel))
    return any(getattr(module, "_tied_weights_keys", None) for module in inner)


def _ties(class_: Any, config: Any, text_path: str) -> list[list[str]]:
    """Tied names, and for which values of the config's flags each pair is tied.

    The flags are those of the config and of its nested text config, if any; each is absent, false
    or true, the inner one changing fastest. A pair has one character per combination.
    """
    cases = list(product(_FLAGS, _FLAGS if text_path else (None,)))
    seen: dict[str, dict[str, str]] = {}
    found: dict[tuple[str, str], list[str]] = {}
    for case, (outer, inner) in enumerate(cases):
        changed = config.to_dict()
        _set_flag(changed, outer)
        if text_path:
            nested = changed
            for key in text_path.split("."):
                nested = nested[key]
            _set_flag(nested, inner)
        try:
            variant = type(config).from_dict(changed)
        except StrictDataclassError:  # DBRX cannot be tied: such a model is never loaded
            continue
        identity = variant.to_json_string(use_diff=False)
        if identity not in seen:
            seen[identity] = build(class_, variant).all_tied_weights_keys
        for pair in seen[identity].items():
            found.setdefault(pair, ["0"] * len(cases))[case] = "1"
    if len(found) <= _MANY_TIES:
        return [[*pair, "".join(when)] for pair, when in found.items()]
    shared: dict[tuple[str, str], list[str]] = {}
    for (target, source), when in found.items():
        before = shared.setdefault((template(target), template(source)), when)
        before[:] = [max(pair) for pair in zip(before, when, strict=True)]
    return [[*pair, "".join(when)] for pair, when in shared.items()]


def _set_flag(config: Json, flag: bool | None) -> None:
    config.pop(_TIE, None)
    if flag is not None:
        config[_TIE] = flag


def _weight_of(model: Any, getter: str) -> str:
    """The name of an embedding module's weight, or ""."""
    try:
        wanted = getattr(model, getter)()
    except (AttributeError, NotImplementedError, TypeError):
        return ""
    if wanted is None:
        return ""
    for name, module in model.named_modules(remove_duplicate=False):
        if module is wanted:
            return f"{name}.weight" if getattr(module, "weight", None) is not None else ""
    named = model.named_parameters(remove_duplicate=False)
    return next((name for name, tensor in named if tensor is wanted), "")


def _stacks(model: Any) -> list[list[Any]]:
    """The parameters of modules that hold the matrices of several experts in one tensor.

    Returns:
        Templates in the order in which a module has them, each with 1 where a matrix is inputs by
        outputs, or 0.
    """
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if "Expert" in type(module).__name__ and any(one.ndim == 3 for one in own.values()):
            turned = int(getattr(module, "is_transposed", False))
            found |= {template(f"{name}.{one}"): turned for one in own}
    return [[*item] for item in found.items()]


def _text_module(model: Any, embedding: str, text_config: Any) -> str:
    """The innermost model within `model` that owns the input embedding and has the text config.

    It is not `model`'s base model. The encoder of an encoder-decoder has another config.
    """
    owners = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, PreTrainedModel)
        and name not in {"", model.base_model_prefix}
        and embedding.startswith(f"{name}.")
    }
    name = max(owners, key=len, default="")
    return name if name and owners[name].config is text_config else ""


def _vocabulary(class_: Any, config: Any, text_path: str, model: Any) -> dict[str, int]:
    """The dimension that grows with the vocabulary, for each template that has one."""
    larger = copy.deepcopy(config)
    inner = dict(nested_configs(larger))
    size = getattr(inner.get(text_path, larger), "vocab_size", None)
    if not isinstance(size, int):
        return {}
    for part, key in product((larger, *inner.values()), ("vocab_size", "decoder_vocab_size")):
        if getattr(part, key, None) == size:
            setattr(part, key, size + _MORE_TOKENS)
    before = model.state_dict()
    found = {}
    for name, tensor in build(class_, larger).state_dict().items():
        sizes = zip(tensor.shape, before[name].shape, strict=True)
        grown = [dimension for dimension, (new, old) in enumerate(sizes) if new != old]
        if grown:
            found[template(name)] = grown[0]
    return dict(sorted(found.items()))


def compact(value: Any) -> str:
    """JSON on one line: ASCII, sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
