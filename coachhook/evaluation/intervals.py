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


def wilson(share: float, count: float) -> list[float]:
    """Wilson's 95 % score interval of a share seen in ``count`` observations (Wilson 1927).

    Raises:
        ValueError: ``count`` is less than 1.
    """
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


def effective_count(sizes: Sequence[int]) -> float:
    """How many groups of one size say as much as groups of these sizes (Kish 1965).

    ``(sum n)^2 / sum n^2``: a long text among many short ones weighs a mean over tokens nearly
    alone, and then the mean is known little better than from one text.
    """
    return sum(sizes) ** 2 / sum(n * n for n in sizes)


def _student95(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t, to 0.2 %.

    Hill's expansion (Abramowitz and Stegun, 26.7.5), exact values where it is too short.
    """
    if freedom < 3:
        return (12.706204736, 4.302652730)[freedom - 1]
    z, v = _Z95, freedom
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )


def ratio_interval(
    sums: Sequence[float], counts: Sequence[int], *, lowest: float = -math.inf
) -> list[float] | None:
    """95 % interval of ``sum(sums) / sum(counts)`` where the groups are independent.

    For a mean over tokens whose texts are the independent units: the linearised variance of a ratio
    estimator, ``var = T / (T - 1) sum_t (s_t - r n_t)^2 / (sum_t n_t)^2`` over T groups (Cochran
    1977, section 6.3), with Student's quantile for T - 1 degrees of freedom: the normal one would
    hold 70 % of the time instead of 95 for two groups, 88 % for five.

    Args:
        sums: sum of the values of each group.
        counts: values in each group.
        lowest: least value that there can be; no bound lies below it.

    Returns:
        The bounds; None for fewer than two groups, or where a sum is not finite.
    """
    groups, total = len(counts), sum(counts)
    if groups < 2 or total < 1 or not all(map(math.isfinite, sums)):
        return None
    ratio = sum(sums) / total
    spread = sum((s - ratio * n) ** 2 for s, n in zip(sums, counts, strict=True))
    half = _student95(groups - 1) * math.sqrt(groups / (groups - 1) * spread) / total
    return [max(lowest, ratio - half), max(lowest, ratio + half)]
