"""Drift statistics: sums that add up, and the numbers that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from weightsurgery.drift_kernel import BIN_SHIFT, BINS, TOTALS
from weightsurgery.kernels import Block

QUANTILES = (0.5, 0.9, 0.99, 0.999)
QUANTILE_ERROR = 1 / 64  # half the relative width of a bin, for |drift| of 2**-126 or more
METRICS = (
    *("count", "changed", "changed_share", "l2", "relative_l2", "max_abs", "mean", "std"),
    *("cosine", "sign_flips", *(f"q{q * 100:g}" for q in QUANTILES)),
    *("base_nan", "base_inf", "tuned_nan", "tuned_inf", "skipped"),
)
_LARGEST = TOTALS.index("largest")
_INFINITE = (0x7F800000 >> BIN_SHIFT) - 1  # bins from the last finite one on


def finite_or_none(value: Any) -> Any:
    """The value, or None for NaN and infinity, which JSON cannot say."""
    return value if value is None or np.isfinite(value) else None


@dataclass
class Statistics:
    """Sums that add up: over blocks to tensors, over tensors to layers, kinds and the model.

    Attributes:
        count: Elements compared.
        totals: float64 sums, as named in `drift_kernel.TOTALS`.
        bins: int64 histogram of |drift| by float32 bits.
    """

    count: int = 0
    totals: Block = field(default_factory=lambda: np.zeros(len(TOTALS)))
    bins: Block = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def add(self, count: int, totals: Block, bins: Block) -> None:
        """Add another set of sums to this one."""
        self.count += count
        largest = max(self.totals[_LARGEST], totals[_LARGEST])
        self.totals += totals
        self.totals[_LARGEST] = largest
        self.bins += bins

    def summary(self) -> dict[str, Any]:
        """The numbers a report shows; None where one is undefined or beyond float64.

        All are over the pairs with finite drift; `skipped` tells how many had none. Quantiles are
        of |drift| and within `QUANTILE_ERROR` of the true ones, relatively.
        """
        total = dict(zip(TOTALS, map(float, self.totals), strict=True))
        finite = self.count - int(total["skipped"])
        mean = total["sum"] / finite if finite else 0.0
        mean_square = total["drift2"] / finite if finite else 0.0
        base2, tuned2 = total["base2"], total["tuned2"]
        norms = base2**0.5 * tuned2**0.5  # not the root of the product: that overflows sooner
        variance = mean_square - mean * mean
        # The dot product by the law of cosines: of near models it is what a sum would round away.
        cosine = (base2 / 2 + tuned2 / 2 - total["drift2"] / 2) / norms if norms else None
        if cosine is not None and abs(cosine) > 1:  # by rounding; a comparison leaves NaN alone
            cosine = math.copysign(1.0, cosine)
        quantiles = self._quantiles(finite)
        counts = ("changed", "sign_flips", "base_nan", "base_inf", "tuned_nan", "tuned_inf")
        found = {
            "count": self.count,
            "changed_share": total["changed"] / self.count if self.count else 0.0,
            "l2": total["drift2"] ** 0.5,
            "relative_l2": (total["drift2"] / base2) ** 0.5 if base2 else None,
            "max_abs": total["largest"],
            "mean": mean,
            "std": variance**0.5 if not variance < 0 else 0.0,
            "cosine": cosine,
            **{f"q{q * 100:g}": value for q, value in zip(QUANTILES, quantiles, strict=True)},
            **{name: int(total[name]) for name in (*counts, "skipped")},
            "bit_equal": total["changed"] == 0,
        }
        return {key: finite_or_none(value) for key, value in found.items()}

    def _quantiles(self, finite: int) -> list[float]:
        """For each share the smallest |drift| that at least so many elements do not exceed."""
        ranks = [max(1, math.ceil(share * finite)) for share in QUANTILES]
        places = np.searchsorted(np.cumsum(self.bins), ranks).astype(np.uint32)
        bins = np.minimum(places, _INFINITE)
        edges = (np.array([bins, bins + 1], np.uint32) << np.uint32(BIN_SHIFT)).view(np.float32)
        largest = float(self.totals[_LARGEST])
        middles = np.minimum(edges.astype(np.float64).mean(0), largest)
        # The first bin is zero, or below 4e-40; what is F64 beyond float32 is told no finer.
        known = np.where(places >= _INFINITE, largest, np.where(places == 0, 0.0, middles))
        return [float(value) if finite else 0.0 for value in known]
