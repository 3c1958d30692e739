"""The ways a checkpoint is stored, each as transformers itself loads it."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.architectures import (
    ARCHITECTURES,
    VOCABULARY,
    add_noise,
    inputs_of,
    random_model,
    seed_of,
)
from weightsurgery.models import Quiet

WORDS = [f"w{number}" for number in range(VOCABULARY)]
SEGMENTS = (*("_fsdp_wrapped_module.", "_orig_mod.", "module.", "_checkpoint_wrapped_module."),)
_IN_BLOCKS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
State = dict[str, Any]


# What transformers does not load in some way, and why; all else is "the same names as saved".
SAME_NAMES = "the same names as saved"
_UNMAPPED = "transformers loads other weights"  # it has no rule for the names of before 4.52
EXCEPTIONS = {
    ("florence2", "v4"): _UNMAPPED,
    ("qwen3-5", "v4"): _UNMAPPED,
    ("qwen3-vl", "v4"): _UNMAPPED,
    ("qwen3-vl-moe", "v4"): _UNMAPPED,
}


class Unstorable(Exception):
    """There is no such way for this model: transformers does not load it, or it changes nothing."""


def load(folder: Path, kind: type) -> Any:
    """The model that transformers makes of a folder, in float32."""
    import torch

    with Quiet():
        return kind.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        ).eval()


def outputs_of(model: Any, inputs: Mapping[str, Any]) -> Any:
    """Everything floating that a forward pass returns, end to end; no caches."""
    import torch

    def tensors(value: Any) -> Iterator[Any]:
        if isinstance(value, torch.Tensor):
            if value.is_floating_point():
                yield value.flatten()
        elif isinstance(value, Mapping):
            for name, one in value.items():
                if "past" not in name and "cache" not in name and name != "state":
                    yield from tensors(one)
        elif isinstance(value, list | tuple):
            for one in value:
                yield from tensors(one)

    with torch.no_grad(), Quiet():
        torch.manual_seed(0)
        return torch.cat(list(tensors(model(**inputs))))


def differing(model: Any, other: Any) -> list[str]:
    """The names of the parameters and stored buffers in which two models of a class differ."""
    import torch

    found, expected = model.state_dict(), other.state_dict()
    return [
        name
        for name in sorted({*found, *expected})
        if name not in found or name not in expected or not torch.equal(found[name], expected[name])
    ]


def transplant(base: Any, into: Any) -> None:
    """Give a model all that BASE has of it; its task head stays where BASE lacks one."""
    if type(base) is type(into):
        into.load_state_dict(base.state_dict())
        return
    body = base.base_model
    if hasattr(body, "language_model") and not hasattr(into.base_model, "language_model"):
        into.lm_head.load_state_dict(base.lm_head.state_dict())
        body = body.language_model
    into.base_model.load_state_dict(body.state_dict(), strict=False)


@dataclass(frozen=True)
class Models:
    """BASE and TUNED of one architecture, as transformers loads them from "saved".

    Attributes:
        base: The model of BASE.
        tuned: The model of TUNED.
        reset: TUNED with all that BASE has: what ratio 1 must be.
        inputs: Arguments of a forward pass of TUNED's class.
    """

    base: Any
    tuned: Any
    reset: Any
    inputs: Mapping[str, Any]

    @cached_property
    def outputs(self) -> tuple[Any, Any]:
        """What the reset model computes, and what TUNED computes."""
        return outputs_of(self.reset, self.inputs), outputs_of(self.tuned, self.inputs)

    @cached_property
    def embedding(self) -> tuple[str, ...]:
        """The names of TUNED's one word embedding and of what is tied to it; () without one."""
        weight = getattr(_word_embedding(self.tuned), "weight", None)
        if weight is None or tuple(weight.shape)[:1] != (VOCABULARY,):
            return ()
        if len(_vocabulary_embeddings(self.tuned)) > 1:
            return ()
        state = self.tuned.state_dict()
        return tuple(n for n, t in state.items() if t.data_ptr() == weight.data_ptr())


