import math
import re
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from layerwise.lab.stats import bootstrap as intervals
from layerwise.lab.stats.bootstrap import bootstrap_interval, holm, paired_p_value, percentile_interval

FIVE = [-1.0, 1.2, -0.9, 0.1, -0.05]
numbers = st.lists(st.integers(-1000, 1000).map(lambda value: value / 8), min_size=2, max_size=5)
probabilities = st.lists(st.floats(0.0, 1.0), max_size=8)


def slow_interval(values, tail):
    """Every ordered resample, all n to the power of n of them, in exact arithmetic."""
    exact = [Fraction(value) for value in values]
    means = sorted(sum(resample) / len(exact) for resample in product(exact, repeat=len(exact)))
    needed = max(1, math.ceil(Fraction(tail) * len(means)))
    return float(means[needed - 1]), float(means[-needed])


def expanded_tail(count, confidence=0.95):
    quantile = stats.t.ppf((1 + confidence) / 2, count - 1)
    return float(stats.norm.cdf(-math.sqrt(count / (count - 1)) * quantile))


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("values", [FIVE, [3.0, 1.0], [0.5, 0.5, -2.0], [1.0, 2.0, 4.0, 8.0, 16.0, 32.0], [0.1] * 4])
def test_the_interval_is_that_of_all_ordered_resamples(values, confidence):
    expected = slow_interval(values, expanded_tail(len(values), confidence))
    assert bootstrap_interval(values, confidence) == pytest.approx(expected, rel=1e-12)


@given(numbers, st.sampled_from([0.0, 0.011, 0.025, 0.21, 0.41]))
def test_the_percentile_interval_is_that_of_all_ordered_resamples(values, tail):
    assert percentile_interval(values, tail) == pytest.approx(slow_interval(values, tail), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("count", range(2, intervals.EXACT_UP_TO + 1))
def test_the_enumeration_holds_every_resample_once_with_its_probability(count):
    shares, weights = intervals._resamples(count)
    times = np.rint(shares * count).astype(int)
    assert len(times) == math.comb(2 * count - 1, count) == len(np.unique(times, axis=0))
    assert (times.sum(axis=1) == count).all()
    assert math.fsum(weights) == pytest.approx(1.0, rel=1e-12)
    assert weights @ shares == pytest.approx(np.full(count, 1 / count))


def test_five_numbers_reach_the_second_most_extreme_resample():
    assert 5**-5 < expanded_tail(5) < 6 * 5**-5
    values = [-5.0, 1.0, 2.0, 3.0, 7.0]
    assert bootstrap_interval(values) == pytest.approx(((4 * -5 + 1) / 5, (4 * 7 + 3) / 5))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_fewer_than_five_numbers_give_their_extremes(count):
    values = [0.3, -0.2, 1.0, 0.9][:count]
    assert bootstrap_interval(values) == pytest.approx((min(values), max(values)))


def test_drawn_resamples_agree_with_the_enumeration(monkeypatch):
    values = np.random.default_rng(3).standard_normal(9)
    exact = bootstrap_interval(values)
    monkeypatch.setattr(intervals, "EXACT_UP_TO", 5)
    intervals._resamples.cache_clear()
    drawn = bootstrap_interval(values)
    intervals._resamples.cache_clear()
    assert drawn != exact
    assert drawn == pytest.approx(exact, abs=0.05 * (exact[1] - exact[0]))


@pytest.mark.parametrize("count", [11, 30])
def test_many_numbers_give_nearly_students_interval(count):
    values = np.random.default_rng(count).standard_normal(count)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    width = expected.high - expected.low
    assert bootstrap_interval(values) == pytest.approx((expected.low, expected.high), abs=0.08 * width)


@pytest.mark.parametrize("count", [5, 10, 12])
def test_neither_order_nor_direction_nor_scale_matters(count):
    values = np.random.default_rng(count).standard_normal(count)
    low, high = bootstrap_interval(values)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(values[::-1]) == (low, high)
    assert bootstrap_interval(-values) == pytest.approx((-high, -low), rel=1e-12)
    assert bootstrap_interval(100 * values + 7) == pytest.approx((100 * low + 7, 100 * high + 7), rel=1e-12)


@given(numbers)
def test_more_confidence_is_a_wider_interval_within_the_numbers(values):
    narrow, wide = bootstrap_interval(values, 0.8), bootstrap_interval(values, 0.99)
    assert min(values) <= wide[0] <= narrow[0] <= narrow[1] <= wide[1] <= max(values)


DRAW = {
    "normal": lambda generator, count: generator.standard_normal(count),
    "exponential": lambda generator, count: generator.exponential(size=count) - 1.0,
    "t3": lambda generator, count: generator.standard_t(3, size=count),
}
ROW = re.compile(r"^ {4}(normal|exponential|t3) +(\d+) +(0\.\d\d) +(0\.\d\d) +(0\.\d\d) +(0\.\d\d)$", re.MULTILINE)
TABLE = ROW.findall(intervals.__doc__ or "")


def test_the_table_of_coverage_is_complete():
    assert {row[:2] for row in TABLE} == {(name, count) for name in DRAW for count in ("5", "7", "10")}


@pytest.mark.full
@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]}-{row[1]}")
def test_the_intervals_cover_as_often_as_the_table_says(row):
    name, count, claims = row[0], int(row[1]), [float(claim) for claim in row[2:]]
    generator = np.random.default_rng(7)
    samples = {5: 4000, 7: 1500, 10: 200}[count]
    hits = np.zeros(4)
    for _ in range(samples):
        values = DRAW[name](generator, count)
        expanded, half = bootstrap_interval(values), stats.t.ppf(0.975, count - 1) * stats.sem(values)
        student = (values.mean() - half, values.mean() + half)
        either = (min(expanded[0], student[0]), max(expanded[1], student[1]))
        found = (percentile_interval(values, 0.025), expanded, student, either)
        hits += [low <= 0.0 <= high for low, high in found]
    for claim, share in zip(claims, hits / samples, strict=True):
        # Three standard errors, and half of the last decimal that the table gives.
        assert share == pytest.approx(claim, abs=3 * math.sqrt(claim * (1 - claim) / samples) + 0.005)


