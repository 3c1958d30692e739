"""Copies: stored tensors that are one parameter of the model, found by configuration and values."""

from __future__ import annotations

import numpy as np

from weightsurgery.anatomy import natural_key
from weightsurgery.architecture.canonical import template
from weightsurgery.architecture.matching import Side
from weightsurgery.checkpoint import Checkpoint, TensorView
from weightsurgery.kernels import Block, count_different, to_float
from weightsurgery.ties import tied_to


def tied_copies(side: Side) -> dict[str, list[str]]:
    """Stored tensors that a checkpoint's configuration makes one.

    Args:
        side: The checkpoint.

    Returns:
        The first name of each group to all of its names; groups of one may be among them. The
        values of tied copies may differ, those of shared layers are equal.
    """
    if side.names.architecture is None:
        copies = tied_to(side.checkpoint)
        return {name: [name, *copies] for name in copies.values()}
    groups = {}
    for source in dict.fromkeys(side.ties.sources.values()):
        stored = map(side.stored, side.ties.group(source))
        names = [name for name in stored if name is not None]
        if names:
            groups[names[0]] = names
    return groups | shared_layers(side)


def shared_layers(side: Side) -> dict[str, list[str]]:
    """Layers that share weights: of the tensors of one template those of equal values.

    Args:
        side: The checkpoint.

    Returns:
        As `tied_copies`; {} where layers do not share weights.
    """
    groups: dict[str, list[str]] = {}
    if not side.ties.numbered:
        return groups
    leaders: dict[str, list[str]] = {}
    for name in sorted(side.checkpoint, key=natural_key):
        like = template(side.canonical(name))
        if like in side.ties.numbered:
            known = leaders.setdefault(like, [])
            equal = (one for one in known if are_equal(side.checkpoint, name, one))
            leader = next(equal, name)
            known += [name] if leader == name else []
            groups.setdefault(leader, []).append(name)
    return groups


def have_equal_bytes(one: TensorView, other: TensorView) -> bool:
    """True if two tensors have the same dtype, shape and bytes.

    Args:
        one: A tensor.
        other: Another.
    """
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return not any(count_different(one.read(i, j), other.read(i, j)) for i, j in one.blocks())


def are_equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """True if two tensors have the same shape and values, in whatever dtype.

    Args:
        checkpoint: What stores them.
        one: A name.
        other: Another.
    """
    a, b = checkpoint[one], checkpoint[other]
    return a.shape == b.shape and all(
        _same_values(a, b, a.read(start, stop), b.read(start, stop)) for start, stop in a.blocks()
    )


def _same_values(a: TensorView, b: TensorView, ours: Block, theirs: Block) -> bool:
    if a.dtype == b.dtype and not count_different(ours, theirs):
        return True
    floating = a.dtype.arithmetic and b.dtype.arithmetic
    return floating and bool(np.array_equal(to_float(ours), to_float(theirs)))
