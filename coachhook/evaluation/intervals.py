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


def ratio_interval(sums: Sequence[float], counts: Sequence[int]) -> list[float] | None:
    """95 % interval of ``sum(sums) / sum(counts)`` where the groups are independent.

    For a mean over tokens whose texts are the independent units: the linearised variance of a ratio
    estimator, ``var = T / (T - 1) sum_t (s_t - r n_t)^2 / (sum_t n_t)^2`` over T groups (Cochran
    1977, section 6.3).

    Args:
        sums: sum of the values of each group.
        counts: values in each group.

    Returns:
        The bounds; None for fewer than two groups.
    """
    groups, total = len(counts), sum(counts)
    if groups < 2 or total < 1:
        return None
    ratio = sum(sums) / total
    spread = sum((s - ratio * n) ** 2 for s, n in zip(sums, counts, strict=True))
    half = _Z95 * math.sqrt(groups / (groups - 1) * spread) / total
    return [ratio - half, ratio + half]
