"""NaN and infinity in an adapter: refused where they are read, or told of and let pass."""

from __future__ import annotations

from dataclasses import replace

from weightsurgery.checkpoint import Checkpoint, ReadBoth, TensorView
from weightsurgery.errors import NonFiniteError, shown
from weightsurgery.formats.record import public_name
from weightsurgery.kernels import Block, all_finite


def finite(adapter: Checkpoint) -> Checkpoint:
    """The same adapter; to read NaN or infinity from it raises NonFiniteError.

    Args:
        adapter: From `open_checkpoint`; nothing of it is read here.
    """

    def checked(name: str, read_both: ReadBoth) -> ReadBoth:
        def read(start: int, stop: int) -> tuple[Block, Block]:
            stored, values = read_both(start, stop)
            if not all_finite(values):
                raise NonFiniteError(
                    "NaN or infinity in an adapter",
                    file=adapter.label,
                    tensor=name,
                    hint="--allow-nonfinite lets it pass",
                )
            return stored, values

        return read

    tensors = {
        name: replace(view, read_both=checked(name, view.read_both))
        for name, view in adapter.items()
        if view.dtype.arithmetic  # others are refused by name
    }
    return replace(adapter, tensors={**adapter, **tensors})


def warn_of_nonfinite(adapter: Checkpoint) -> list[str]:
    """A warning if an adapter holds NaN or infinity; reads all of it.

    Args:
        adapter: From `open_checkpoint`.
    """
    names = [name for name, view in adapter.items() if not _is_finite(view)]
    if not names:
        return []
    what = f"NaN or infinity in {len(names)} of {len(adapter)} tensors"
    return [f"{shown(public_name(adapter))}: {what}, first '{shown(names[0])}'; let pass"]


def _is_finite(view: TensorView) -> bool:
    return all(all_finite(view.read(i, j)) for i, j in view.blocks())
