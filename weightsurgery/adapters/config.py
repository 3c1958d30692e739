"""What an adapter's configuration says, as far as folding it into weights is concerned.

Every field is either understood, known to matter in training alone, or a reason to refuse: an
adapter that is half understood would be merged half.

References:
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv:2106.09685.
    Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
    arXiv:2312.03732 (rsLoRA: α/√r).
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from weightsurgery.checkpoint import Checkpoint
from weightsurgery.errors import FormatError, MismatchError, PolicyError, shown

# How training began or ran, or which modules got an adapter, which the tensors tell better.
_TRAINING = {
    *("auto_mapping", "corda_config", "eva_config", "exclude_modules"),
    *("inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout", "lora_ga_config"),
    *("loftq_config", "megatron_core", "peft_type", "qalora_group_size"),
    *("revision", "runtime_config", "target_modules", "task_type"),
}
_UNDERSTOOD = {
    *("alpha_pattern", "base_model_name_or_path", "bias", "ensure_weight_tying", "fan_in_fan_out"),
    "init_lora_weights",
    *("lora_alpha", "lora_bias", "modules_to_save", "peft_version", "r", "rank_pattern"),
    "target_parameters",
    *("trainable_token_indices", "use_dora", "use_rslora"),
}
# These begin from the base's own weights and change those too, so BASE is not what was adapted.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_LONGEST_KEY = 500
_PLAIN_KEY = re.compile(rf"\^?[A-Za-z0-9_.\-]{{1,{_LONGEST_KEY}}}")
# PEFT's own regular expressions: `.*` and escaped dots. It writes one for each kind of parameter.
_WILD_KEY = re.compile(rf"(?:[A-Za-z0-9_\-]|\\\.|\.\*){{1,{_LONGEST_KEY}}}")
_MOST_WILD = 100


@dataclass(frozen=True)
class AdapterConfig:
    """The configuration of a LoRA adapter.

    Attributes:
        rank: r, where no pattern says otherwise.
        alpha: α, where no pattern says otherwise.
        rank_pattern: Module, or parameter that is adapted directly, to r.
        alpha_pattern: The same to α.
        use_rslora: The scale is α/√r in place of α/r.
        use_dora: Rows are rescaled to learned norms.
        lora_bias: The second factor has a bias.
        bias: Which biases are replaced: none, all or lora_only.
        fan_in_fan_out: The adapted matrices are stored transposed, as GPT-2's.
        modules_to_save: Modules that are replaced whole.
        ensure_weight_tying: Of an embedding that is replaced whole, the head that is tied to it is
            saved too.
        token_indices: Rows of an embedding that are replaced, by the embedding's module; "" stands
            for the word embedding.
        target_parameters: Parameters that are adapted directly.
        base: What the adapter says it was trained on.
        peft: The first two numbers of PEFT's version that saved it, () if it does not say.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    bias: str
    fan_in_fan_out: bool
    modules_to_save: tuple[str, ...]
    ensure_weight_tying: bool
    token_indices: Mapping[str, tuple[int, ...]]
    target_parameters: tuple[str, ...]
    base: str
    peft: tuple[int, ...]

    def rank_of(self, adapted: str) -> int:
        """The rank of the factors of a module, or of a parameter that is adapted directly."""
        return self.rank_pattern.get(self._rank_keys.first_match(adapted), self.rank)

    def scale_of(self, adapted: str) -> float:
        """What the product of such factors is multiplied by: α/r, with rsLoRA α/√r."""
        alpha = self.alpha_pattern.get(self._alpha_keys.first_match(adapted), self.alpha)
        rank = self.rank_of(adapted)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @cached_property
    def _rank_keys(self) -> _Keys:
        return _Keys(self.rank_pattern)

    @cached_property
    def _alpha_keys(self) -> _Keys:
        return _Keys(self.alpha_pattern)