def _vocabulary_embeddings(model: Any) -> set[int]:
    import torch

    return {
        module.weight.data_ptr()
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings == VOCABULARY
    }


def _word_embedding(model: Any) -> Any:
    import torch

    for one in (model, getattr(model, "text_model", None)):
        try:
            found = one.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(found, torch.nn.Embedding):
            return found
    return None


class Zoo:
    """Models and their folders, each built when it is first asked for.

    Args:
        root: A folder of its own.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._models: dict[str, Models | Exception] = {}
        self._folders: dict[tuple[str, str, str], Path | Unstorable] = {}

    def models(self, name: str) -> Models:
        """BASE and TUNED of an architecture."""
        if name not in self._models:
            try:
                self._models[name] = self._build(name)
            except Exception as error:  # tell it again for each way
                self._models[name] = error
        found = self._models[name]
        if isinstance(found, Exception):
            raise found
        return found

    def folder(self, name: str, way: str, side: str) -> Path:
        """Where "base" or "tuned" of an architecture is stored in one way.

        Raises:
            Unstorable: transformers does not load that back, or it is as "saved".
        """
        models = self.models(name)
        if way == "saved":
            return self._place(name, way, side)
        key = (name, way, side)
        if key not in self._folders:
            try:
                self._folders[key] = self._store(models, *key)
            except Unstorable as error:
                self._folders[key] = error
        found = self._folders[key]
        if isinstance(found, Unstorable):
            raise found
        return found

    def forget(self, name: str) -> None:
        """Drop an architecture's models and folders."""
        self._models.pop(name, None)
        for key in [key for key in self._folders if key[0] == name]:
            del self._folders[key]
        shutil.rmtree(self.root / name, ignore_errors=True)

    def segment(self, name: str) -> str:
        """The wrapper segment of an architecture's "wrapped": they take turns."""
        return SEGMENTS[list(ARCHITECTURES).index(name) % len(SEGMENTS)]

    def _place(self, name: str, way: str, side: str) -> Path:
        return self.root / name / f"{way}-{side}"

    def _build(self, name: str) -> Models:
        import torch

        architecture, seed = ARCHITECTURES[name], seed_of(name)
        made = random_model(architecture, seed, base=True)
        base = self._saved(made, self._place(name, "saved", "base"))
        tuned = random_model(architecture, seed + 1, base=False)
        transplant(base, tuned)
        with torch.random.fork_rng():
            torch.manual_seed(seed + 2)
            add_noise(tuned, 0.05)
        tuned = self._saved(tuned, self._place(name, "saved", "tuned"))
        write_vocabulary(self._place(name, "saved", "tuned"))
        reset = copy.deepcopy(tuned)
        transplant(base, reset)
        models = Models(base, tuned, reset, inputs_of(architecture, seed))
        for one in models.outputs:
            if not torch.isfinite(one).all():
                raise ValueError("the model computes NaN or infinity")
        return models

    def _saved(self, model: Any, folder: Path) -> Any:
        with Quiet():
            model.save_pretrained(folder)
        return load(folder, type(model))

    def _store(self, models: Models, name: str, way: str, side: str) -> Path:
        model = models.tuned if side == "tuned" else models.base
        place, saved = self._place(name, way, side), self._place(name, "saved", side)
        problems: dict[str, None] = {}
        for number, write in enumerate(_candidates(way, model, saved, self.segment(name))):
            folder = place.with_name(f"{place.name}-{number}")
            try:
                folder.mkdir(parents=True)
                write(folder)
            except Unstorable as error:
                problems[str(error)] = None
                continue
            except Exception as error:
                problems[f"{type(error).__name__}: {error}"] = None
                continue
            problem = "" if way == "wrapped" else _not_loaded(folder, model)
            if not problem:
                if side == "tuned":
                    write_vocabulary(folder)
                return folder
            problems[problem] = None
        raise Unstorable("; ".join(problems))


