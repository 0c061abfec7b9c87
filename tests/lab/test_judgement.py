import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from layerwise.lab.errors import UsageError
from layerwise.lab.report.verdicts import note
from layerwise.lab.stats.bootstrap import bootstrap_interval
from layerwise.lab.stats.comparison import NONE, Pair, judge
from layerwise.lab.stats.wording import signed

BETTER = [-1.0, -1.2, -0.9, -1.1, -1.05]
WORSE = [-value for value in BETTER]
MIXED = [-1.0, 1.2, -0.9, 0.1, -0.05]
WEAK = [-1.0, -0.1, -2.0, -0.05, -0.6]
"""All of one sign, so that the bootstrap interval leaves out 0, and p = 0.10."""

ERROR = {"quantity": "test error", "higher_is_better": False, "unit": "points"}


def pair(differences, **changes):
    reference = {seed: 5.0 + seed / 10 for seed in range(len(differences))}
    values = {seed: reference[seed] + value for seed, value in enumerate(differences)}
    words = {"subject": "SGD", "arm": "layer-adaptive", "against": "plain", "step": 300}
    return Pair(**(words | {"values": values, "reference": reference} | changes))


def judged(differences, family=None, *, options=ERROR, **changes):
    return judge([pair(differences, **changes)], family=family, **options)[0]


def diverging(differences, seeds=(), other=(), **changes):
    return judged(differences, diverged=frozenset(seeds), diverged_reference=frozenset(other), **changes)


def test_the_numbers_are_those_of_the_paired_differences():
    found = judged(MIXED)
    assert found.seeds == (0, 1, 2, 3, 4)
    assert found.differences == pytest.approx(MIXED)
    assert found.mean == pytest.approx(sum(MIXED) / 5)
    assert found.sd == pytest.approx(stats.tstd(MIXED))
    assert (found.low, found.high) == pytest.approx(bootstrap_interval(MIXED))
    assert found.p == pytest.approx(stats.ttest_1samp(MIXED, 0.0).pvalue)
    assert found.adjusted_p == found.p


def test_a_clear_difference_is_called_in_either_direction():
    lower, higher = judged(BETTER), judged(WORSE)
    assert (lower.outcome, lower.better, lower.worse, lower.reason) == ("lower test error", True, False, "")
    assert (higher.outcome, higher.better, higher.worse, higher.reason) == ("higher test error", False, True, "")
    assert lower.sentence == (
        "layer-adaptive has a lower test error than plain "
        "(−1.05 points, 95 % interval −1.18 to −0.92, adjusted p < 0.001, n = 5)."
    )


def test_of_an_accuracy_the_higher_is_better():
    found = judged(WORSE, options={"quantity": "accuracy", "higher_is_better": True, "unit": "points"})
    assert (found.better, found.worse) == (True, False)
    assert found.sentence.startswith("layer-adaptive has a higher accuracy than plain (+1.05 points, ")


def test_other_quantities_have_their_own_words_units_and_decimals():
    seconds = judged([value / 1000 for value in BETTER], options=ERROR | {"quantity": "running time", "unit": "s"})
    assert "a lower running time than plain (−0.0011 s, 95 % interval −0.0012 to −0.0009, " in seconds.sentence
    perplexity = judged([30 * value for value in BETTER], options=ERROR | {"quantity": "perplexity", "unit": ""})
    assert "a lower perplexity than plain (−31.50, 95 % interval −35.40 to −27.60, " in perplexity.sentence


def test_an_interval_that_holds_0_shows_nothing():
    found = judged(MIXED)
    assert (found.outcome, found.better, found.worse) == (NONE, False, False)
    assert found.sentence.startswith(
        "no difference shown between layer-adaptive and plain (−0.13 points, 95 % interval"
    )
    assert found.sentence.endswith("n = 5; the interval holds 0).")


def test_an_interval_that_ends_at_0_but_for_rounding_holds_it():
    # The upper end is (4 x 0.1 - 0.4) / 5, which binary fractions miss.
    found = judged([0.1, -0.4, -0.41, -0.42, -0.43])
    assert found.high == 0.0
    assert " to 0, adjusted p" in found.sentence  # not +0.00, as of an end that is only rounded to it
    assert found.reason == "the interval holds 0"


def test_an_interval_without_0_is_not_enough():
    found = judged(WEAK)
    assert found.high < 0.0
    assert found.p == pytest.approx(stats.ttest_1samp(WEAK, 0.0).pvalue)
    assert (found.outcome, found.reason) == (NONE, "p is not below 0.05")


