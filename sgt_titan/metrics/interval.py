"""A measured number with its N and its 95% interval."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Z = 1.959964  # 97.5% point of the normal distribution
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """``value`` in ``low..high`` with 95% confidence; ``n`` units (tokens, spans, pairs) went into it.

    A value that is not finite (unbounded, or undefined because ``n`` is 0) has no interval, nor has what a single row
    gives: NaN.
    """

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what is not finite becomes None, except an infinite value, which becomes "inf"."""
        fields = asdict(self)
        for name in ("value", "low", "high"):
            number = fields[name]
            if not math.isfinite(number):
                fields[name] = "inf" if math.isinf(number) and number > 0 else None
        return fields


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson score interval of a share (E. B. Wilson, JASA 22, 1927): not degenerate at 0 and 1."""
    if n == 0:
        return math.nan, math.nan
    p, z2 = successes / n, Z * Z
    centre, spread = p + z2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, (centre - spread) / (1 + z2 / n)), min(1.0, (centre + spread) / (1 + z2 / n))


def ratio(numerator_B: ArrayLike, denominator_B: ArrayLike, *, share: bool = False, seed: int = 0) -> Estimate:
    """``sum(numerator) / sum(denominator)`` over rows, with an interval by resampling rows.

    Tokens of one prompt are not independent, so rows are what is resampled (percentile bootstrap of 2000 draws). Where
    the ratio is a ``share`` of successes, the interval is widened to the Wilson interval of as many independent units,
    without which 0 of N would be certain.
    """
    numerator_B, denominator_B = np.asarray(numerator_B, np.float64), np.asarray(denominator_B, np.float64)
    n = round(float(denominator_B.sum()))
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    value = float(numerator_B.sum() / denominator_B.sum())
    if not math.isfinite(value):
        return Estimate(value, math.nan, math.nan, n)
    rows = len(numerator_B)
    if rows < 2 and not share:
        return Estimate(value, math.nan, math.nan, n)
    low, high = value, value
    if rows > 1:
        picks = np.random.default_rng(seed).integers(0, rows, (RESAMPLES, rows))
        below = denominator_B[picks].sum(1)
        draws = numerator_B[picks].sum(1)[below > 0] / below[below > 0]
        low, high = (float(q) for q in np.quantile(draws, (0.025, 0.975)))
    if share:
        wide = wilson(float(numerator_B.sum()), n)
        low, high = min(low, wide[0]), max(high, wide[1])
    return Estimate(value, min(low, value), max(high, value), n)
