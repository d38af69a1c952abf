"""Student's t, as far as tables of runs need it."""
from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def upper_tail(t: float, degrees: float) -> float:
    """The probability that Student's t with so many degrees of freedom is above t, by the incomplete beta function."""
    import mpmath  # comes with PyTorch, for SymPy
    half = float(mpmath.betainc(degrees / 2, 0.5, 0, degrees / (degrees + t * t), regularized=True)) / 2
    return half if t > 0 else 1 - half


def welch(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Two-sided p-value of equal means, variances free (Welch 1947). None: fewer than two values on a side, or all
    equal on both."""
    if min(len(one), len(other)) < 2:
        return None
    a, b = (statistics.variance(values) / len(values) for values in (one, other))
    if a + b == 0:
        return None
    degrees = (a + b) ** 2 / (a * a / (len(one) - 1) + b * b / (len(other) - 1))
    return 2 * upper_tail(abs(statistics.fmean(one) - statistics.fmean(other)) / math.sqrt(a + b), degrees)


def below(values: Sequence[float], bound: float) -> float | None:
    """One-sided p-value of a mean that is not below `bound`: small if the values are below it. None as for `welch`."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    if not spread:
        return None
    return upper_tail((bound - statistics.fmean(values)) * math.sqrt(len(values)) / spread, len(values) - 1)
