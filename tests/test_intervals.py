"""Wilson's interval against scipy and its closed forms."""

from __future__ import annotations

import math

import pytest
from scipy.stats import binomtest

from weightsurgery.evaluation.intervals import proportion, wilson

CASES = [(0, 1), (1, 1), (0, 64), (64, 64), (1, 64), (32, 64), (81, 263), (8721, 8722)]


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
@pytest.mark.parametrize(("count", "of"), CASES)
def test_it_is_the_interval_of_scipy(count: int, of: int, confidence: float) -> None:
    expected = binomtest(count, of).proportion_ci(confidence, method="wilson")
    low, high = wilson(count, of, confidence=confidence)
    assert low == pytest.approx(expected.low, abs=1e-12)
    assert high == pytest.approx(expected.high, abs=1e-12)
    assert 0 <= low <= count / of <= high <= 1


@pytest.mark.parametrize("of", [1, 3, 7, 10, 49, 100, 263, 1000])
def test_its_ends_at_the_borders_are_exact(of: int) -> None:
    """At p = 0 the upper end is z²/(n + z²), and the lower one 0 itself; mirrored at p = 1."""
    z2 = 1.959963984540054**2
    low, high = wilson(0, of)
    assert low == 0
    assert high == pytest.approx(z2 / (of + z2), rel=1e-12)
    low, high = wilson(of, of)
    assert high == 1
    assert low == pytest.approx(of / (of + z2), rel=1e-12)


def test_it_narrows_with_the_root_of_the_examples() -> None:
    widths = [math.dist(*([end] for end in wilson(n // 4, n))) for n in (10_000, 40_000)]
    assert widths[0] / widths[1] == pytest.approx(2, rel=1e-3)


def test_a_proportion_tells_what_was_counted() -> None:
    low, high = wilson(3, 8)
    assert proportion(3, 8) == {"share": 0.375, "low": low, "high": high, "count": 3, "of": 8}
