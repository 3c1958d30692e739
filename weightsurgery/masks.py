"""Bit masks over a model's dimensions: which of them an edit changed, and edits by such a mask.

A mask is a checkpoint: under each tensor's name eight dimensions in a byte (U8), the first in the
lowest bit, in row-major order. Its metadata holds the tensors' shapes. So it fits the same model in
other files: sharded otherwise, with other names, or with fused matrices where these are separate.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from weightsurgery.buffers import empty
from weightsurgery.checkpoint import BLOCK, Checkpoint, Step, TensorView
from weightsurgery.dtypes import DTYPES
from weightsurgery.errors import MismatchError, counted
from weightsurgery.formats.strict_json import parse
from weightsurgery.kernels import Block, bits_of, choose
from weightsurgery.pairing import DUPLICATE, TIED
from weightsurgery.pairs import Pair
from weightsurgery.parts import pair_parts, unused_of
from weightsurgery.stream import Edit

KIND = {"wsurg": "mask/1"}  # metadata of a mask's file
_REMEDY = "give a mask of this model"


def changed_mask(checkpoint: Checkpoint) -> Checkpoint:
    """The mask of what an operator changed: the dimensions whose stored bits differ.

    Args:
        checkpoint: The result of one operator, as it was returned.

    Returns:
        A lazy checkpoint of U8 tensors, one for each edited tensor.
    """
    views = {n: _packed(view) for n, view in checkpoint.items() if view.status == "edited"}
    plain = replace(checkpoint, layout={}, parts={}, side_files=(), left_out=(), is_directory=False)
    shapes = {name: list(checkpoint[name].shape) for name in views}
    metadata = {**KIND, "shapes": json.dumps(shapes, separators=(",", ":"))}
    made = replace(plain, tensors=views, metadata=metadata, notes={})
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


def read_mask(mask: Checkpoint, tuned: Checkpoint) -> Checkpoint:
    """Read a mask as flags of a model's own tensors.

    The mask may come from the same model in other files: wrapped, with older spellings, with other
    copies of a tied tensor, or with fused matrices where these are separate.

    Args:
        mask: From `changed_mask`.
        tuned: The model.

    Returns:
        BOOL tensors of TUNED's names and shapes, read lazily. Elements that the mask does not
        know are not set.

    Raises:
        MismatchError: It is not a mask, or one of another model.
    """
    if dict(mask.metadata).get("wsurg") != KIND["wsurg"]:
        raise MismatchError("not a mask that wsurg wrote", file=mask.label, code="E-MASK")
    shapes = _shapes(mask)
    flags = {name: _unpacked(view, shapes.get(name)) for name, view in mask.items()}
    # With TUNED's configuration: that a mask lacks the head does not say that the head is tied.
    alike = replace(
        mask, tensors=flags, config=tuned.config, parts=tuned.parts, layout={}, side_files=()
    )
    parts = pair_parts(alike, tuned)
    for name, reason in unused_of(alike, parts):
        if reason not in (TIED, DUPLICATE):
            raise MismatchError(
                "this tensor of the mask has no counterpart in TUNED",
                file=mask.label,
                tensor=name,
                hint=_REMEDY,
                code="E-MASK",
            )
    tensors = {}
    for part in parts:
        for pair in part.pairing.pairs:
            if pair.base is not None:
                # A copy's own flags come before those of the tensor that it is tied to.
                own = part.pairing.matcher.find(pair.name, alone=True)
                one = pair if own is None else replace(pair, base=own.view, names=own.names)
                one = part.whole(one)
                tensors[one.name] = _fitting(one, mask, shapes)
    return replace(mask, tensors=tensors)


def _shapes(mask: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The shapes of a mask's tensors; {} for one of version 0.1.0, which did not write them.

    Raises:
        FormatError: Its metadata is not valid JSON.
        MismatchError: They are not those of its tensors.
    """
    text = mask.metadata.get("shapes")
    if text is None:
        return {}
    found = parse(text.encode(), file=mask.label, what="the mask's shapes")
    for name, view in mask.items():
        shape = found.get(name) if isinstance(found, Mapping) else None
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            reason = "the mask's metadata does not give this tensor's shape"
            raise MismatchError(reason, file=mask.label, tensor=name, code="E-MASK")
        if view.size != _packed_size(math.prod(shape)):
            reason = (
                f"the mask has {counted(view.size, 'byte')}; expected "
                f"{_packed_size(math.prod(shape)):,} for the shape {shape}"
            )
            raise MismatchError(reason, file=mask.label, tensor=name, code="E-MASK")
    return {name: tuple(found[name]) for name in mask}


