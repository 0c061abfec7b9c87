"""Bootstrap interval, p-value and correction for differences between paired runs.

The plain percentile interval is too narrow for the 5 to 10 seeds of a comparison, so the expanded one is taken. Still
no resample has a mean beyond the smallest and the largest difference: with n = 5 the interval leaves out 0 wherever all
five have the same sign, by chance in 1 of 16 cases. So the p-value has to agree before a difference is called.

Measured: how often a 95 % interval holds the true mean (20,000 samples a cell). "both" is the union of the expanded
and Student's interval: 1 minus it is how often both call a difference where there is none.

    distribution   n   percentile   expanded   Student   both
    normal         5         0.84       0.92      0.95   0.95
    normal         7         0.88       0.94      0.95   0.96
    normal        10         0.91       0.95      0.95   0.95
    exponential    5         0.79       0.87      0.88   0.89
    exponential    7         0.82       0.89      0.89   0.90
    exponential   10         0.86       0.91      0.90   0.91
    t3             5         0.83       0.92      0.96   0.96
    t3             7         0.87       0.94      0.96   0.96
    t3            10         0.89       0.94      0.96   0.96

Where two arms do the same the difference between them is symmetric, however skewed the arms are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

EXACT_UP_TO = 10  # up to this many numbers every distinct resample is enumerated: 126 of five, 92,378 of ten
RESAMPLES = 20_000  # resamples drawn where there are more numbers
SEED = 2015  # of these draws: the same differences give the same interval everywhere


def bootstrap_interval(differences: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Compute the expanded percentile bootstrap interval of a mean.

    Quantiles a and 1 - a of the bootstrap means, a = Phi(-sqrt(n / (n - 1)) * t(n - 1; (1 + confidence) / 2)):
    resampling divides by n where n - 1 is right. Fewer than five numbers give the smallest and the largest of them.
    Hesterberg 2015, "What Teachers Should Know About the Bootstrap", American Statistician 69(4).
    """
    from scipy.special import ndtr, stdtrit  # a tenth of the import time of scipy.stats

    count = len(differences)
    quantile = float(stdtrit(count - 1, (1.0 + confidence) / 2.0))
    return percentile_interval(differences, float(ndtr(-math.sqrt(count / (count - 1)) * quantile)))


def percentile_interval(differences: Sequence[float], tail: float) -> tuple[float, float]:
    """Cut both tails off the bootstrap distribution of a mean; ``tail`` is the probability left out on each side.

    The lower end is the smallest bootstrap mean m with P(mean <= m) >= tail, the upper end its mirror image.
    Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.
    """
    # Sorted, so that drawn resamples do not depend on the order of the seeds either.
    values = np.sort(np.asarray(differences, dtype=np.float64))
    shares, weights = _resamples(len(values))
    means = shares @ values
    order = np.argsort(means, kind="stable")
    means, weights = means[order], weights[order]
    low = means[np.searchsorted(np.cumsum(weights), tail)]
    high = means[::-1][np.searchsorted(np.cumsum(weights[::-1]), tail)]
    # A weighted mean of equal numbers may be off in its last digit, but never truly leaves their range.
    return float(max(low, values[0])), float(min(high, values[-1]))


@lru_cache(maxsize=4)
def _resamples(count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """List resamples of ``count`` numbers: the share of each number (resamples, count), and the probabilities."""
    if count <= EXACT_UP_TO:
        # Stars and bars: count - 1 bars among 2 count - 1 places; the stars between them are how often each is drawn.
        bars = np.array(list(combinations(range(2 * count - 1), count - 1)))
        times = np.diff(bars, axis=1, prepend=-1, append=2 * count - 1) - 1
        factorials = np.array([math.factorial(k) for k in range(count + 1)], dtype=np.float64)
        weights = factorials[count] / factorials[times].prod(axis=1) / float(count) ** count
        return times / count, weights
    drawn = np.random.default_rng(SEED).multinomial(count, np.full(count, 1.0 / count), size=RESAMPLES // 2)
    # Each resample and its mirror image: exchanging the two arms then mirrors the interval exactly.
    times = np.concatenate([drawn, drawn[:, ::-1]])
    return times / count, np.full(RESAMPLES, 1.0 / RESAMPLES)


def paired_p_value(differences: Sequence[float]) -> float:
    """Compute the two-sided p-value of Student's paired t; 1 for equal numbers, which leave no spread to judge by.

    p = 2 P(T <= -|mean| / (sd / sqrt(n))), T with n - 1 degrees of freedom. Student 1908, Biometrika 6.
    """
    from scipy.special import stdtr

    values = np.asarray(differences, dtype=np.float64)
    if values.min() == values.max():
        return 1.0
    # Scaled, so that squares of very large or very small numbers neither overflow nor vanish.
    values = values / np.abs(values).max()
    count = len(values)
    mean = math.fsum(values) / count
    sd = math.sqrt(math.fsum((values - mean) ** 2) / (count - 1))
    return min(1.0, 2.0 * float(stdtr(count - 1, -abs(mean) * math.sqrt(count) / sd)))


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Adjust the p-values of all planned comparisons by Holm's step-down procedure; 1 stands for one that is missing.

    Of m sorted p-values, adjusted(i) = min(1, max over j <= i of (m - j + 1) p(j)). Calling those below alpha keeps the
    chance of any false call below alpha. Holm 1979, Scandinavian Journal of Statistics 6.
    """
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return tuple(adjusted)