def test_what_does_not_survive_holm_is_not_called():
    pairs = [pair([-1.0, -1.5, -0.5, -0.8, -2.0]), pair(MIXED), pair(BETTER)]
    alone = judge(pairs[:1], **ERROR)[0]
    together = judge(pairs, family=9, **ERROR)
    assert alone.better
    assert alone.p == together[0].p < 0.05
    # Second smallest of nine: eight are left.
    assert together[0].adjusted_p == pytest.approx(8 * alone.p)
    assert together[0].adjusted_p >= 0.05
    assert (together[0].outcome, together[0].reason) == (
        NONE,
        "p is not below 0.05 after Holm's correction over 9 comparisons",
    )
    assert [each.better for each in together] == [False, False, True]
    assert together[2].adjusted_p == pytest.approx(9 * together[2].p)


def test_what_is_missing_or_cannot_be_judged_still_counts_in_the_family():
    clear = pair([-1.0, -1.5, -0.5, -0.8, -2.0])
    missing = judge([clear], family=3, **ERROR)[0]
    unjudged = judge([clear, pair(BETTER[:4]), pair([0.5] * 5)], **ERROR)
    assert missing.adjusted_p == unjudged[0].adjusted_p == pytest.approx(3 * missing.p)
    assert [each.adjusted_p for each in unjudged[1:]] == [None, None]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_fewer_than_five_pairs_show_nothing_and_have_no_interval(count):
    found = judged(BETTER[:count])
    assert (found.outcome, found.low, found.p, found.reason) == (NONE, None, None, "fewer than 5 pairs")
    assert found.sd == pytest.approx(stats.tstd(BETTER[:count]))
    assert found.statistics == f"{signed(sum(BETTER[:count]) / count)} points, n = {count}"


def test_one_pair_or_none():
    one, none = judged([-1.0]), judged([])
    assert (one.mean, one.sd, one.outcome) == (pytest.approx(-1.0), None, NONE)
    assert (none.mean, none.outcome, none.runs) == (None, NONE, 0)
    assert "(no pair of finished runs; fewer than 5 pairs)" in none.sentence
    assert judge([], **ERROR) == []


def test_only_seeds_that_both_ran_are_paired():
    found = judged([], values={0: 1.0, 2: 3.0, 1: 2.0}, reference={1: 1.0, 2: 1.0, 3: 9.0}, diverged=frozenset({7}))
    assert (found.seeds, found.differences, found.diverged, found.runs) == ((1, 2), (1.0, 2.0), (), 2)


def test_the_same_number_in_every_pair_is_said_so():
    found = judged([0.0] * 5)
    assert (found.mean, found.sd, found.low, found.outcome) == (0.0, 0.0, None, NONE)
    assert "the test error is the same in every pair" in found.sentence


def test_equal_differences_other_than_0_show_nothing():
    found = judged([-0.1] * 6)
    assert (found.sd, found.low, found.p, found.outcome) == (0.0, None, None, NONE)
    assert "every pair differs by the same amount, which leaves no spread to judge it by" in found.sentence


@pytest.mark.parametrize("number", [math.nan, math.inf, 90.2, None])
def test_a_diverged_run_counts_as_diverged_whatever_its_number(number):
    values = dict(pair(BETTER).values) | {5: number}
    if number is None:
        del values[5]
    reference = dict(pair(BETTER).reference) | {5: 5.0}
    found = diverging([], seeds=[5], values=values, reference=reference)
    assert (found.seeds, found.diverged, found.diverged_against, found.runs) == ((0, 1, 2, 3, 4), (5,), (), 6)
    assert found.mean == pytest.approx(-1.05)
    assert found.sentence.endswith(
        "layer-adaptive diverged in 1 of 6 seeds (against 0); the numbers are of the pairs in which neither did."
    )


def test_an_arm_that_diverged_more_often_is_never_the_better_one():
    found = diverging([*BETTER, -1.0], seeds=[5])
    assert (found.outcome, found.reason) == (NONE, "layer-adaptive diverged more often")
    assert found.high < 0.0
    assert found.adjusted_p < 0.05


def test_nor_is_the_other_arm_if_it_diverged_more_often():
    found = diverging([*WORSE, 1.0], other=[5])
    assert (found.outcome, found.reason) == (NONE, "plain diverged more often")