@pytest.mark.parametrize("values", [FIVE, [1.0, 2.0], [-1.0, -1.2, -0.9, -1.1, -1.05], [1e-200, 3e-200, 2e-200]])
def test_the_p_value_is_students(values):
    scaled = np.array(values) / max(map(abs, values))
    assert paired_p_value(values) == pytest.approx(stats.ttest_1samp(scaled, 0.0).pvalue, rel=1e-10)


def test_the_p_value_computed_by_hand():
    # One degree of freedom: t = mean / (sd / sqrt 2) = 1.5 / 0.5 = 3, and p = 1 - (2 / pi) arctan 3.
    assert paired_p_value([1.0, 2.0]) == pytest.approx(1 - 2 / math.pi * math.atan(3), rel=1e-12)


@pytest.mark.parametrize("value", [0.0, -0.1, 3.0])
def test_equal_numbers_have_p_value_1(value):
    assert paired_p_value([value] * 6) == 1.0


def test_numbers_of_mean_0_have_p_value_1():
    assert paired_p_value([-1.0, 1.0, -2.0, 2.0]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("p_values", "expected"),
    [
        ([], []),
        ([0.04], [0.04]),
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.01, 0.02, 0.02, 0.9], [0.04, 0.06, 0.06, 0.9]),
        # 3 x 0.02 = 0.06 is larger than 2 x 0.025 = 0.05, which must not overtake it.
        ([0.025, 0.02, 0.04], [0.06, 0.06, 0.06]),
        ([0.6, 0.7, 1.0], [1.0, 1.0, 1.0]),
    ],
)
def test_holm_computed_by_hand(p_values, expected):
    assert holm(p_values) == pytest.approx(expected)


@given(probabilities)
def test_holm_is_the_largest_of_all_steps_up_to_each(p_values):
    # Slow and obvious: of the p-values up to this one, each times the number of those that are not smaller.
    expected = [
        min(1.0, max(sum(other >= step for other in p_values) * step for step in p_values if step <= p))
        for p in p_values
    ]
    assert holm(p_values) == pytest.approx(expected)


@given(probabilities, st.randoms())
def test_holm_does_not_depend_on_the_order(p_values, random):
    places = list(range(len(p_values)))
    random.shuffle(places)
    adjusted = holm(p_values)
    assert holm([p_values[place] for place in places]) == tuple(adjusted[place] for place in places)


@given(probabilities, st.floats(0.0, 1.0))
def test_holm_keeps_the_order_lies_between_nothing_and_bonferroni_and_grows_with_the_family(p_values, another):
    adjusted = holm(p_values)
    for p, found, larger in zip(p_values, adjusted, holm([*p_values, another]), strict=False):
        assert p <= found <= min(1.0, len(p_values) * p)
        assert found <= larger
        assert all(found <= other for q, other in zip(p_values, adjusted, strict=True) if p < q)
