"""How sure a share is that was counted on a few hundred examples."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

CONFIDENCE = 0.95


def wilson(count: int, of: int, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval of a share, without continuity correction.

    With p = count/of, n = of and z the normal quantile at (1 + confidence)/2, the ends are

        (p + z²/2n ± z·sqrt(p(1 - p)/n + z²/4n²)) / (1 + z²/n).

    Unlike p ± z·sqrt(p(1 - p)/n) it stays within 0 and 1 and is not empty at p = 0 and p = 1,
    which is where attacks succeed or fail.

    Reference:
        Wilson, "Probable inference, the law of succession, and statistical inference", Journal of
        the American Statistical Association 22, 1927, pages 209 to 212.

    Args:
        count: Successes, 0 to `of`.
        of: Trials, at least 1.
        confidence: Between 0 and 1.

    Returns:
        The lower and the upper end.

    Example:
        >>> low, high = wilson(81, 263)
        >>> round(low, 4), round(high, 4)
        (0.2553, 0.3662)
    """
    z, p = NormalDist().inv_cdf((1 + confidence) / 2), count / of
    centre = p + z * z / (2 * of)
    half = z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    scale = 1 + z * z / of
    # At the borders the ends are 0 and 1; rounding must not say otherwise.
    low = 0.0 if count == 0 else (centre - half) / scale
    high = 1.0 if count == of else (centre + half) / scale
    return low, high


def proportion(count: int, of: int) -> dict[str, Any]:
    """A counted share with its 95 % interval, as reports hold it."""
    low, high = wilson(count, of)
    return {"share": count / of, "low": low, "high": high, "count": count, "of": of}