def _not_loaded(folder: Path, model: Any) -> str:
    try:
        loaded = load(folder, type(model))
    except Exception as error:
        return f"transformers does not load it: {type(error).__name__}: {error}"
    names = differing(loaded, model)
    if names:
        return f"transformers loads other weights: {', '.join(names[:3])}"
    return "" if _ties(loaded) == _ties(model) else "transformers ties other weights"


def _ties(model: Any) -> set[frozenset[str]]:
    # Not by address: tensors of one storage in a .bin share it here, tied or not.
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}


Write = Callable[[Path], None]


def _candidates(way: str, model: Any, saved: Path, segment: str) -> Iterator[Write]:
    """The writers to try in turn; the first whose folder transformers loads back is taken."""
    if way == "v4":
        for prefixes in (True, False):
            for legacy in (True, False):
                yield lambda to, p=prefixes, g=legacy: _write_v4(to, model, saved, p, g)
    elif way == "bin":
        for untold in (True, False):
            for reverted in (True, False):
                yield lambda to, u=untold, r=reverted: _write_bin(to, model, saved, u, r)
    elif way == "wrapped":
        yield lambda to: _write_wrapped(to, saved, segment)
    elif way == "sharded":
        yield lambda to: _write_sharded(to, model)
    elif way == "inner":
        yield lambda to: _write_inner(to, model, saved)


WAYS = ("saved", "v4", "bin", "wrapped", "sharded", "inner")


def _write(to: Path, state: State, saved: Path) -> None:
    """A folder with a safetensors file and the config of another."""
    from safetensors.torch import save_file

    whole = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    save_file(whole, to / "model.safetensors", {"format": "pt"})
    (to / "config.json").write_text((saved / "config.json").read_text())


def _read(folder: Path) -> State:
    from safetensors.torch import load_file

    merged: State = {}
    for file in sorted(folder.glob("*.safetensors")):
        merged |= load_file(file)
    return merged


def untied(model: Any) -> State:
    """A model's state without the names that are tied to another."""
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    state = model.state_dict()
    kept = {name: tensor for name, tensor in state.items() if name not in ties}
    there = {tensor.data_ptr() for tensor in kept.values()}
    return kept | {n: t for n, t in state.items() if n not in kept and t.data_ptr() not in there}


def reverted(model: Any, state: State, *, prefixes: bool) -> State:
    """A state under the names that transformers converts from, every one of its rules reversed."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, revert_weight_conversion

    rules = get_model_conversion_mapping(model, add_legacy=False)
    rules = [rule for rule in rules if prefixes or not isinstance(rule, PrefixChange)]
    before = getattr(model, "_weight_conversions", None)
    model._weight_conversions = rules or None
    try:
        return dict(revert_weight_conversion(model, state))
    finally:
        model._weight_conversions = before


_LEGACY = (
    (r"LayerNorm\.weight$", "LayerNorm.gamma"),
    (r"LayerNorm\.bias$", "LayerNorm.beta"),
    (r"\.parametrizations\.weight\.original0$", ".weight_g"),
    (r"\.parametrizations\.weight\.original1$", ".weight_v"),
    # Before 4.52: a vision-language model held a whole language model.
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(vision_tower|multi_modal_projector|image_newline|vision_model)", r"\1"),
)


def _old_spelling(name: str, multimodal: bool) -> str:
    for pattern, old in _LEGACY if multimodal else _LEGACY[:4]:
        name = re.sub(pattern, old, name)
    return name


def _old_state(model: Any, prefixes: bool, legacy: bool) -> State:
    state = reverted(model, untied(model), prefixes=prefixes)
    if legacy:
        multimodal = any(name.startswith("model.language_model.") for name in state)
        state = {_old_spelling(name, multimodal): tensor for name, tensor in state.items()}
    return state


def store_otherwise(model: Any, saved: Path, folder: Path) -> dict[str, str]:
    """Store a model under other names that transformers loads back: older ones, or those in memory.

    Args:
        model: As it is loaded.
        saved: Where it is stored as transformers saves it.
        folder: Where to store it.

    Returns:
        The names in memory of tensors that are stored as they are to the names that transformers
        saves them under, if the model is stored under those in memory, and else to the older names.

    Raises:
        Unstorable: There are no such names.
    """
    kept = untied(model)
    olds = [_old_state(model, *how) for how in itertools.product((True, False), repeat=2)]
    for state in (*olds, kept):
        if set(state) == set(_read(saved)):
            continue
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _write(folder, state, saved)
        if not _not_loaded(folder, model):
            shown = state if state is not kept else olds[1]
            places = {tensor.data_ptr(): name for name, tensor in kept.items()}
            found = ((places.get(t.data_ptr()), name) for name, t in shown.items())
            return {own: name for own, name in found if own}
    raise Unstorable(SAME_NAMES)


def _write_v4(to: Path, model: Any, saved: Path, prefixes: bool, legacy: bool) -> None:
    state = _old_state(model, prefixes, legacy)
    if set(state) == set(_read(saved)):
        raise Unstorable(SAME_NAMES)
    _write(to, state, saved)


def _write_bin(to: Path, model: Any, saved: Path, untold: bool, revert: bool) -> None:
    import torch

    state = model.state_dict()
    state = reverted(model, state, prefixes=False) if revert else state
    torch.save({name: tensor.detach() for name, tensor in state.items()}, to / "pytorch_model.bin")
    config = json.loads((saved / "config.json").read_text())
    if untold:
        config = _untold(config)
    (to / "config.json").write_text(json.dumps(config))


def _untold(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration that leaves out that weights are tied, where that is the class's default."""
    from transformers import CONFIG_MAPPING

    shorter = copy.deepcopy(config)
    _untell_ties(shorter)
    kind = CONFIG_MAPPING[config["model_type"]]
    before, after = (_flags(kind.from_dict(copy.deepcopy(c)).to_dict()) for c in (config, shorter))
    return shorter if before == after else config


