"""Factors of q, k and v, or of gate and up, where BASE stores these as one matrix.

Some trainers and servers split the projections that a model itself has in one matrix, and
transformers has no rule for that. The rows of the parts follow each other in the one matrix.
"""

from __future__ import annotations

from weightsurgery.architecture.matching import Matcher
from weightsurgery.architecture.pieces import Link
from weightsurgery.architecture.views import linked_view
from weightsurgery.checkpoint import Checkpoint, TensorView

# The parts of a matrix from top to bottom, by the last segment of the modules' names. Matrices
# whose rows interleave by head (GPT-NeoX's query_key_value, CodeGen's qkv_proj) are not among them.
_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "in_proj_qkv": ("in_proj_q", "in_proj_k", "in_proj_v"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_INTERLEAVED = frozenset(("codegen", "moss"))


def find_slice(
    base: Checkpoint, matcher: Matcher, name: str, shape: tuple[int, ...]
) -> tuple[TensorView, tuple[Link, ...]] | None:
    """The rows of a fused matrix that a part of it has.

    k and v have the same number of rows, and q all the others (grouped attention).

    Args:
        base: The model.
        matcher: Finds BASE's tensors.
        name: The part's weight or bias, as the adapter names it.
        shape: Its shape.

    Returns:
        A view of the part, and where it lies; None if BASE has no such matrix.
    """
    module, _, last = name.rpartition(".")
    path, _, kind = module.rpartition(".")
    if base.config.get("model_type") in _INTERLEAVED or not shape:
        return None
    for fused, parts in _FUSED.items():
        if kind not in parts:
            continue
        stored = matcher.stored_in_base(f"{path}.{fused}.{last}")
        view = base.get(stored) if stored is not None else None
        if view is None or len(view.shape) != len(shape) or view.shape[1:] != shape[1:]:
            continue
        first = _first_row(parts.index(kind), len(parts), shape[0], view.shape[0])
        if first is None:
            continue
        width = view.size // view.shape[0]
        count = shape[0] * width
        link = Link(name, view.name, (count,), (1,), (1,), 0, first * width)
        like = TensorView(name, shape, view.dtype, view.read_both)
        return linked_view(like, [link], {view.name: view})[0], (link,)
    return None


def _first_row(part: int, parts: int, rows: int, total: int) -> int | None:
    """Where a part begins; None if it cannot have so many rows."""
    if parts == 2:
        return part * rows if 2 * rows == total else None
    first = 0 if part == 0 else total - (3 - part) * rows
    fits = (total - rows) % 2 == 0 if part == 0 else first >= rows
    return first if fits and rows < total else None
