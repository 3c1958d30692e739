"""The random numbers equal a slow, independent implementation, and behave like random ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import cases, reference
from weightsurgery.rng import key_of, random_bits, random_mask

NAMES = ["w", "model.layers.3.mlp.down_proj.weight", "", "ünï\0code", "\ud800"]


@pytest.mark.parametrize("seed", cases.SEEDS)
@pytest.mark.parametrize("name", NAMES[:-1], ids=["short", "long", "empty", "odd"])
def test_bits_equal_the_reference(seed: int, name: str) -> None:
    key = reference.key_of(seed, name)
    assert int(key_of(seed, name)) == key
    expected = [reference.random_number(key, i) for i in range(101)]
    assert random_bits(seed, name, 0, 101).tolist() == expected


def test_the_reference_is_splitmix64() -> None:
    """Against the first outputs that its authors' code gives for the seed 1234567."""
    halves = [reference.random_number(1234567, i) for i in range(4)]
    outputs = [halves[0] | halves[1] << 32, halves[2] | halves[3] << 32]
    assert outputs == [6457827717110365317, 3203168211198807973]


def test_the_numbers_never_change() -> None:
    """Frozen: another generator would give other models from the same recipe."""
    assert random_bits(0, "w", 0, 4).tolist() == [852837426, 1063330918, 2725732302, 1254053064]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 70))
def test_any_part_equals_that_part_of_the_whole(start: int, count: int) -> None:
    key = reference.key_of(5, "w")
    expected = [reference.random_number(key, i) for i in range(start, start + count)]
    assert random_bits(5, "w", start, count).tolist() == expected


@pytest.mark.parametrize(("start", "count"), [(0, 0), (1, 0), (0, 1), (1, 1), (3, 2)])
def test_short_parts(start: int, count: int) -> None:
    whole = random_bits(1, "w", 0, 10)
    part = random_bits(1, "w", start, count)
    assert part.dtype == np.uint32
    assert part.tolist() == whole[start : start + count].tolist()


def test_names_with_lone_surrogates_have_a_stream() -> None:
    assert random_bits(0, NAMES[-1], 0, 8).tolist() != random_bits(0, "?", 0, 8).tolist()


@pytest.mark.parametrize("share", [0.0, 2**-33, 0.25, 0.5, 1 - 2**-32, 1 - 2**-34, 1.0])
def test_masks_equal_the_reference(share: float) -> None:
    expected = reference.mask(9, "w", 400, share)
    assert random_mask(9, "w", 0, 400, share).tolist() == expected.tolist()


@pytest.mark.parametrize("index", [0, 1, 6, 7])
def test_the_share_is_met_exactly(index: int) -> None:
    """An element is True from the first share above its random number on, not before."""
    number = reference.random_number(reference.key_of(0, "w"), index)
    assert not random_mask(0, "w", 0, 8, number / 2**32)[index]
    assert random_mask(0, "w", 0, 8, (number + 1) / 2**32)[index]


def test_nothing_at_zero_and_all_at_one() -> None:
    assert not random_mask(3, "w", 0, 10_000, 0).any()
    assert random_mask(3, "w", 0, 10_000, 1).all()


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1))
def test_masks_are_nested(one: float, other: float) -> None:
    small, large = (random_mask(4, "w", 17, 500, s) for s in sorted([one, other]))
    assert not (small & ~large).any()


# Statistical tests with fixed seeds. Bounds are five standard deviations or more.

COUNT = 1 << 18


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.99])
def test_mean_and_variance(share: float) -> None:
    mask = random_mask(11, "w", 0, COUNT, share)
    assert abs(mask.mean() - share) < 5 * (share * (1 - share) / COUNT) ** 0.5
    counts = mask.reshape(-1, 256).sum(1)  # binomial
    expected = 256 * share * (1 - share)
    assert abs(counts.var() / expected - 1) < 5 * (2 / counts.size) ** 0.5 + 0.1


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(one, other)[0, 1])


@pytest.mark.parametrize("lag", [1, 2, 3, 64])
def test_neighbours_are_uncorrelated(lag: int) -> None:
    bits = random_bits(12, "w", 0, COUNT).astype(np.float64)
    assert abs(correlation(bits[lag:], bits[:-lag])) < 5 / COUNT**0.5


@pytest.mark.parametrize(
    ("one", "other"),
    [((0, "w"), (1, "w")), ((0, "w"), (-1, "w")), ((0, "layer.1"), (0, "layer.2"))],
    ids=["seeds", "signs", "names"],
)
def test_streams_are_uncorrelated(one: tuple[int, str], other: tuple[int, str]) -> None:
    first, second = (random_bits(*key, 0, COUNT).astype(np.float64) for key in (one, other))
    assert abs(correlation(first, second)) < 5 / COUNT**0.5


def test_every_bit_is_fair() -> None:
    bits = np.unpackbits(random_bits(13, "w", 0, COUNT).view(np.uint8)).reshape(-1, 32)
    assert np.abs(bits.mean(0) - 0.5).max() < 6 * 0.5 / COUNT**0.5
