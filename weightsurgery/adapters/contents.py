"""What an adapter's file holds: factors by module, and tensors that stand for BASE's own."""

from __future__ import annotations

import re
from dataclasses import dataclass

from weightsurgery.adapters.config import AdapterConfig
from weightsurgery.adapters.experts import candidates
from weightsurgery.architecture.copies import are_equal
from weightsurgery.checkpoint import Checkpoint, TensorView
from weightsurgery.errors import FormatError, PolicyError, counted, shown
from weightsurgery.formats.layout import ADAPTER

FRONT = "base_model.model."
_ROLES = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_B.bias": "shift",
    "lora_embedding_A": "embedding a",
    "lora_embedding_B": "embedding b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "token_adapter.trainable_tokens_delta": "rows",
}
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
# A name of the adapter within PEFT, which files leave out: `lora_A.default.weight`.
_NAMED = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|trainable_tokens_delta|"
    r"modules_to_save)\.([^.]+)(\.weight|\.bias|)$"
)
_SAVED, _ORIGINAL = ".modules_to_save.", ".original_module."

Parts = dict[str, TensorView]


@dataclass(frozen=True)
class Contents:
    """An adapter's tensors, sorted out.

    Attributes:
        modules: Module, as the adapter names it, to role to tensor.
        plain: Names of the model's own to the tensors that replace them.
        unused: The adapter's tensors that change nothing, each with the reason.
        warnings: What was odd about names.
    """

    modules: dict[str, Parts]
    plain: Parts
    unused: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]

    def shapes(self, config: AdapterConfig) -> dict[str, tuple[int, ...] | None]:
        """The names that a model has for what is adapted, with the shapes that its tensors tell.

        Args:
            config: The adapter's configuration.
        """
        found: dict[str, tuple[int, ...] | None] = {}
        for module, parts in self.modules.items():
            direct = candidates(module, config.target_parameters)
            found |= dict.fromkeys(direct)
            found[f"{module}.weight"] = None if direct else _product_shape(parts, config)
            if "shift" in parts:
                found[f"{module}.bias"] = parts["shift"].shape
        return found | {name: view.shape for name, view in self.plain.items()}


def _product_shape(parts: Parts, config: AdapterConfig) -> tuple[int, ...] | None:
    if "embedding a" in parts and "embedding b" in parts:
        a, b = parts["embedding a"].shape, parts["embedding b"].shape
        return (*a[1:], *b[:1])
    if "a" not in parts or "b" not in parts or not parts["b"].shape:
        return None
    shape = (parts["b"].shape[0], *parts["a"].shape[1:])
    return shape[::-1] if config.fan_in_fan_out and len(shape) == 2 else shape


def sort_out(adapter: Checkpoint) -> Contents:
    """Sort out an adapter's tensors by what they are for.

    Args:
        adapter: From `open_checkpoint`.

    Raises:
        FormatError: A name is not an adapter's, or two names mean the same and differ.
        PolicyError: A factor is not floating.
    """
    sorter = _Sorter(adapter)
    for name, view in adapter.items():
        sorter.take(name, view)
    return sorter.finish()


class _Sorter:
    def __init__(self, adapter: Checkpoint) -> None:
        self.adapter = adapter
        self.modules: dict[str, Parts] = {}
        self.plain: Parts = {}
        self.originals: Parts = {}
        self.unused: list[tuple[str, str]] = []
        self.removed: dict[str, int] = {}
        # transformers saves adapters without PEFT's own prefix.
        self.front = FRONT if any(FRONT in name for name in adapter) else ""

    def take(self, name: str, view: TensorView) -> None:
        """Note what one tensor is for."""
        bare = self._bare(name)
        for ending, role in _ROLES.items():
            if bare.endswith(f".{ending}"):
                refuse_integers(view, self.adapter)
                module = bare.removesuffix(f".{ending}")
                self._put(self.modules.setdefault(module, {}), role, view)
                return
        if _ORIGINAL in bare:
            self.originals[bare.replace(_ORIGINAL, ".")] = view
            return
        for segment in (_SAVED, ".token_adapter.", ".base_layer."):
            bare = bare.replace(segment, ".")
        self._put(self.plain, bare, view)

    def _bare(self, name: str) -> str:
        """A tensor's name in the model, wrappers and the adapter's own name removed.

        Raises:
            FormatError: It is not an adapter's name.
        """
        parts = name.split(".")
        kept = [part for part in parts if part not in _WRAPPERS]
        while kept[0] == "module" and len(kept) > 1:
            del kept[0]
        for part in sorted(set(parts) - set(kept)):
            self.removed[part] = self.removed.get(part, 0) + 1
        bare = ".".join(kept)
        if not bare.startswith(self.front) and is_beside(self.adapter, name):
            return bare
        if not bare.startswith(self.front):
            raise FormatError(
                f"expected a name that begins with {FRONT}",
                file=self.adapter.label,
                tensor=name,
                code="E-ADAPTER-TENSOR",
            )
        bare = bare[len(self.front) :]
        found = _NAMED.search(bare)
        is_name = found is not None and found[2] not in ("weight", "bias")
        if found is None or not is_name or (found[1] == "modules_to_save" and not found[3]):
            return bare
        if found[1] == "modules_to_save" and found[2] != "default":
            return bare  # a child of the saved module
        self.removed[found[2]] = self.removed.get(found[2], 0) + 1
        return bare[: found.start()] + f".{found[1]}{found[3]}"

    def _put(self, found: Parts, role: str, view: TensorView) -> None:
        """Note a tensor, once: PEFT may store one under two names.

        Raises:
            FormatError: Another tensor has the role, and differs.
        """
        if role not in found:
            found[role] = view
            return
        if not are_equal(self.adapter, found[role].name, view.name):
            raise FormatError(
                f"'{shown(found[role].name)}' has the same role; expected one of the two",
                file=self.adapter.label,
                tensor=view.name,
                code="E-ADAPTER-TENSOR",
            )
        self.unused.append((view.name, f"the same as '{shown(found[role].name)}'"))

    def finish(self) -> Contents:
        """What was found."""
        for name, view in self.originals.items():
            if name in self.plain:
                self.unused.append((view.name, "what the module was before training"))
            else:
                self._put(self.plain, name, view)
        warnings = [
            f"'{shown(part)}' in the names of {counted(count, 'tensor')} was ignored"
            for part, count in self.removed.items()
        ]
        return Contents(self.modules, self.plain, tuple(self.unused), tuple(warnings))


def refuse_integers(view: TensorView, adapter: Checkpoint) -> None:
    """Refuse what nothing can be computed with.

    Args:
        view: One of its tensors.
        adapter: The adapter, for the message.

    Raises:
        PolicyError: It is not floating.
    """
    if not view.dtype.arithmetic:
        raise PolicyError(
            f"{view.dtype.name} weights in an adapter; expected floating ones",
            file=adapter.label,
            tensor=view.name,
            code="E-ADAPTER-DTYPE",
        )


def is_beside(adapter: Checkpoint, name: str) -> bool:
    """True for a tensor of a file beside the adapter's own.

    Args:
        adapter: From `open_checkpoint`.
        name: Of one of its tensors.
    """
    return adapter.layout.get(name, ADAPTER) != ADAPTER


def module_of(name: str) -> str:
    """The module that a tensor of an adapter belongs to, as the adapter names it.

    Args:
        name: The tensor's, a factor's or a vector's.
    """
    bare = name.partition(FRONT)[2] or name
    ending = next((one for one in _ROLES if bare.endswith(f".{one}")), "")
    return bare.removesuffix(f".{ending}") if ending else bare
