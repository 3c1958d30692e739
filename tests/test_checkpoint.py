"""Views, the grid of blocks, and checkpoints as mappings."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from tests import cases
from weightsurgery import checkpoint as module
from weightsurgery.checkpoint import TensorView, from_arrays
from weightsurgery.dtypes import DTYPES, dtype_of
from weightsurgery.formats import open_checkpoint
from weightsurgery.operators.mix import mix


def nothing(start: int, stop: int) -> Any:
    raise AssertionError("read")


def view(shape: tuple[int, ...], dtype: str = "F32") -> TensorView:
    return TensorView("w", shape, DTYPES[dtype], nothing)


SHAPES = st.lists(st.integers(0, 40), max_size=3).map(tuple)


@settings(max_examples=200, deadline=None)
@given(SHAPES, st.sampled_from([4, 16, 64]))
def test_blocks_are_a_grid_of_whole_rows(shape: tuple[int, ...], block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        tensor = view(shape)
        blocks = list(tensor.blocks())
    assert [i for start, stop in blocks for i in range(start, stop)] == list(range(tensor.size))
    assert all(0 < stop - start <= block for start, stop in blocks)
    width = tensor.width
    full = {stop - start for start, stop in blocks[:-1]}
    assert width > block or full <= {block // max(1, width) * width}, "as large as may be"
    for start, stop in blocks:
        if width <= block:
            assert start % width == stop % width == 0
        else:
            assert start // width == (stop - 1) // width, "no block crosses a row's end"


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
@pytest.mark.parametrize("shape", [(8, 3), (3, 8), (24,), (2, 3, 4), (1, 200), (200, 1)], ids=str)
def test_packed_blocks_begin_and_end_on_whole_bytes(
    dtype: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases.shrink_blocks(monkeypatch, 16)
    tensor = view(shape, dtype)
    blocks = list(tensor.blocks())
    assert [stop for _, stop in blocks[:-1]] == [start for start, _ in blocks[1:]]
    assert (blocks[0][0], blocks[-1][1]) == (0, tensor.size)
    assert all(start * tensor.dtype.bits % 8 == 0 for start, _ in blocks)
    assert sum(tensor.dtype.nbytes(stop - start) for start, stop in blocks) == tensor.nbytes


@pytest.mark.parametrize(
    ("shape", "size", "width"),
    [
        ((), 1, 1),
        ((5,), 5, 5),
        ((3, 4), 12, 4),
        ((2, 3, 4), 24, 12),
        ((0, 4), 0, 4),
        ((4, 0), 0, 0),
    ],
)
def test_sizes(shape: tuple[int, ...], size: int, width: int) -> None:
    for dtype, nbytes in (("F32", 4), ("BF16", 2), ("BOOL", 1), ("F64", 8)):
        tensor = view(shape, dtype)
        assert (tensor.size, tensor.width, tensor.nbytes) == (size, width, size * nbytes)


def test_a_checkpoint_is_a_sorted_mapping_that_reads_nothing() -> None:
    arrays = {"b": np.zeros(3, np.float32), "a": np.zeros((2, 2), np.int64)}
    checkpoint = from_arrays(arrays, label="given")
    assert list(checkpoint) == ["a", "b"]
    assert (len(checkpoint), checkpoint.size, checkpoint.nbytes) == (2, 7, 44)
    assert repr(checkpoint) == "Checkpoint('given', 2 tensors, 44 bytes)"
    assert checkpoint != from_arrays(arrays, label="given")
    assert hash(checkpoint) != hash(from_arrays(arrays, label="given"))
    with pytest.raises(KeyError, match="'c'"):
        _ = checkpoint["c"]


def test_arrays_of_any_memory_layout() -> None:
    grid = np.arange(12, dtype=np.float32).reshape(3, 4)
    arrays = {"fortran": np.asfortranarray(grid), "strided": grid[:, ::2], "turned": grid.T}
    found = cases.read(from_arrays(arrays))
    assert all((found[n] == a).all() and found[n].shape == a.shape for n, a in arrays.items())


def test_arrays_of_other_dtypes_are_refused() -> None:
    for array in (np.zeros(2, np.complex128), np.array(["text"]), np.zeros(2, "M8[s]")):
        with pytest.raises(KeyError):
            from_arrays({"w": array})


@pytest.mark.parametrize("name", [n for n, d in DTYPES.items() if d.bits >= 8])
def test_dtypes_of_arrays(name: str) -> None:
    array = np.zeros(2, np.bool_ if name == "BOOL" else DTYPES[name].numpy)
    assert dtype_of(array).name == name
    assert DTYPES[name].nbytes(3) == array[:1].nbytes * 3


def test_sources_are_the_opened_checkpoints_once_each() -> None:
    base, tuned = (from_arrays(arrays) for arrays in cases.pair())
    once = mix(base, tuned)
    assert base.sources() == (base,)
    assert once.sources() == (base, tuned)
    assert mix(base, once).sources() == (base, tuned)
    assert mix(once, base).sources() == (base, tuned)


def test_a_renamed_checkpoint_reads_the_same_tensors() -> None:
    base = from_arrays({"a": np.ones(2, np.float32), "b": np.zeros(2, np.float32)})
    found = base.renamed({"a": "c"})
    assert [(n, v.name, v.read(0, 1)[0]) for n, v in found.items()] == [
        ("b", "b", 0),
        ("c", "c", 1),
    ]
    assert list(base) == ["a", "b"]
    assert found.sources() == (base,)


def test_a_file_of_every_dtype_is_copied_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weightsurgery.formats import open_checkpoint, save

    cases.shrink_blocks(monkeypatch, 16)
    rng = np.random.default_rng(8)
    arrays: cases.Arrays = {}
    for dtype, shape in itertools.product(DTYPES.values(), [(5, 7), (40,), (), (0, 3)]):
        if dtype.bits >= 8:
            raw = rng.integers(0, 256, int(np.prod(shape)) * dtype.bits // 8, np.uint8)
            array = raw % 2 == 1 if dtype.name == "BOOL" else raw.view(dtype.numpy)
            arrays[f"{dtype.name}.{shape}"] = array.reshape(shape)
    path = cases.write_file(tmp_path / "in.safetensors", arrays)
    save(open_checkpoint(path), str(tmp_path / "out.safetensors"))
    assert cases.stored_in(tmp_path / "out.safetensors") == cases.stored(arrays)


@pytest.mark.parametrize(("start", "stop"), [(0, 7), (-1, 2), (7, 8), (4, 2), (0, 10**9)])
def test_only_a_tensors_own_elements_are_read(tmp_path: Path, start: int, stop: int) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": np.zeros(6, np.float32), "b": np.ones(6, np.float32)}, path)
    view = open_checkpoint(path)["a"]
    with pytest.raises(IndexError, match=f"elements {start} to {stop} of 'a', which has 6"):
        view.read(start, stop)
    assert view.read(6, 6).size == 0
