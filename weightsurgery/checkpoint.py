"""A checkpoint: a read-only mapping from name to a tensor that has not been read yet."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from weightsurgery.dtypes import DType, dtype_of
from weightsurgery.errors import SettingError, counted
from weightsurgery.kernels import Block

BLOCK = 1 << 20  # elements read at a time
ReadBoth = Callable[[int, int], tuple[Block, Block]]


@dataclass(frozen=True)
class TensorView:
    """A tensor that has not been read: what it is called, what it looks like, how to read it.

    Elements are numbered in row-major order, so one pair of numbers names a run of them whatever
    the shape. Blocks are fresh one-dimensional arrays in the stored dtype; nobody edits them in
    place. For a packed dtype (F4, F6) they are the bytes that hold the elements.

    Attributes:
        name: The tensor's name in its checkpoint.
        shape: Its shape; () is a scalar.
        dtype: How it is stored.
        read_both: (start, stop) to the elements as the file stores them, and as this view gives
            them. For a tensor straight from a file both are the same array.
        status: What happened to it since the file: copied, edited or added.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    read_both: ReadBoth = field(repr=False)
    status: str = "copied"

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes the tensor takes when stored."""
        return self.dtype.nbytes(self.size)

    @property
    def width(self) -> int:
        """Elements in a row, that is in one step along the leading dimension.

        A tensor of fewer than two dimensions is one row.
        """
        return math.prod(self.shape[1:]) if len(self.shape) > 1 else self.size

    def read(self, start: int, stop: int) -> Block:
        """Elements [start, stop) in row-major order, in the stored dtype.

        Raises:
            IndexError: The tensor has no such elements.
        """
        if not 0 <= start <= stop <= self.size:
            raise IndexError(
                f"elements {start} to {stop} of '{self.name}', which has {self.size:,}"
            )
        return self.read_both(start, stop)[1]

    def blocks(self) -> Iterator[tuple[int, int]]:
        """The grid every reader uses: whole rows, about `BLOCK` elements; a longer row is cut.

        Example:
            >>> from weightsurgery.dtypes import DTYPES
            >>> view = TensorView("w", (3, 500_000), DTYPES["F32"], read_both=None)
            >>> list(view.blocks())
            [(0, 1000000), (1000000, 1500000)]
        """
        # Packed elements share bytes, so a block of them must not end where a row does.
        width = self.width if self.dtype.bits >= 8 else self.size
        if 0 < width <= BLOCK and len(self.shape) > 1:
            step = BLOCK // width * width
            return ((i, min(i + step, self.size)) for i in range(0, self.size, step))
        return (
            (i, min(i + BLOCK, row + width))
            for row in range(0, self.size, max(1, width))
            for i in range(row, row + width, BLOCK)
        )


@dataclass(frozen=True)
class FileRef:
    """One input file: weights, or a file that is copied with them (config, tokenizer, licence).

    Attributes:
        name: Its path in the model's folder, with slashes; most often a plain name.
        path: Where it lies.
        size: Bytes.
        content: Reads the whole file, for the small ones.
        begin_hash: From now on what is read is hashed, so that `sha256` has little left to do;
            gives a function that ends it.
        sha256: Reads the rest of the file, until the event is set; gives the digest in hexadecimal.
        check_unchanged: Raises ChangedError if the file is no longer the one that was opened.
    """

    name: str
    path: str
    size: int
    content: Callable[[], bytes] = field(repr=False)
    begin_hash: Callable[[], Callable[[], None]] = field(repr=False)
    sha256: Callable[[threading.Event | None], str] = field(repr=False)
    check_unchanged: Callable[[], None] = field(repr=False)


@dataclass(frozen=True)
class Step:
    """One operator applied: what it was, its settings, and the checkpoints it took.

    Attributes:
        operator: Its name.
        settings: Every setting, given or default.
        inputs: The operator's name for each checkpoint, to the checkpoint.
        repeatable: Whether it gives the same bytes again from the same inputs and settings; False
            for what was trained or estimated, whose numbers are in this process alone.
    """

    operator: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, Checkpoint]
    repeatable: bool = True


@dataclass(frozen=True, repr=False)
class Checkpoint(Mapping[str, TensorView]):
    """An immutable mapping of names to tensors, in sorted order, plus what travels with them.

    Attributes:
        tensors: The tensors by name.
        label: What to call the checkpoint in messages: the path or hub id as the user gave it.
        hub_id: `org/name@commit` for what came from the hub, else "".
        key: Name of the state dict that was asked for, of several in a PyTorch file.
        metadata: The safetensors header's `__metadata__`.
        layout: Shard file name of each tensor; empty for a single unnamed file.
        is_directory: True for a model directory, False for one file.
        files: The files the weights came from.
        side_files: Files that are copied with the weights.
        left_out: Directory entries that do not travel, each with the reason.
        warnings: What was odd about it, but not wrong.
        config: The parsed config.json, {} if there is none.
        parts: Of a model of several parts, the folder of each to its config.json; {} for any
            other. A part's tensors are called `folder/name`; those of the part called "", which
            is the model's folder itself, have their own names.
        card: What its model card says that the card of an output repeats, such as the license.
        step: The operator that made it; None for what was opened.
        notes: What the record should tell besides: how BASE and TUNED were aligned.
    """

    tensors: Mapping[str, TensorView]
    label: str = ""
    hub_id: str = ""
    key: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    layout: Mapping[str, str] = field(default_factory=dict)
    is_directory: bool = False
    files: tuple[FileRef, ...] = ()
    side_files: tuple[FileRef, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)
    step: Step | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", dict(sorted(self.tensors.items())))

    def __getitem__(self, name: str) -> TensorView:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        return f"Checkpoint({self.label!r}, {counted(len(self), 'tensor')}, {self.nbytes:,} bytes)"

    __hash__ = object.__hash__
    __eq__ = object.__eq__  # two checkpoints are equal only if they are the same one

    @property
    def size(self) -> int:
        """Number of elements in all tensors."""
        return sum(view.size for view in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(view.nbytes for view in self.tensors.values())

    def sources(self) -> tuple[Checkpoint, ...]:
        """The opened checkpoints this one is made from, each once, in order of appearance."""
        if self.step is None:
            return (self,)
        found: dict[int, Checkpoint] = {}
        for given in self.step.inputs.values():
            for source in given.sources():
                found.setdefault(id(source), source)
        return tuple(found.values())

    def input_files(self) -> tuple[FileRef, ...]:
        """Every file that this checkpoint and those it is made from were opened from."""
        return tuple(f for given in self.sources() for f in (*given.files, *given.side_files))

    def split(self) -> dict[str, Checkpoint]:
        """Each part as a model with names of its own, by its folder; any other model as the one "".

        Example:
            >>> import numpy as np
            >>> one, other = (from_arrays({"w": np.zeros(2)}) for _ in range(2))
            >>> whole = united({"": one, "2_Dense": other}, label="model")
            >>> list(whole), list(whole.split()["2_Dense"])
            (['2_Dense/w', 'w'], ['w'])
        """
        if not self.parts:
            return {"": self}
        names: dict[str, list[str]] = {folder: [] for folder in self.parts}
        deepest = sorted(filter(None, self.parts), key=len, reverse=True)
        for name in self:
            folder = next((f for f in deepest if name.startswith(f"{f}/")), "")
            names.setdefault(folder, []).append(name)
        return {folder: self._part(folder, names[folder]) for folder in names}

    def _part(self, folder: str, names: list[str]) -> Checkpoint:
        front = f"{folder}/" if folder else ""
        return replace(
            self,
            tensors={
                n.removeprefix(front): replace(self[n], name=n.removeprefix(front)) for n in names
            },
            label=f"{self.label}/{folder}" if folder else self.label,
            layout={
                n.removeprefix(front): self.layout[n].removeprefix(front)
                for n in names
                if n in self.layout
            },
            side_files=tuple(
                replace(file, name=file.name.removeprefix(front))
                for file in self.side_files
                if file.name.startswith(front)
            ),
            config=self.parts.get(folder, {}),
            parts={},
        )

    def check_unchanged(self) -> None:
        """Compare the input files with what they were when they were opened.

        Raises:
            ChangedError: One was written to, truncated or replaced.
        """
        for file in self.input_files():
            file.check_unchanged()

    def is_repeatable(self) -> bool:
        """Whether the same bytes can be made again from files alone."""
        if self.step is None:
            return bool(self.files)
        return self.step.repeatable and all(c.is_repeatable() for c in self.step.inputs.values())

    def made_by(self, step: Step) -> Checkpoint:
        """The same checkpoint, remembering the operator that made it."""
        return replace(self, step=step)

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """The same tensors under other names; those not mentioned keep theirs.

        Args:
            names: A tensor's name to its new one.

        Raises:
            SettingError: Two tensors would get the same name.
        """
        taken = Counter(names.get(name, name) for name in self)
        for name, count in taken.items():
            if count > 1:
                reason = "two tensors would get this name"
                raise SettingError(reason, file=self.label, tensor=name)
        renamed = replace(
            self,
            tensors={
                names.get(n, n): replace(view, name=names.get(n, n)) for n, view in self.items()
            },
            layout={names.get(n, n): shard for n, shard in self.layout.items()},
        )
        told = {name: new for name, new in names.items() if name in self}
        return renamed.made_by(Step("rename", {"names": told}, {"checkpoint": self}))


def united(parts: Mapping[str, Checkpoint], *, label: str) -> Checkpoint:
    """A model of several parts as one checkpoint.

    Args:
        parts: Folder to what was opened there; "" is the model's folder itself. Where only this
            one has weights, it is a model as any other, and the rest are files that are copied.
        label: What to call it in messages.
    """
    tensors: dict[str, TensorView] = {}
    layout: dict[str, str] = {}
    metadata: dict[str, str] = {}
    files: list[FileRef] = []
    side_files: list[FileRef] = []
    left_out: list[tuple[str, str]] = []
    warnings: list[str] = []
    for folder, part in parts.items():
        front = f"{folder}/" if folder else ""
        tensors |= {front + n: replace(view, name=front + n) for n, view in part.items()}
        layout |= {front + n: front + file for n, file in part.layout.items()}
        metadata |= part.metadata
        files += [replace(file, name=front + file.name) for file in part.files]
        side_files += [replace(file, name=front + file.name) for file in part.side_files]
        left_out += [(front + name, reason) for name, reason in part.left_out]
        warnings += [f"{folder}: {text}" if folder else text for text in part.warnings]
    weighty = {folder: part.config for folder, part in parts.items() if part}
    return Checkpoint(
        tensors,
        label=label,
        metadata=metadata,
        layout=layout,
        is_directory=True,
        files=tuple(files),
        side_files=tuple(side_files),
        left_out=tuple(left_out),
        warnings=tuple(warnings),
        config=parts[""].config if "" in parts else {},
        card=parts[""].card if "" in parts else {},
        parts={} if weighty.keys() == {""} else weighty,
    )


def require_checkpoints(*given: object) -> None:
    """Refuse anything else, a path above all.

    Raises:
        TypeError: One is not a checkpoint.
    """
    for one in given:
        if not isinstance(one, Checkpoint):
            raise TypeError(
                f"expected a Checkpoint, got {type(one).__name__}; open_checkpoint(path) gives one"
            )


def from_arrays(arrays: Mapping[str, Any], *, label: str = "memory", **fields: Any) -> Checkpoint:
    """A checkpoint of numpy arrays, as tests and notebooks want it.

    Args:
        arrays: Name to array; the dtype must be one of the safetensors format's.
        label: What to call it in messages.
        fields: Any other field of `Checkpoint`.

    Returns:
        The checkpoint; its blocks are copies of the arrays' elements.

    Raises:
        KeyError: An array's dtype is not one of the format's.
    """

    def view(name: str, array: Any) -> TensorView:
        dtype = dtype_of(array)
        flat = array.reshape(-1).view(dtype.numpy)

        def read_both(start: int, stop: int) -> tuple[Block, Block]:
            block = flat[start:stop].copy()
            return block, block

        return TensorView(name, tuple(array.shape), dtype, read_both)

    tensors = {name: view(name, array) for name, array in arrays.items()}
    return Checkpoint(tensors, label=label, **fields)
