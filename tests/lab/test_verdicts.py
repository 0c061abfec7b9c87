"""What is judged of arms: their own plain arm, their controls, and their rivals."""

from __future__ import annotations

from dataclasses import replace

import pytest
from made_up import finish_plan, noise, only, outcome_of, sweep_plan, sweep_value

from layerwise.lab.errors import UsageError
from layerwise.lab.experiments import recipe
from layerwise.lab.experiments.methods import make_arms
from layerwise.lab.experiments.plan import Arm
from layerwise.lab.report.layers import factor_words
from layerwise.lab.report.page import build
from layerwise.lab.report.tables import result_table
from layerwise.lab.report.verdicts import headline, verdicts


def amplified(selection: str) -> Arm:
    return Arm(name="a", words="a", rule={"name": "GradientAmplification", "selection": {"name": selection}})


def test_what_an_arm_is_to_others_follows_from_its_rule_or_its_role():
    kinds = {arm.name: arm.kind for arm in make_arms(["amplification-G", "amplification-all", "lars", "shuffled:lars"])}
    assert kinds == {
        "plain": "plain",
        "amplification-G": "method",
        "mean-factor:amplification-G": "control",
        "amplification-all": "control",
        "mean-factor:amplification-all": "control",
        "lars": "method",
        "mean-factor:lars": "control",
        "shuffled:lars": "control",
    }
    assert {name: amplified(name).kind for name in ("AllLayers", "RandomLayers", "ShuffledLayers")} == {
        "AllLayers": "control",
        "RandomLayers": "control",
        "ShuffledLayers": "control",
    }
    assert amplified("Directionality").kind == "method"
    assert recipe.load("singh2015-figure2").plan("full").arm("plain-lower-rate").kind == "control"
    with pytest.raises(UsageError, match="role='rival' of arm 'a': use one of method, plain, control"):
        Arm(name="a", words="a", role="rival")


def test_a_method_of_another_length_is_judged_by_its_own_plain_arm(tmp_path):
    arms = ("plain", "plain-50k", "layer-adaptive-50k")
    plan = only(recipe.load("singh2015-figure1").plan("reduced", seeds=5), "sgd", *arms)
    means = {"plain": 82.0, "plain-50k": 80.0, "layer-adaptive-50k": 82.0}
    signs = {"layer-adaptive-50k": -1}

    def value(run):
        return means[run.arm.name] + signs.get(run.arm.name, 1) * noise(run.seed)

    finish_plan(plan, tmp_path, value, quantity=plan.quantity.name)
    outcome = outcome_of(plan, tmp_path, tmp_path)
    own, other = verdicts(outcome.results)
    assert [(each.words, each.against, each.first, each.answer()) for each in (own, other)] == [
        ("layer-adaptive, step at 50,000", "plain, step at 50,000", True, "YES"),
        ("layer-adaptive, step at 50,000", "plain", False, "unclear"),
    ]
    assert headline(outcome).endswith("than plain, step at 50,000, without a control to tell why.")


def test_a_group_is_compared_with_another_group_value_by_value(tmp_path):
    plan = sweep_plan("best")
    plan = only(plan, "one", *(arm.name for arm in plan.arms))
    arms = []
    for arm in plan.arms:
        against = ("plain", f"G-{arm.value:g}") if arm.group == "G′ case 1" else arm.against
        arms.append(replace(arm, against=against))
    plan = replace(plan, arms=tuple(arms))

    def value(run):
        return sweep_value(run) + (20 * noise(run.seed) if run.arm.group == "G′ case 1" else 0.0)

    finish_plan(plan, tmp_path, value, quantity="accuracy")
    found = verdicts(outcome_of(plan, tmp_path, tmp_path).results)
    told = {(verdict.words, verdict.against): (verdict.role, verdict.answer(named=True)) for verdict in found}
    assert told == {
        ("every layer", "plain"): ("plain", "YES"),
        ("G case 1", "plain"): ("plain", "YES at 1.5, no at 2.5"),
        ("G case 1", "every layer"): ("control", "YES at 1.5, no at 2.5"),
        ("G′ case 1", "plain"): ("plain", "unclear"),
        ("G′ case 1", "G case 1"): ("method", "YES at 2.5, no at 1.5"),
    }


def test_an_arm_is_compared_with_each_value_of_a_group_by_itself(tmp_path):
    plan = sweep_plan("best")
    plan = only(plan, "one", *(arm.name for arm in plan.arms))
    against = {"all": ("G-1.5", "G-2.5")}
    arms = tuple(replace(arm, against=against.get(arm.name, ())) for arm in plan.arms)
    plan = replace(plan, arms=arms)
    finish_plan(plan, tmp_path, sweep_value, quantity="accuracy")
    found = verdicts(outcome_of(plan, tmp_path, tmp_path).results)
    assert [(each.words, each.against, each.role, each.answer()) for each in found] == [
        ("every layer", "G case 1 at 1.5", "method", "no"),
        ("every layer", "G case 1 at 2.5", "method", "YES"),
    ]


def test_choosing_again_is_a_rival_of_choosing_once():
    plan = recipe.load("basodi2023-figure2").plan("full")
    others = [other for _, arm, other in plan.pairs() if arm.group == "every 2 epochs"]
    assert {other.kind for other in others} == {"plain", "method"}


def test_one_judged_value_of_a_group_is_named(tmp_path):
    plan = sweep_plan("best")
    plan = only(plan, "one", *(arm.name for arm in plan.arms))
    arms = [replace(arm, against=arm.against if arm.value in (None, 1.5) else ()) for arm in plan.arms]
    plan = replace(plan, arms=tuple(arms))
    finish_plan(plan, tmp_path, sweep_value, quantity="accuracy")
    outcome = outcome_of(plan, tmp_path, tmp_path)
    found = [each for verdict in verdicts(outcome.results) for each in verdict.split() if verdict.item == "G case 1"]
    assert [(each.words, each.against, each.answer()) for each in found] == [
        ("G case 1 at 1.5", "plain", "YES"),
        ("G case 1 at 1.5", "every layer", "YES"),
    ]
    assert "what is judged is the threshold 1.5 by itself" in build([outcome], "").html


def test_the_best_of_fewer_plain_runs_is_said_to_be_of_fewer(tmp_path):
    plan = sweep_plan("best", seeds=2)
    finish_plan(plan, tmp_path, sweep_value, quantity="accuracy")
    made = result_table(outcome_of(plan, tmp_path, tmp_path).results)
    assert made.lead.endswith(
        "Shown is the best of 2 plain runs beside best of 3 values: the more values, the higher their best by chance "
        "alone"
    )
    assert "best of 2 runs" in dict(made.sections[0][1][0].entries[0].lines)
    times = replace(plan, layout="times", quantity=sweep_plan("times", "seconds").quantity)
    lead = result_table(outcome_of(times, tmp_path, tmp_path).results).lead
    assert "of the plain arm in seconds, and so the paper's" in lead


def test_factors_have_two_decimals_and_small_ones_are_not_hidden():
    assert [factor_words(value) for value in (3.0, 2.47, 12.345, 0.0, 0.00123)] == [
        "3.00",
        "2.47",
        "12.35",
        "0.00",
        "0.00123",
    ]
