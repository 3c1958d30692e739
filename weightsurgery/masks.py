"""Bit masks over a model's dimensions: which of them an edit changed, and edits by such a mask.

A mask is a checkpoint: under each tensor's name eight dimensions in a byte (U8), the first in the
lowest bit, in row-major order. So it does not depend on how a model is cut into files.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from weightsurgery.architecture.canonical import read_names
from weightsurgery.architecture.composite import find_architecture
from weightsurgery.architecture.ties import find_ties
from weightsurgery.buffers import empty
from weightsurgery.checkpoint import BLOCK, Checkpoint, Step, TensorView
from weightsurgery.dtypes import DTYPES
from weightsurgery.errors import MismatchError, counted
from weightsurgery.kernels import Block, bits_of, choose
from weightsurgery.pairs import Pair
from weightsurgery.stream import Edit

KIND = {"wsurg": "mask/1"}  # metadata of a mask's file


def changed_mask(checkpoint: Checkpoint) -> Checkpoint:
    """The mask of what an operator changed: the dimensions whose stored bits differ.

    Args:
        checkpoint: The result of one operator, as it was returned.

    Returns:
        A lazy checkpoint of U8 tensors, one for each edited tensor.
    """
    views = {n: _packed(view) for n, view in checkpoint.items() if view.status == "edited"}
    plain = replace(checkpoint, layout={}, side_files=(), left_out=(), is_directory=False)
    made = replace(plain, tensors=views, metadata=KIND, notes={})
    return made.made_by(Step("mask", {}, {"edited": checkpoint}))


def _packed(view: TensorView) -> TensorView:
    def read_both(start: int, stop: int) -> tuple[Block, Block]:
        out = empty(stop - start, np.uint8)
        for first in range(start, stop, BLOCK // 8):
            last = min(first + BLOCK // 8, stop)
            stored, result = view.read_both(8 * first, min(8 * last, view.size))
            other = stored.dtype != result.dtype  # then every dimension is stored anew
            different = np.full(result.size, True) if other else bits_of(stored) != bits_of(result)
            out[first - start : last - start] = np.packbits(different, bitorder="little")
        return out, out

    return TensorView(view.name, ((view.size + 7) // 8,), DTYPES["U8"], read_both, "added")


def mask_under_names_of(tuned: Checkpoint, mask: Checkpoint) -> Checkpoint:
    """Rename a mask's tensors to TUNED's names; leave unknown names unchanged.

    A mask may come from the same model in other files: wrapped, or with older spellings.

    Args:
        tuned: The model whose dimensions the mask is about.
        mask: From `changed_mask`.
    """
    architecture = find_architecture(tuned.config)
    ours, theirs = (read_names(names, architecture) for names in (tuned, mask))
    ties = find_ties(architecture, tuned.config)

    def find(canonical: str) -> str:
        stored = (ours.stored.get(one) for one in (canonical, *ties.group(canonical)))
        return next(filter(None, stored), "")

    named = {name: find(place.canonical) for name, place in theirs.places.items()}
    names = {name: new for name, new in named.items() if new and name not in tuned}
    if not names:
        return mask
    renamed = {new: replace(mask[name], name=new) for name, new in names.items()}
    # Of tied copies one is enough: their bits are the same.
    kept = {name: view for name, view in mask.items() if name not in names}
    return replace(mask, tensors={**renamed, **kept})


def edit_by_mask(mask: Checkpoint, pairs: tuple[Pair, ...], *, invert: bool) -> Edit:
    """An edit that resets to BASE the dimensions a mask has set.

    Args:
        mask: From `changed_mask`, perhaps of the same model cut into other files.
        pairs: The pairs that will be edited.
        invert: Reset those it does not have set instead.

    Raises:
        MismatchError: The mask is none, or is not one of this model.
    """
    if dict(mask.metadata).get("wsurg") != KIND["wsurg"]:
        raise MismatchError("not a mask that wsurg wrote", file=mask.label, code="E-MASK")
    for pair in pairs:
        view = mask.get(pair.name)
        if view is not None and view.size != (pair.tuned.size + 7) // 8:
            raise MismatchError(
                f"the mask has {counted(view.size, 'byte')}; expected "
                f"{(pair.tuned.size + 7) // 8:,}",
                file=mask.label,
                tensor=pair.name,
                hint="give the mask of this model",
                code="E-MASK",
            )
    unknown = [name for name in mask if name not in {pair.name for pair in pairs}]
    if unknown:
        raise MismatchError(
            "the mask is of a tensor that is not edited here",
            file=mask.label,
            tensor=unknown[0],
            code="E-MASK",
        )

    def edit(name: str, start: int, tuned: Block, base: Block) -> Block:
        flags = flags_of(mask, name, start, tuned.size)
        return choose(~flags if invert else flags, base, tuned)

    return edit


def flags_of(mask: Checkpoint, name: str, start: int, count: int) -> Block:
    """A mask's bits for the elements [start, start + count); none is set of what it does not name.

    Args:
        mask: From `changed_mask`.
        name: The tensor's name.
        start: The first element.
        count: How many.

    Returns:
        Boolean array of shape (count,).
    """
    if name not in mask:
        return np.zeros(count, np.bool_)
    first, stop = start // 8, (start + count + 7) // 8
    bits = np.unpackbits(mask[name].read(first, stop), bitorder="little").view(np.bool_)
    return np.array(bits[start - 8 * first :][:count])


def rows_of(flags: Block, start: int, count: int, width: int) -> Block:
    """Flags of rows as flags of the elements [start, start + count) of a matrix."""
    first, last = start // width, (start + count + width - 1) // width
    return np.repeat(flags[first:last], width)[start - first * width :][:count].copy()
