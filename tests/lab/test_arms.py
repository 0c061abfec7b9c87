import math
from dataclasses import replace

import polars
import pytest
from lab_helpers import series_of, tiny_plan

from layerwise import rules
from layerwise.lab.errors import UsageError
from layerwise.lab.experiments.controls import displaced, recorded_factors
from layerwise.lab.experiments.plan import CONTROLS, Arm
from layerwise.lab.experiments.rules import make_rule, phases


def test_rules_are_made_of_names_and_numbers():
    assert make_rule(None, 0) is None
    assert make_rule({"name": "LARS", "trust_coefficient": 0.01}, 0) == rules.LARS(trust_coefficient=0.01)
    assert make_rule({"name": "Constant", "factors": {"*": 2.0}}, 0) == rules.Constant({"*": 2.0})
    chosen = {"name": "RandomLayers", "ratio": 0.5}
    made = make_rule({"name": "GradientAmplification", "selection": chosen, "phases": [[2, True, 2.0]]}, 7)
    assert made.selection == rules.RandomLayers(0.5, seed=7)
    shuffled = {"name": "ShuffledLayers", "of": {"name": "Directionality", "threshold": 1.0}}
    made = make_rule({"name": "GradientAmplification", "selection": shuffled, "phases": [[2, True, 2.0]]}, 3)
    assert made.selection == rules.ShuffledLayers(rules.Directionality(threshold=1.0), seed=3)


@pytest.mark.parametrize(
    ("specification", "words"),
    [
        ({"name": "Lars"}, "rule name 'Lars': use one of AdaGC, .*BackMatching"),
        ({"name": "os.system"}, "use one of"),
        ({"name": "LARS", "eta": 1}, "rule LARS: .*eta"),
        ({"name": "GradientAmplification", "phases": [[2, True]]}, "selection"),
        ({"name": "GradientAmplification", "selection": {"name": "Some"}, "phases": []}, "selection name 'Some'"),
        ({"name": "LARS", "trust_coefficient": -1.0}, "trust_coefficient"),
    ],
)
def test_a_rule_that_cannot_be_made_is_named(specification, words):
    with pytest.raises(UsageError, match=words):
        make_rule(specification, 0)


def test_phases_keep_their_shares():
    assert phases("params_1", 150) == [[50, False, 2.0], [100, True, 2.0], [130, True, 2.0], [150, False, 2.0]]
    assert phases("params_2", 15) == [[1, False, 2.0], [10, True, 2.0], [14, True, 2.0], [15, False, 2.0]]
    assert phases([[1, True, 3.0]], None) == [[1, True, 3.0]]
    with pytest.raises(UsageError, match="too few"):
        phases("params_2", 5)
    with pytest.raises(UsageError, match="params_3"):
        phases("params_3", 150)
    with pytest.raises(UsageError, match="count epochs"):
        phases("params_1", None)


def test_a_control_names_its_method_and_only_a_control_does():
    with pytest.raises(UsageError, match="'of'"):
        Arm(name="a", words="a", control="mean factor")
    with pytest.raises(UsageError, match="'of'"):
        Arm(name="a", words="a", of="b")
    with pytest.raises(UsageError, match="control='cold factors'"):
        Arm(name="a", words="a", control="cold factors", of="b")


@pytest.mark.parametrize("count", [2, 3, 4, 41])
def test_no_layer_keeps_its_own_factor(count):
    names = [f"layer{number}" for number in range(count)]
    for seed in range(20):
        drawn = displaced(names, seed)
        assert sorted(drawn) == sorted(drawn.values()) == sorted(names)
        assert all(name != source for name, source in drawn.items())
    assert displaced(names, 1) == displaced(names, 1)
    assert displaced(["alone"], 0) == {"alone": "alone"}


def test_controls_repeat_what_they_say(carried_out):
    plan = tiny_plan()
    outcome = carried_out(plan)
    assert outcome.complete
    for subject in ("sgd", "nag", "adagrad"):
        method = outcome.results.records[subject, "layer-adaptive", 0]
        factors = method.metrics().filter(polars.col("quantity") == "factor")
        by_layer = {
            name: part.sort("step")["value"].to_list()
            for (name,), part in factors.partition_by("layer", as_dict=True).items()
        }
        assert all(len(values) == 8 for values in by_layer.values())
        mean = math.fsum(sum(values) for values in by_layer.values()) / (8 * 4)

        control = outcome.results.records[subject, "mean-factor", 0]
        assert control.configuration.source == method.configuration.identity
        assert control.configuration.apply == "lr"
        assert control.configuration.rule["factors"]["*"] == pytest.approx(mean, rel=1e-12)

        frozen = outcome.results.records[subject, "frozen", 0].configuration.rule["factors"]
        assert {name: sum(values) / 8 for name, values in by_layer.items()} == pytest.approx(frozen)

        shuffled = outcome.results.records[subject, "shuffled", 0]
        sources = shuffled.configuration.rule["layers"]
        repeated = shuffled.metrics().filter(polars.col("quantity") == "factor")
        for (name,), part in repeated.partition_by("layer", as_dict=True).items():
            assert part.sort("step")["value"].to_list() == pytest.approx(by_layer[sources[name]], rel=1e-6)
        assert recorded_factors(method, sources)[3] == {name: by_layer[sources[name]][3] for name in sources}


def test_factors_that_were_not_recorded_at_every_update_cannot_be_repeated(carried_out):
    plan = tiny_plan(factors_every=2)
    chain = plan.chains()[1]
    runs = [run for run in chain if run.arm.name in ("layer-adaptive", "shuffled")]
    assert [run.arm.name for run in runs] == ["layer-adaptive", "shuffled"]
    outcome = carried_out(replace(plan, runs=tuple(runs)))
    assert len(outcome.results.records) == 1
    (record,) = outcome.results.records.values()
    with pytest.raises(UsageError, match="factors_every = 1"):
        recorded_factors(record, displaced(record.summary["layers"], 0))


def test_the_mean_factor_is_a_global_rate_to_the_bit(carried_out):
    """A rate times a factor is what Constant("*") gives: the control is plain training at another rate."""
    outcome = carried_out(tiny_plan())
    control = outcome.results.records["sgd", "mean-factor", 0]
    factor = control.configuration.rule["factors"]["*"]
    plain = tiny_plan(rate=0.01 * factor)
    (run,) = [run for run in plain.runs if run.key == ("sgd", "plain", 0)]
    alone = carried_out(replace(plain, runs=(run,)))
    theirs = alone.results.records["sgd", "plain", 0]
    losses = [value for _, value in series_of(control, "training_loss")]
    assert [value for _, value in series_of(theirs, "training_loss")] == pytest.approx(losses, rel=1e-5)


def test_the_controls_are_those_of_the_design_and_of_the_methods():
    assert CONTROLS == (
        "mean factor",
        "weighted mean factor",
        "frozen factors",
        "first factors",
        "reversed factors",
        "mean factor of each role",
        "first factor of each shape",
        "shuffled layers",
        "shuffled within shapes",
    )
