"""Vocabularies that grew in training: an adapter that holds more rows than BASE has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from weightsurgery.adapters.config import read_config
from weightsurgery.adapters.contents import sort_out
from weightsurgery.adapters.naming import Naming
from weightsurgery.adapters.parameters import Parameters
from weightsurgery.adapters.updates import Replace, Update
from weightsurgery.architecture.composite import find_architecture
from weightsurgery.architecture.embedding import find_embedding, vocabulary_axis
from weightsurgery.architecture.facts import nested
from weightsurgery.checkpoint import Checkpoint, TensorView
from weightsurgery.errors import MismatchError, shown
from weightsurgery.formats.config import with_config
from weightsurgery.kernels import Block


def with_vocabulary_of(
    base: Checkpoint, adapters: Sequence[Checkpoint], naming: Naming
) -> Checkpoint:
    """BASE with as many tokens as its adapters have; new rows are zero until they are replaced.

    Args:
        base: The model.
        adapters: From `open_checkpoint`.
        naming: How their names correspond to BASE's.

    Returns:
        BASE as it is, where they have as many as BASE.

    Raises:
        MismatchError: Two adapters have different numbers of tokens.
    """
    found: dict[int, str] = {}
    for adapter in adapters:
        for rows in _rows(base, adapter, naming):
            found.setdefault(rows, adapter.label)
    if len(found) > 1:
        (one, first), (other, second), *_ = found.items()
        raise MismatchError(
            f"the vocabulary has {one:,} tokens in '{shown(first)}' and {other:,} here",
            file=second,
            hint="apply one of them",
            code="E-ADAPTER-VOCABULARY",
        )
    embedding = find_embedding(base)
    if not found or embedding is None:
        return base
    (rows,), old = found, base[embedding].shape[0]
    tensors = {
        name: _resized(view, rows) if _has_rows(base, view, old) else view
        for name, view in base.items()
    }
    grown = replace(base, tensors=tensors)
    for key in _sizes(base, old):
        grown = with_config(grown, inside=key, vocab_size=rows)
    return grown


def _sizes(base: Checkpoint, rows: int) -> list[str]:
    """The nested configurations that tell the number of tokens, by dotted key; "" is the whole."""
    known = find_architecture(base.config)
    text = known.text_config_key if known is not None else ""
    keys = dict.fromkeys(["", text, "text_config", "encoder", "decoder"])
    found = {key: nested(base.config, key) if key else base.config for key in keys}
    return [k for k, v in found.items() if isinstance(v, Mapping) and v.get("vocab_size") == rows]


def refuse_unfilled(base: Checkpoint, grown: Checkpoint, updates: dict[str, list[Update]]) -> None:
    """Refuse rows of new tokens that no adapter has values for.

    Args:
        base: As it was opened.
        grown: From `with_vocabulary_of`.
        updates: What adapters do to each tensor.

    Raises:
        MismatchError: There are some. A vector of new tokens, such as a bias, stays zero, as in
            transformers.
    """
    for name, view in base.items():
        after = grown[name]
        more = after.size > view.size and after.size > max(after.shape)
        if more and not any(isinstance(update, Replace) for update in updates.get(name, ())):
            raise MismatchError(
                f"the vocabulary grows to {max(after.shape):,} tokens, but no adapter holds this "
                f"tensor, whose shape is {list(view.shape)}",
                file=base.label,
                tensor=name,
                hint="save the resized base model and give it as BASE",
                code="E-ADAPTER-VOCABULARY",
            )


def _rows(base: Checkpoint, adapter: Checkpoint, naming: Naming) -> set[int]:
    """The numbers of tokens, other than BASE's, that an adapter's tensors have."""
    contents, config = sort_out(adapter), read_config(adapter)
    shapes = contents.shapes(config)
    wanted = {
        n: s for n, s in shapes.items() if n in contents.plain or _is_embedding(contents.modules, n)
    }
    if not wanted:
        return set()
    names = Parameters(base, adapter, wanted, naming)
    found = set()
    for name, shape in wanted.items():
        parameter = names.find(name)
        if parameter is None or parameter.links or shape is None:
            continue
        view = parameter.view
        fits = len(view.shape) == len(shape) > 1 and view.shape[1:] == shape[1:]
        if fits and view.shape != shape and vocabulary_axis(base, view.name) == 0:
            found.add(shape[0])
    return found


def _is_embedding(modules: dict[str, dict[str, TensorView]], name: str) -> bool:
    return "embedding a" in modules.get(name.removesuffix(".weight"), {})


def _has_rows(base: Checkpoint, view: TensorView, rows: int) -> bool:
    axis = vocabulary_axis(base, view.name)
    if axis is None or view.shape[axis : axis + 1] != (rows,):
        return False
    if any(count != 1 for count in view.shape[:axis]):
        raise MismatchError(
            f"the vocabulary grew, and this tensor has a column for each token: {list(view.shape)}",
            file=base.label,
            tensor=view.name,
            hint="save the resized base model and give it as BASE",
            code="E-ADAPTER-VOCABULARY",
        )
    return True


def _resized(view: TensorView, rows: int) -> TensorView:
    """A tensor with another number of rows; new ones are zero."""
    axis = next(i for i, count in enumerate(view.shape) if count != 1 or i == len(view.shape) - 1)
    shape = (*view.shape[:axis], rows, *view.shape[axis + 1 :])

    def read_both(start: int, stop: int) -> tuple[Block, Block]:
        stored, values = view.read_both(min(start, view.size), min(stop, view.size))
        more = np.zeros(stop - start - values.size, view.dtype.numpy)
        return np.concatenate([stored, more]), np.concatenate([values, more])

    return replace(view, shape=shape, read_both=read_both, status="edited")
