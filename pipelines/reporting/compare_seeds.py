"""Two settings, each trained with several seeds: is the difference of their means larger than that between seeds?

Welch's t-test on one number for each training. SciPy is none of our dependencies, and Student's distribution is short.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_SMALL = 1e-300
"""In place of 0 in a continued fraction, so that nothing is divided by it."""


@dataclass(frozen=True, kw_only=True)
class SeedSpread:
    """second - first of the means over seeds, beside the spread between seeds."""

    first_std: float | None
    second_std: float | None
    """Sample standard deviations; None of one training."""
    low: float | None = None
    high: float | None = None
    """Welch's interval for the difference; None unless both have two trainings, and some differ."""
    p_value: float | None = None
    confidence: float = 0.95


def seed_spread(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> SeedSpread:
    """Of a metric of each training. It treats the videos as given: what other videos would change is another interval."""
    stds = [statistics.stdev(values) if len(values) > 1 else None for values in (first, second)]
    found = SeedSpread(first_std=stds[0], second_std=stds[1], confidence=confidence)
    if stds[0] is None or stds[1] is None:
        return found
    parts = [stds[0] ** 2 / len(first), stds[1] ** 2 / len(second)]
    difference, error = statistics.fmean(second) - statistics.fmean(first), math.sqrt(sum(parts))
    if (
        not error
    ):  # all trainings of either setting came to the same number: t would be infinite, of however few of them
        return found
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / (len(first) - 1) + parts[1] ** 2 / (len(second) - 1))
    reach = error * student_quantile((1 + confidence) / 2, freedom)
    return SeedSpread(
        first_std=stds[0],
        second_std=stds[1],
        low=difference - reach,
        high=difference + reach,
        p_value=two_sided(difference / error, freedom),
        confidence=confidence,
    )


def two_sided(t: float, freedom: float) -> float:
    """P(|T| >= |t|) of Student's t with so many degrees of freedom, which need not be whole."""
    return incomplete_beta(freedom / (freedom + t * t), freedom / 2, 0.5)


def student_quantile(probability: float, freedom: float) -> float:
    """The t below which T lies with this probability, which is above one half."""
    low, high = 0.0, 1.0
    while two_sided(high, freedom) > 2 * (1 - probability):
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, freedom) > 2 * (1 - probability) else (low, middle)
    return (low + high) / 2


def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (Abramowitz and Stegun 26.5.8)."""
    if x <= 0 or x >= 1:
        return float(x > 0)
    if x > (a + 1) / (a + b + 2):  # there the fraction converges slowly
        return 1 - incomplete_beta(1 - x, b, a)
    logarithm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(logarithm) / a / _fraction(x, a, b)


def _fraction(x: float, a: float, b: float) -> float:
    """1 + d_1 / (1 + d_2 / (1 + ...)), by the modified Lentz method."""
    value, above, below = 1.0, 1.0, 0.0
    for step in range(1, 1000):
        m = step // 2
        if step % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        below = 1 / ((1 + term * below) or _SMALL)
        above = (1 + term / above) or _SMALL
        value *= above * below
        if abs(above * below - 1) < 1e-15:
            break
    return value
