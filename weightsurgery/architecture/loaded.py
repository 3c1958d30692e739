"""A checkpoint as the loading library holds it: the model's own names, fused tensors in one."""

from __future__ import annotations

from dataclasses import replace

from weightsurgery.architecture.composite import find_architecture
from weightsurgery.architecture.conversion import UnsupportedError
from weightsurgery.architecture.matching import Made, read_sides
from weightsurgery.architecture.pieces import Assembly, Link, link, whole
from weightsurgery.architecture.views import linked_view
from weightsurgery.checkpoint import Checkpoint, TensorView
from weightsurgery.kernels import Block


def as_loaded(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint's tensors under the model's own names, those that loading fuses as one view.

    Args:
        checkpoint: A model; one whose architecture is not known stays as it is.

    Returns:
        Nothing is read. Tied tensors are under the names that are stored; what no rule fits keeps
        its stored name.
    """
    known = find_architecture(checkpoint.config)
    if known is None:
        return checkpoint
    side, _ = read_sides(checkpoint, checkpoint)
    made = Made(side)
    tensors: dict[str, TensorView] = {}
    for name, place in side.names.places.items():
        view = checkpoint[name]
        if place.converter is None:
            new = name if name in side.names.ambiguous else place.model_name
            tensors[new] = replace(view, name=new)
            continue
        try:
            found = {one: made.assembly(one) for one in made.targets_of(name)}
        except UnsupportedError:
            tensors[name] = view
            continue
        first = place.model_name.removesuffix(place.target)
        for target, assembly in found.items():
            new = first + target
            if assembly is not None and new not in tensors:
                tensors[new] = _assembled(new, assembly, checkpoint)
    return replace(checkpoint, tensors=tensors, layout={})


def _assembled(name: str, assembly: Assembly, checkpoint: Checkpoint) -> TensorView:
    like = TensorView(name, assembly.shape, checkpoint[assembly.pieces[0].stored].dtype, _nothing)
    links: list[Link] = link(whole(name, assembly.shape), assembly)
    return linked_view(like, links, {one.theirs: checkpoint[one.theirs] for one in links})[0]


def _nothing(start: int, stop: int) -> tuple[Block, Block]:
    raise ValueError(f"elements {start} to {stop} of a tensor that is only described")
