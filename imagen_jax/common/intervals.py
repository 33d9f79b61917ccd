"""Confidence intervals."""

from __future__ import annotations

import math


def wilson(successes: float, total: float, z: float = 1.96) -> tuple[float, float]:
    """Returns the Wilson score interval (low, high) of a proportion (Wilson 1927).

    Unlike the normal approximation, it stays within [0, 1] and has a width at 0 and 1.

    Args:
      successes, total: numbers of trials; need not be whole if they stand for correlated ones.
      z: quantile of the normal distribution; 1.96 gives a 95% interval.
    """
    middle, scale = (successes + z**2 / 2) / (total + z**2), 1 / (total + z**2)
    half = z * scale * math.sqrt(successes * (total - successes) / total + z**2 / 4)
    return max(0.0, middle - half), min(1.0, middle + half)
