"""Averages and confidence intervals of shares."""

from __future__ import annotations

import math
from collections.abc import Sequence

_Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


def harmonic_mean(values: Sequence[float | None]) -> float | None:
    """Harmonic mean; 0 where a value is 0, None where one is undefined."""
    known = [v for v in values if v is not None]
    if len(known) != len(values) or not known:
        return None
    return 0.0 if min(known) <= 0 else len(known) / sum(1 / v for v in known)


def wilson(share: float, count: int) -> list[float]:
    """Wilson's 95 % score interval of a share seen in ``count`` observations (Wilson 1927)."""
    if count < 1:
        raise ValueError(f"wilson: count must be at least 1, got {count}")
    z2 = _Z95 * _Z95
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    half /= 1 + z2 / count
    # A bound that is 0 or 1 in exact arithmetic must not miss it by rounding.
    low = 0.0 if share == 0 else max(0.0, centre - half)
    high = 1.0 if share == 1 else min(1.0, centre + half)
    return [low, high]