def _packed_size(elements: int) -> int:
    return (elements + 7) // 8


def _unpacked(view: TensorView, shape: tuple[int, ...] | None) -> TensorView:
    def read_both(start: int, stop: int) -> tuple[Block, Block]:
        packed = view.read(start // 8, _packed_size(stop))
        bits = np.unpackbits(packed, bitorder="little")[start % 8 :][: stop - start]
        return bits, bits

    flat = (8 * view.size,)
    return TensorView(view.name, flat if shape is None else shape, DTYPES["BOOL"], read_both)


def _fitting(pair: Pair, mask: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> TensorView:
    """A pair's flags, of TUNED's shape.

    Raises:
        MismatchError: They have another one.
    """
    if pair.base is None:
        raise ValueError("only pairs have flags")
    tuned, flags, name = pair.tuned, pair.base, pair.names[0]
    if flags.shape != tuned.shape and name not in shapes and len(pair.names) == 1:
        if mask[name].size != _packed_size(tuned.size):
            reason = f"the mask has {counted(mask[name].size, 'byte')}; expected "
            reason += f"{_packed_size(tuned.size):,}"
            raise MismatchError(reason, file=mask.label, tensor=name, hint=_REMEDY, code="E-MASK")
        flags = replace(flags, shape=tuned.shape)
    if flags.shape != tuned.shape:
        reason = f"the mask is of shape {list(flags.shape)}; expected {list(tuned.shape)}"
        raise MismatchError(reason, file=mask.label, tensor=name, hint=_REMEDY, code="E-MASK")
    return replace(flags, name=tuned.name)


def edit_by_mask(flags: Checkpoint, pairs: tuple[Pair, ...], *, invert: bool) -> Edit:
    """An edit that resets to BASE the dimensions a mask has set.

    Args:
        flags: From `read_mask`.
        pairs: All pairs, those that are kept from TUNED too.
        invert: Reset those it does not have set instead.

    Raises:
        MismatchError: The mask is of a tensor that may not be edited.
    """
    kept = next((pair for pair in pairs if pair.name in flags and not pair.eligible), None)
    if kept is not None:
        raise MismatchError(
            f"the mask is of a tensor that is not edited here ({kept.reason})",
            file=flags.label,
            tensor=kept.name,
            code="E-MASK",
        )

    def edit(name: str, start: int, tuned: Block, base: Block) -> Block:
        chosen = flags_of(flags, name, start, tuned.size)
        return choose(~chosen if invert else chosen, base, tuned)

    return edit


def flags_of(flags: Checkpoint, name: str, start: int, count: int) -> Block:
    """A mask's flags for the elements [start, start + count); none is set of what it lacks.

    Args:
        flags: From `read_mask`.
        name: The tensor's name.
        start: The first element.
        count: How many.

    Returns:
        Boolean array of shape (count,).
    """
    if name not in flags:
        return np.zeros(count, np.bool_)
    return flags[name].read(start, start + count).view(np.bool_)


def rows_of(flags: Block, start: int, count: int, width: int) -> Block:
    """Flags of rows as flags of the elements [start, start + count) of a matrix."""
    first, last = start // width, (start + count + width - 1) // width
    return np.repeat(flags[first:last], width)[start - first * width :][:count].copy()
