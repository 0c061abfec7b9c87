import math

import numpy as np
import pytest
from scipy import stats

from layerwise.lab.amplification.training import ARMS

ACCURACIES = {
    "plain": [40.0, 41.0, 42.0, 39.5, 40.5],
    "random": [40.2, 40.9, 42.3, 39.4, 40.6],
    "G": [42.1, 43.0, 44.2, 41.4, 42.6],
    "G_prime": [40.0, 41.0, 42.0, 39.5, 40.5],
    "all": [40.1, 41.1, 42.2, 39.3, 40.7],
}


@pytest.fixture
def results(make_outcome):
    return make_outcome(ACCURACIES).results


def finding(results, arm):
    return next(found for found in results.findings() if found.arm == arm)


def test_the_last_epoch_is_the_primary_result_and_the_best_the_secondary(results):
    for arm in ARMS:
        last, best = results.last(arm), results.best_epoch(arm)
        assert (last.mean, last.sd) == pytest.approx((np.mean(ACCURACIES[arm]), np.std(ACCURACIES[arm], ddof=1)))
        assert (best.mean, best.count) == (pytest.approx(last.mean + 0.25), 5)
        assert results.best_run(arm) == max(ACCURACIES[arm])


def test_the_intervals_are_students_on_paired_differences_with_bonferroni_over_seven(results):
    assert results.family == 7
    for arm in ("random", "G"):
        for comparison, against in zip(finding(results, arm).comparisons, ("plain", "all"), strict=True):
            differences = np.subtract(ACCURACIES[arm], ACCURACIES[against])
            expected = stats.ttest_1samp(differences, 0.0).confidence_interval(1 - 0.05 / 7)
            assert (comparison.low, comparison.high) == pytest.approx((expected.low, expected.high))
            assert comparison.mean == pytest.approx(differences.mean())


def test_a_higher_accuracy_is_better(results):
    found = finding(results, "G")
    assert [comparison.outcome for comparison in found.comparisons] == ["higher accuracy"] * 2
    assert all(comparison.better and not comparison.worse for comparison in found.comparisons)
    assert found.comparisons[0].sentence.startswith("layers by G has a higher accuracy than plain (+2.06 points")
    assert found.words.startswith("The gain is more than that of amplifying every layer: it beats plain training")


def test_a_lower_accuracy_is_worse(make_outcome):
    swapped = ACCURACIES | {"plain": ACCURACIES["G"], "G": ACCURACIES["plain"]}
    found = finding(make_outcome(swapped).results, "G")
    assert found.comparisons[0].outcome == "lower accuracy"
    assert found.comparisons[0].worse
    assert found.words.startswith("It does worse than plain training.")


def test_a_gain_that_every_layer_shows_too_is_said_so(make_outcome):
    results = make_outcome(ACCURACIES | {"all": [42.0, 43.2, 44.1, 41.5, 42.5]}).results
    assert "not shown to be more than that of amplifying every layer" in finding(results, "G").words
    assert finding(results, "all").words == "A larger rate for all layers in the same epochs beats plain training."


def test_the_control_has_one_comparison(results):
    found = finding(results, "all")
    assert len(found.comparisons) == 1
    assert "do not show that a larger rate in the same epochs changes the accuracy" in found.words


def test_runs_in_which_nothing_was_chosen_are_no_evidence(results):
    found = finding(results, "G_prime")
    assert found.comparisons[0].reason == "the accuracy is the same in every pair"
    assert "No layer was ever chosen: these runs are plain training, and no evidence" in found.words
    assert results.counts("G_prime") == {4: [0] * 5, 6: [0] * 5}
    for row in results.records["G_prime", 0]["selections"][0]["layers"].values():
        row[2] = True
    assert "In 8 of 10 amplified phases no layer was chosen" in finding(results, "G_prime").words


def test_the_chosen_layers_are_counted(results):
    assert results.layer_count() == 4
    assert results.counts("random") == {4: [2] * 5, 6: [2] * 5}
    assert results.counts("plain") == {}


def test_four_seeds_show_nothing_however_clear(make_outcome):
    results = make_outcome({arm: values[:4] for arm, values in ACCURACIES.items()}).results
    for found in results.findings():
        assert found.words.startswith("Too few runs to tell")
        assert all("fewer than 5 pairs" in comparison.sentence for comparison in found.comparisons)


def test_only_seeds_that_both_arms_have_are_paired(results):
    del results.records["plain", 2]
    assert finding(results, "G").comparisons[0].seeds == (0, 1, 3, 4)
    assert finding(results, "G").comparisons[1].seeds == (0, 1, 2, 3, 4)


def test_diverged_runs_are_flagged(results):
    results.records["all", 1]["diverged_at"] = 3
    assert results.diverged("all") == 1
    assert "1 of these runs diverged" in finding(results, "G").comparisons[1].sentence
    assert "count at the accuracy" in finding(results, "G").comparisons[1].sentence


def test_no_run_at_all_makes_no_number(make_outcome):
    results = make_outcome({"plain": [1.0]}).results
    del results.records["plain", 0]
    assert (results.last("plain"), results.best_epoch("G"), results.best_run("G")) == (None, None, None)
    assert results.layer_count() is None
    assert all(found.comparisons[0].mean is None for found in results.findings())


def test_the_long_table_holds_every_number(results):
    frame = results.frame()
    assert frame.columns == ["arm", "seed", "epoch", "quantity", "layer", "value", "diverged"]
    counts = dict(frame.group_by("quantity").len().iter_rows())
    assert counts == dict.fromkeys(("accuracy", "training_loss", "share"), 25 * 8) | dict.fromkeys(
        ("directionality", "z", "selected"), 20 * 2 * 4
    )
    chosen = frame.filter((frame["arm"] == "random") & (frame["quantity"] == "selected"))["value"]
    assert math.fsum(chosen) == 5 * 2 * 2