class _Keys:
    """The keys of a pattern: names, and names with `.*` in them.

    Args:
        keys: In their order.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._order: dict[str, int] = {}
        self._wild: list[tuple[int, str, list[str]]] = []
        for place, key in enumerate(keys):
            if _PLAIN_KEY.fullmatch(key):
                self._order[key] = place
            else:
                pieces = [piece.replace("\\.", ".") for piece in key.split(".*")]
                self._wild.append((place, key, pieces))

    def first_match(self, adapted: str) -> str:
        """The first key that is the name or its end after a dot; one with `^` is all of it.

        The name's ends are looked up, not the keys gone through: a stranger's adapter may have
        100,000 of both. No key is longer than `_LONGEST_KEY`, so no longer end is looked for.

        Args:
            adapted: A module, or a parameter that is adapted directly.

        Returns:
            The key, "" if none matches.
        """
        start = max(0, len(adapted) - _LONGEST_KEY)
        ends = [adapted[i:] for i in range(start, len(adapted)) if i == 0 or adapted[i - 1] == "."]
        found = [(self._order[key], key) for key in (f"^{adapted}", *ends) if key in self._order]
        for place, key, pieces in self._wild:
            if any(_matches(end, pieces) for end in ends):
                found.append((place, key))
                break
        return min(found, default=(0, ""))[1]


def _matches(name: str, pieces: list[str]) -> bool:
    """True if a name is the pieces with anything between them."""
    first, *inner, last = pieces
    if not name.startswith(first) or not name.endswith(last) or len(name) < len(first) + len(last):
        return False
    at, stop = len(first), len(name) - len(last)
    for piece in inner:
        found = name.find(piece, at, stop)
        if found < 0:
            return False
        at = found + len(piece)
    return at <= stop


def read_config(adapter: Checkpoint) -> AdapterConfig:
    """Read and check an adapter's configuration.

    Nothing in it is imported, compiled or fetched.

    Args:
        adapter: From `open_checkpoint`.

    Raises:
        MismatchError: It is no adapter.
        PolicyError: It is of a kind that is not folded in here, or has a setting that is unknown.
        FormatError: A value is not of its kind.
    """
    given = adapter.config
    kind = given.get("peft_type")
    if not isinstance(kind, str):
        raise MismatchError(
            "not an adapter: a model where a PEFT adapter is expected",
            file=adapter.label,
            hint="an adapter is a folder with adapter_config.json and adapter_model.safetensors",
            code="E-ADAPTER-MODEL",
        )
    if kind != "LORA":
        raise PolicyError(
            f"an adapter of type {shown(kind)}; only LORA is folded in",
            file=adapter.label,
            hint="merge it with the library that made it",
            code="E-ADAPTER-KIND",
        )
    _refuse_unknown(adapter)
    check = _Checker(adapter)
    return AdapterConfig(
        rank=check.rank(given.get("r"), "r"),
        alpha=check.number(given.get("lora_alpha"), "lora_alpha"),
        rank_pattern={k: check.rank(v, "rank_pattern") for k, v in check.pattern("rank_pattern")},
        alpha_pattern={
            k: check.number(v, "alpha_pattern") for k, v in check.pattern("alpha_pattern")
        },
        use_rslora=check.flag("use_rslora"),
        use_dora=check.flag("use_dora"),
        lora_bias=check.flag("lora_bias"),
        bias=check.bias(),
        fan_in_fan_out=check.flag("fan_in_fan_out"),
        modules_to_save=check.names("modules_to_save"),
        ensure_weight_tying=check.flag("ensure_weight_tying"),
        token_indices=check.tokens(),
        target_parameters=check.names("target_parameters"),
        base=check.base(),
        peft=_version(given.get("peft_version")),
    )


def _version(value: Any) -> tuple[int, ...]:
    """The first two numbers of a version, () for what is no version."""
    found = re.match(r"([0-9]{1,4})\.([0-9]{1,4})\b", value) if isinstance(value, str) else None
    return (int(found[1]), int(found[2])) if found else ()


def _refuse_unknown(adapter: Checkpoint) -> None:
    for key, value in adapter.config.items():
        if key not in _TRAINING and key not in _UNDERSTOOD and value not in (None, False, [], {}):
            raise PolicyError(
                f"its configuration has {shown(key)}, which is not supported here: the merge "
                "might be wrong",
                file=adapter.label,
                hint="merge it with the library that made it",
                code="E-ADAPTER-FIELD",
            )
    start = adapter.config.get("init_lora_weights", True)
    if not any(start is plain or start == plain for plain in _PLAIN_STARTS):
        raise PolicyError(
            f"init_lora_weights is {shown(start)}: such a training changes the base's weights "
            "too, so the adapter does not fit BASE as it is",
            file=adapter.label,
            hint="convert it to a plain LoRA when it is saved",
            code="E-ADAPTER-FIELD",
        )


class _Checker:
    """Takes values from a configuration, each of its kind or an error."""

    def __init__(self, adapter: Checkpoint) -> None:
        self.given, self.label = adapter.config, adapter.label

    def fail(
        self, key: str, value: Any, expected: str, code: str = "E-ADAPTER-CONFIG"
    ) -> FormatError:
        return FormatError(
            f"{key} is {shown(repr(value))}; expected {expected}",
            file=f"{self.label}/adapter_config.json",
            code=code,
        )

    def rank(self, value: Any, key: str) -> int:
        if type(value) is not int or not 0 < value < 1 << 32:
            raise self.fail(key, value, "a positive integer", "E-ADAPTER-RANK")
        return value

    def number(self, value: Any, key: str) -> float:
        if type(value) in (int, float) and abs(value) <= sys.float_info.max:
            return float(value)
        raise self.fail(key, value, "a finite number", "E-ADAPTER-ALPHA")

    def flag(self, key: str) -> bool:
        value = self.given.get(key, False)
        if value is not None and type(value) is not bool:
            raise self.fail(key, value, "true or false")
        return bool(value)

    def bias(self) -> str:
        value = self.given.get("bias", "none")
        if value not in ("none", "all", "lora_only"):
            raise self.fail("bias", value, "none, all or lora_only")
        return str(value)

    def names(self, key: str) -> tuple[str, ...]:
        value = self.given.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.fail(key, value, "a list of names")
        return tuple(value)

    def pattern(self, key: str) -> list[tuple[str, Any]]:
        """Module names, each with its value.

        Raises:
            PolicyError: A name is a regular expression of another kind than PEFT writes.
        """
        value = self.given.get(key) or {}
        if not isinstance(value, dict):
            raise self.fail(key, value, "an object of module names")
        wild = 0
        for name in value:
            if _PLAIN_KEY.fullmatch(name):
                continue
            wild += 1
            if wild > _MOST_WILD or ".*" not in name or not _WILD_KEY.fullmatch(name):
                raise PolicyError(
                    f"{key} has '{shown(name)}', a regular expression; expected names, or at most "
                    f"{_MOST_WILD} of names with .* in them",
                    file=f"{self.label}/adapter_config.json",
                    hint="write out the modules' names",
                    code="E-ADAPTER-PATTERN",
                )
        return list(value.items())

    def tokens(self) -> dict[str, tuple[int, ...]]:
        value = self.given.get("trainable_token_indices") or {}
        by_module = value if isinstance(value, dict) else {"": value}
        for rows in by_module.values():
            fits = isinstance(rows, list) and all(type(i) is int and i >= 0 for i in rows)
            if not fits or len(set(rows)) < len(rows):
                raise self.fail("trainable_token_indices", value, "different token numbers")
        return {str(module): tuple(rows) for module, rows in by_module.items()}

    def base(self) -> str:
        value = self.given.get("base_model_name_or_path")
        if value is not None and not isinstance(value, str):
            raise self.fail("base_model_name_or_path", value, "a name")
        return value or ""
