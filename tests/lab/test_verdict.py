import math

import pytest
from scipy import stats

from layerwise.lab.verdict import (
    HIGHER,
    LOWER,
    NONE,
    compare,
    conclusion,
    confidence_note,
    signed,
    student_interval,
)

WORDS = {"solver": "SGD", "arm": "layer-adaptive", "against": "plain", "iteration": 300}
BETTER = [-1.0, -1.2, -0.9, -1.1, -1.05]
MIXED = [-1.0, 1.2, -0.9, 0.1, -0.05]


def comparison(differences, family=6, **changes):
    reference = dict(enumerate([5.0] * len(differences)))
    errors = {seed: 5.0 + value for seed, value in enumerate(differences)}
    return compare(errors, reference, family, **(WORDS | changes))


@pytest.mark.parametrize("confidence", [0.95, 0.99, 1 - 0.05 / 6])
@pytest.mark.parametrize("values", [BETTER, MIXED, [0.3, -0.2]])
def test_the_interval_is_students(values, confidence):
    mean, sd, low, high = student_interval(tuple(values), confidence)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(confidence)
    assert (low, high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert mean == pytest.approx(sum(values) / len(values))
    assert sd == pytest.approx(stats.tstd(values))


def test_the_interval_computed_by_hand():
    # n = 5, mean 3, sd sqrt(2.5); the quantile 2.776 of t with 4 degrees of freedom is in every table.
    _, _, low, high = student_interval((1.0, 2.0, 3.0, 4.0, 5.0), 0.95)
    assert (high - low) / 2 == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5), rel=1e-3)


def test_the_correction_divides_alpha_by_the_family():
    found = comparison(BETTER, family=6)
    expected = stats.ttest_1samp(BETTER, 0.0).confidence_interval(1 - 0.05 / 6)
    assert found.confidence == pytest.approx(1 - 0.05 / 6)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert comparison(BETTER, family=1).high < found.high


def test_a_difference_whose_interval_leaves_out_0_is_called():
    lower, higher = comparison(BETTER), comparison([-value for value in BETTER])
    assert (lower.outcome, higher.outcome) == (LOWER, HIGHER)
    assert lower.sentence.startswith("layer-adaptive has a lower error than plain (−1.05 points, interval −1.")
    assert "n = 5" in lower.sentence
    assert higher.sentence.startswith("layer-adaptive has a higher error than plain (+1.05 points")


def test_an_interval_that_holds_0_shows_nothing():
    found = comparison(MIXED)
    assert found.outcome == NONE
    assert found.sentence.startswith("no difference shown between layer-adaptive and plain (")
    assert "the interval holds 0" in found.sentence


def test_fewer_than_five_pairs_show_nothing_however_clear():
    found = comparison([-1.0, -1.001, -1.002, -0.999])
    assert found.high < 0
    assert found.outcome == NONE
    assert "fewer than 5 pairs" in found.sentence
    assert "n = 4" in found.sentence


def test_one_pair_has_no_interval():
    found = comparison([-1.0])
    assert (found.mean, found.sd, found.low, found.high, found.outcome) == (-1.0, None, None, None, NONE)
    assert "interval" not in found.sentence


def test_no_pair_is_said_to_be_none():
    found = comparison([])
    assert (found.mean, found.outcome) == (None, NONE)
    assert "no pair of finished runs" in found.sentence


def test_only_seeds_that_both_have_are_paired():
    found = compare({0: 1.0, 1: 2.0, 2: 3.0}, {1: 1.0, 2: 1.0, 3: 9.0}, 6, **WORDS)
    assert found.seeds == (1, 2)
    assert found.differences == (1.0, 2.0)


def test_equal_differences_other_than_0_give_no_interval_and_show_nothing():
    found = comparison([-0.1] * 6)
    assert (found.outcome, found.sd, found.low) == (NONE, 0.0, None)
    assert "no spread to judge it by" in found.sentence


def test_the_same_error_in_every_pair_is_said_so():
    found = comparison([0.0] * 5)
    assert found.outcome == NONE
    assert "the same in every pair" in found.sentence


def test_diverged_runs_are_kept_and_flagged():
    found = comparison([85.0, -0.1, -0.2, -0.1, -0.15], diverged=1)
    assert found.outcome == NONE
    assert len(found.differences) == 5
    assert "1 of these runs diverged" in found.sentence


@pytest.mark.parametrize(
    ("against_plain", "against_control", "words"),
    [
        (BETTER, BETTER, "more than that of a larger global rate: it beats"),
        (BETTER, MIXED, "beats the plain solver but not the control: the gain is not shown to be more than"),
        (
            BETTER,
            [1.0, 1.1, 1.2, 0.9, 1.0],
            "It beats the plain solver, but the same mean factor as a global",
        ),
        (MIXED, [1.0, 1.1, 1.2, 0.9, 1.0], "Here the same mean factor as a global rate does better"),
        (MIXED, MIXED, "do not show that the method changes the error"),
        (MIXED, BETTER, "beats the control, but is not shown to beat the plain solver"),
        ([1.0, 1.1, 1.2, 0.9, 1.0], MIXED, "does worse than the plain solver"),
        (BETTER[:4], BETTER[:4], "Too few runs to tell"),
    ],
)
def test_the_conclusion_claims_no_more_than_both_comparisons(against_plain, against_control, words):
    control = comparison(against_control, against="plain at the mean factor")
    assert words in conclusion(comparison(against_plain), control)


def test_the_note_names_method_correction_and_family():
    note = confidence_note(6, 5)
    for words in ("Student's t", "paired by seed", "Bonferroni", "99.17 %", "all 6 comparisons", "5 seeds"):
        assert words in note


def test_differences_are_written_with_their_sign():
    assert (signed(0.5), signed(-0.5), signed(0.0)) == ("+0.50", "−0.50", "+0.00")


def test_wrong_use_says_what_is_allowed():
    with pytest.raises(ValueError, match="at least two"):
        student_interval((1.0,), 0.95)
    with pytest.raises(ValueError, match=r"confidence=1\.0"):
        student_interval((1.0, 2.0), 1.0)
    with pytest.raises(ValueError, match="family=0"):
        comparison(BETTER, family=0)
