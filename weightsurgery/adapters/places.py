"""Where in an adapter the drift of each tensor can go: into factors, whole, as rows, or nowhere.

Decided by names, shapes and configurations alone. The rules are those by which the library PEFT
reads an adapter back; where the class of a module matters and only the file is there, shapes tell.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from weightsurgery.adapters.tie import find_tie, find_unclear, is_bare
from weightsurgery.alignment import Alignment, Pair, matches
from weightsurgery.anatomy import find_embedding, kind_of
from weightsurgery.architecture.canonical import read_names, template
from weightsurgery.architecture.composite import find_architecture
from weightsurgery.architecture.facts import peft_renames
from weightsurgery.architecture.ties import find_ties
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.errors import MismatchError
from weightsurgery.pairs import Status
from weightsurgery.ties import is_output_head

FACTORS, WHOLE, BIAS, ROWS, NOWHERE = "factors", "whole", "bias", "rows", "nowhere"
LINEAR, TRANSPOSED, EMBEDDING, CONVOLUTION = "linear", "conv1d", "embedding", "convolution"
STACK, TURNED_STACK = "stack", "stack of inputs by outputs"
STACKS = (STACK, TURNED_STACK)

_TASK_HEAD = re.compile(r"(?:^|\.)(?:classifier|score|qa_outputs|logits_proj)(?=\.)")
_LOOKED_UP = re.compile(r"embed|relative_attention_bias|(?:^|\.)(?:wte|wpe)$", re.IGNORECASE)
# Their `out_proj` is not called as a module.
_MAMBAS = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
_LARGEST_KERNEL = 32  # of a convolution along one dimension; a stack of matrices is larger


@dataclass(frozen=True)
class Place:
    """Where the drift of a pair goes.

    Attributes:
        pair: The pair.
        how: "factors", "whole", "bias", "rows" or "nowhere".
        module: What PEFT calls the module: for a tensor that is held whole the one that is saved.
        layout: For factors, how the module keeps its matrix: "linear", "conv1d" (transposed, as
            GPT-2's), "embedding", "convolution", or one of `STACKS` for a parameter of a module
            that holds the matrices of several experts.
        reason: Why not into factors, "" for those that go there.
    """

    pair: Pair
    how: str
    module: str
    layout: str = ""
    reason: str = ""

    @property
    def is_stack(self) -> bool:
        """True for several matrices in one tensor, each with factors of its own."""
        return self.layout in STACKS and len(self.pair.tuned.shape) == 3


def find_places(alignment: Alignment, whole: Sequence[str] = ()) -> list[Place]:
    """A place for each tensor of TUNED.

    Args:
        alignment: From `align`, with mismatched shapes kept.
        whole: Globs of tensors that are held whole, though they might be matrices.

    Raises:
        MismatchError: A tensor that is not excluded has another shape in BASE, or is floating
            there and not here.
    """
    judge = _Judge(alignment, whole)
    places = [judge.place(pair) for pair in alignment.pairs]
    return _settled(places)


class _Judge:
    """Places one tensor after another."""

    def __init__(self, alignment: Alignment, whole: Sequence[str]) -> None:
        self.alignment, self.whole = alignment, whole
        self.tuned = alignment.tuned
        self.embedding = find_embedding(self.tuned)
        self.tied = _is_tied(alignment)
        self.users = _used_twice(self.tuned)
        self.unclear = {
            side: set(find_unclear(getattr(alignment, side))) for side in ("base", "tuned")
        }
        self.refused = _refused_by_peft(self.tuned)
        known = find_architecture(self.tuned.config)
        self.stacks = known.stacks if known is not None else {}
        self.conv1d = any(self._is_transposed(n) for n in self.tuned)

    def place(self, pair: Pair) -> Place:
        name = pair.name
        module = name.rpartition(".")[0]
        if "/" in name:
            reason = "in another folder than the model that an adapter would belong to"
            return Place(pair, NOWHERE, module, reason=reason)
        if pair.base is None or not 0 < pair.eligible == pair.tuned.size:
            return self._odd(pair, module)
        if pair.is_tied_copy:
            return Place(pair, NOWHERE, module, reason=f"tied to '{pair.key}'")
        if name in self.unclear["tuned"] or pair.base.name in self.unclear["base"]:
            reason = "it may be the tied word embedding or its head, as others may"
            return Place(pair, NOWHERE, module, reason=reason)
        if self.tied and is_output_head(name):
            reason = "BASE ties it to the word embedding; an adapter cannot untie it"
            return Place(pair, NOWHERE, module, reason=reason)
        if name == self.embedding and self.tied:
            reason = "the output head is tied to it: rows that moved are held whole"
            return Place(pair, ROWS, module, reason=reason)
        if matches(name, self.whole):
            return Place(pair, WHOLE, module, reason="asked for")
        if name.endswith(".bias"):
            return Place(pair, BIAS, module, reason="a bias")
        head = _TASK_HEAD.search(name)
        if head:
            return Place(pair, WHOLE, name[: head.end()], reason="a task head")
        if name in self.users:
            reason = "several modules use it, and an adapter can change one of them alone"
            return Place(pair, NOWHERE, module, reason=reason)
        if ".parametrizations." in name:
            return Place(pair, NOWHERE, module, reason="PEFT does not adapt parametrizations")
        layout, reason = self._layout(name)
        if layout:
            return Place(pair, FACTORS, module, layout)
        return Place(pair, WHOLE, module, reason=reason)

    def _odd(self, pair: Pair, module: str) -> Place:
        """A tensor that is not floating and of one shape on both sides."""
        left_out = pair.reason in ("excluded", "not included")
        new_head = pair.base is None or pair.reason.startswith("a task head of another shape")
        integers = pair.base is None or not pair.base.dtype.arithmetic
        floating = pair.tuned.dtype.arithmetic
        if pair.status is Status.ROWS:
            how = BIAS if pair.name.endswith(".bias") else WHOLE
            return Place(pair, how, module, reason=f"another vocabulary: {pair.reason}")
        if left_out or (integers and not floating):
            return Place(pair, NOWHERE, module, reason=pair.reason)
        if new_head and matches(pair.name, self.whole):
            head = _TASK_HEAD.search(pair.name)
            module = pair.name[: head.end()] if head else module
            return Place(pair, WHOLE, module, reason=f"asked for; {pair.reason}")
        if pair.base is not None and not new_head and pair.tuned.size:
            raise MismatchError(
                f"an adapter cannot change a shape or a dtype: {pair.reason}",
                file=self.tuned.label,
                tensor=pair.name,
                hint="leave it out with --exclude",
                code="E-PAIR-DTYPE" if pair.base.dtype.arithmetic != floating else "E-PAIR-SHAPE",
            )
        return Place(pair, NOWHERE, module, reason=pair.reason)

    def _layout(self, name: str) -> tuple[str, str]:
        """How a module keeps its matrix; or why there is none."""
        shape = self.tuned[name].shape
        module = name.rpartition(".")[0]
        turned = self.stacks.get(template(name))
        if turned is not None and 1 < len(shape) < 4 and not self.conv1d:
            return STACKS[turned], ""
        if not name.endswith(".weight") or not module:
            return "", "not the weight of a module"
        if len(shape) < 2:
            return "", "a vector" if shape else "a scalar"
        if len(shape) > 2:
            kernel = max(shape[2:])
            if kernel <= _LARGEST_KERNEL and shape[1] > 1:
                return CONVOLUTION, ""
            return "", "a stack of matrices" if shape[1] > 1 else "a convolution of single channels"
        if name == self.embedding:
            return EMBEDDING, ""
        if kind_of(name).startswith("embedding") or _LOOKED_UP.search(module):
            return "", "an embedding of something else than words"
        if kind_of(name) == "mlp.router" or name.endswith((".gate.weight", ".router.weight")):
            return "", "a router"
        if module.rpartition(".")[2] in self.refused:
            return "", "PEFT does not adapt a module of this name in such a model"
        if self.conv1d and not self._is_conv1d(name):
            return "", "a linear layer beside Conv1D; one adapter holds one of the two"
        return (TRANSPOSED if self.conv1d else LINEAR), ""

    def _bias_size(self, name: str) -> int | None:
        bias = self.tuned.get(f"{name.removesuffix('weight')}bias")
        return None if bias is None else bias.size

    def _is_transposed(self, name: str) -> bool:
        """True where the bias fits the columns and not the rows: GPT-2's Conv1D."""
        shape = self.tuned[name].shape
        if not name.endswith(".weight") or len(shape) != 2 or shape[0] == shape[1]:
            return False
        return self._bias_size(name) == shape[1]

    def _is_conv1d(self, name: str) -> bool:
        """In a model with Conv1D a square matrix with a bias is one too."""
        rows, columns = self.tuned[name].shape
        return self._is_transposed(name) or rows == columns == self._bias_size(name)


def _refused_by_peft(tuned: Checkpoint) -> frozenset[str]:
    """Names of modules that PEFT refuses, or takes for those of experts."""
    kind = tuned.config.get("model_type")
    if kind in _MAMBAS:
        return frozenset(("out_proj", "conv1d"))
    renames = peft_renames()
    pattern = renames["types"].get(kind) if isinstance(kind, str) else None
    return frozenset(renames["targets"].get(pattern, ()))


def _used_twice(tuned: Checkpoint) -> frozenset[str]:
    """Stored tensors that several modules use."""
    known = find_architecture(tuned.config)
    if known is None or is_bare(tuned, known):
        return frozenset()
    names, ties = read_names(tuned, known), find_ties(known, tuned.config)
    groups = (ties.group(source) for source in dict.fromkeys(ties.sources.values()))
    shared = {names.stored[one] for group in groups for one in group if one in names.stored}
    layers = {n for n, p in names.places.items() if template(p.canonical) in ties.numbered}
    return frozenset(shared | layers)


def _is_tied(alignment: Alignment) -> bool:
    """True where the word embedding is the output head too, as far as files can tell."""
    return any(find_tie(side) is not None for side in (alignment.base, alignment.tuned))


def _settled(places: list[Place]) -> list[Place]:
    """PEFT saves whole modules, and no factors below them: what cannot be saved goes nowhere.

    Factors of a module's parameters give way to a parameter of it that is held whole.
    """
    saved = {place.module for place in places if place.how == WHOLE}
    places = [
        replace(place, how=WHOLE, layout="", reason="its module is held whole")
        if place.layout in STACKS and place.module in saved
        else place
        for place in places
    ]
    by_name = {place.pair.name: place for place in places}
    tree = Tree(by_name)
    blocked: dict[str, str] = {}
    for module in sorted({place.module for place in places if place.how == WHOLE}):
        below = [by_name[name] for name in tree.saved_with(module)]
        if not module:
            blocked[module] = "it belongs to no module that could be saved"
        elif any(place.how in (FACTORS, ROWS) for place in below):
            blocked[module] = "its module holds others that go into factors or rows"
        elif not all(place.pair.tuned.dtype.arithmetic for place in below):
            blocked[module] = "its module holds tensors that are not floating"
    return [
        replace(place, how=NOWHERE, reason=f"{place.reason}; {blocked[place.module]}")
        if place.how == WHOLE and place.module in blocked
        else place
        for place in places
    ]


class Tree:
    """The modules that names of tensors tell of.

    Args:
        names: Of tensors.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._below: dict[str, list[str]] = {}
        for name in names:
            for path in accumulate(name.split(".")[:-1], lambda path, part: f"{path}.{part}"):
                self._below.setdefault(path, []).append(name)

    def alike(self, module: str, before: str = "") -> list[str]:
        """Other modules whose names end so, after `before`."""
        return [m for m in self._below if m != module and m.endswith(before + module)]

    def saved_with(self, module: str) -> list[str]:
        """The tensors of every module that PEFT takes for this one, and of those below it.

        It compares the ends of names, so that `norm` stands for `layers.0.input_layernorm` too.
        """
        found = {n for m in (module, *self.alike(module)) for n in self._below.get(m, ())}
        return sorted(found)