def _flags(config: dict[str, Any]) -> list[Any]:
    parts = [part for part in config.values() if isinstance(part, dict)]
    return [part.get("tie_word_embeddings") for part in (config, *parts)]


def _untell_ties(config: dict[str, Any]) -> None:
    if config.get("tie_word_embeddings") is True:
        del config["tie_word_embeddings"]
    for part in config.values():
        if isinstance(part, dict):
            _untell_ties(part)


def _wrap(name: str, segment: str) -> str:
    if segment in _IN_BLOCKS:
        name = re.sub(r"\.(\d+)\.", rf".\1.{segment}", name, count=1)
    if segment == "_checkpoint_wrapped_module.":
        return name
    return segment + name


def unwrapped(name: str) -> str:
    """A name without its wrapper segments."""
    for segment in SEGMENTS:
        name = re.sub(rf"(^|\.){re.escape(segment)}", r"\1", name)
    return name


def _write_wrapped(to: Path, saved: Path, segment: str) -> None:
    state = {_wrap(name, segment): tensor for name, tensor in _read(saved).items()}
    if set(state) == set(_read(saved)):
        raise Unstorable("no numbered blocks to wrap")
    _write(to, state, saved)


def unwrap(folder: Path) -> None:
    """Strip the wrapper segments from the names in a folder, so that transformers loads it."""
    state = {unwrapped(name): tensor for name, tensor in _read(folder).items()}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    _write(folder, state, folder)


def _write_sharded(to: Path, model: Any) -> None:
    size = sum(math.prod(p.shape) * 4 for p in model.parameters())
    with Quiet():
        model.save_pretrained(to, max_shard_size=max(size // 3, 1))
    if not (to / "model.safetensors.index.json").exists():
        raise Unstorable("it fits one shard")


def _write_inner(to: Path, model: Any, saved: Path) -> None:
    state = untied(model)
    if set(state) == set(_read(saved)):
        raise Unstorable(SAME_NAMES)
    _write(to, state, saved)


def write_vocabulary(folder: Path, words: Iterable[str] = WORDS) -> None:
    """A tokenizer.json that gives each row of the embedding a token."""
    vocabulary = {word: number for number, word in enumerate(words)}
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    text = {
        **empty,
        "version": "1.0",
        "added_tokens": [],
        "model": model,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(text))