def test_an_arm_that_diverged_more_often_may_be_the_worse_one():
    assert diverging([*WORSE, 1.0], seeds=[5]).worse
    found = diverging([*BETTER, 1.0], other=[5])
    assert found.better
    assert "diverged in 0 of 6 seeds (against 1)" in found.sentence


def test_with_equally_many_diverged_runs_the_numbers_decide():
    apart, together = diverging([*BETTER, 0.0, 0.0], [5], [6]), diverging([*BETTER, 0.0], [5], [5])
    assert apart.better
    assert together.better
    assert "diverged in 1 of 7 seeds (against 1)" in apart.sentence
    assert "diverged in 1 of 6 seeds (against 1)" in together.sentence


def test_too_few_pairs_without_a_diverged_run_show_nothing():
    found = diverging(BETTER, other=[2])
    assert (found.outcome, found.reason) == (NONE, "fewer than 5 pairs without a diverged run")
    assert found.seeds == (0, 1, 3, 4)


def test_an_arm_that_always_diverged_has_no_numbers():
    found = diverging(BETTER, seeds=range(5))
    assert (found.mean, found.outcome) == (None, NONE)
    assert found.sentence == (
        "no difference shown between layer-adaptive and plain (no numbers to compare; "
        "fewer than 5 pairs without a diverged run). layer-adaptive diverged in 5 of 5 seeds (against 0)."
    )


differences = st.lists(st.integers(-40, 40).map(lambda value: value / 8), min_size=0, max_size=8)
some_seeds = st.frozensets(st.integers(0, 7), max_size=4)


@given(differences, some_seeds, some_seeds)
def test_exchanging_the_arms_exchanges_the_outcome(values, arm, against):
    there = pair(values, diverged=arm, diverged_reference=against)
    back = replace(
        there,
        values=there.reference,
        reference=there.values,
        diverged=against,
        diverged_reference=arm,
        arm="plain",
        against="layer-adaptive",
    )
    (one,), (other,) = judge([there], **ERROR), judge([back], **ERROR)
    assert (one.better, one.worse, one.reason) == (other.worse, other.better, other.reason)


@given(differences, some_seeds, some_seeds, st.integers(1, 20))
def test_a_difference_is_called_only_where_everything_agrees(values, arm, against, family):
    found = diverging(values, arm, against, family=family)
    if found.better or found.worse:
        assert len(found.differences) >= 5
        assert found.low > 0 or found.high < 0
        assert found.adjusted_p < 0.05
        assert found.reason == ""
        more_often = len(found.diverged) - len(found.diverged_against)
        assert more_often <= 0 if found.better else more_often >= 0
    else:
        assert found.reason


def test_the_note_says_how_intervals_and_outcomes_are_made():
    assert note(6, 10) == (
        "Intervals: 95 % bootstrap (expanded percentile) of the mean difference, paired by seed (10 seeds planned), "
        "each by itself. A difference is called where there are at least 5 pairs, the interval leaves out 0 and "
        "Student's paired t has p < 0.05 after Holm's correction over 6 comparisons."
    )
    assert note(6, 5).endswith(
        "With fewer than 7 pairs the intervals are too narrow (about 92 % at 5); the p-value makes up for it."
    )
    assert "Holm" not in note(1, 1)
    assert "1 seed planned" in note(1, 1)


def test_differences_are_written_with_their_sign():
    assert (signed(0.5), signed(-0.5), signed(0.0), signed(-0.5, 3)) == ("+0.50", "−0.50", "+0.00", "−0.500")


@pytest.mark.parametrize(
    ("p", "words"), [(0.0004, "p < 0.001"), (0.0312, "p = 0.031"), (0.04996, "p = 0.04996"), (0.05, "p = 0.050")]
)
def test_a_p_value_is_never_rounded_across_the_limit(p, words):
    assert words in replace(judged(BETTER), adjusted_p=p).statistics


def test_an_end_close_to_0_is_never_written_as_0():
    assert "95 % interval −0.500 to −0.004, " in replace(judged(BETTER), low=-0.5, high=-0.004).statistics


def test_a_result_that_is_not_finite_must_be_declared_as_diverged():
    with pytest.raises(UsageError, match=r"values\[0\]=nan of layer-adaptive.*add its seed to diverged$"):
        pair([], values={0: math.nan})
    with pytest.raises(UsageError, match=r"reference\[1\]=inf .*add its seed to diverged_reference$"):
        pair([], reference={1: math.inf}, diverged=frozenset({1}))
