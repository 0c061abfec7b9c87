"""Products of rules, and rules between bounds."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import layerwise
import reference
from layerwise.rules import (
    LARS,
    BackMatching,
    Constant,
    LayerAdaptive,
    LayerDecay,
    Replay,
    Rule,
    bounds,
    chain,
    save_factors,
)
from layerwise.rules.lars import one_dimensional
from layerwise.rules.state import State
from layerwise.statistics import LayerStatistics, Statistics

from .samples import SEEDS, assert_close, factors_of, gradients_of, layers_of, network, one_group

ANY = st.floats(allow_nan=True, allow_infinity=True)
ROWS = st.integers(1, 6).flatmap(lambda n: st.lists(st.lists(ANY, min_size=n, max_size=n), min_size=1, max_size=4))


class Given(Rule):
    """Returns what it was given, and counts its steps and epochs."""

    needs = ()

    def __init__(self, values: list[float]) -> None:
        self.values = torch.tensor(values, dtype=torch.float64)

    def init(self, layers: Any, device: torch.device) -> State:
        return {"steps": 0, "epochs": 0}

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        return self.values, {**state, "steps": state["steps"] + 1}

    def end_epoch(self, state: State) -> State:
        return {**state, "epochs": state["epochs"] + 1}


def first_factors(rule: Rule) -> np.ndarray:
    return rule.factors(Statistics(), rule.init([], torch.device("cpu")))[0].numpy()


# --- chain ------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(ROWS)
def test_chain_is_the_product_and_takes_what_is_not_finite_as_one(rows: list[list[float]]) -> None:
    with np.errstate(over="ignore", under="ignore"):
        expected = reference.chain([np.array(row) for row in rows])
    np.testing.assert_allclose(first_factors(chain(*map(Given, rows))), expected, rtol=1e-12)


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3), min_size=2, max_size=4))
def test_order_and_nesting_of_a_chain_do_not_matter(rows: list[list[float]]) -> None:
    rules = [Given(row) for row in rows]
    product = first_factors(chain(*rules))
    np.testing.assert_allclose(first_factors(chain(*reversed(rules))), product, rtol=1e-12)
    np.testing.assert_allclose(first_factors(chain(rules[0], chain(*rules[1:]))), product, rtol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_chain_of_real_rules_is_the_product_of_their_references(seed: int) -> None:
    model = network(seed)
    layers = layers_of(model)
    names = [layer.name for layer in layers]
    rule = chain(LayerAdaptive(), Constant({"head": 10.0, "f*": 0.5}), LayerDecay(0.8), BackMatching())
    expected = reference.chain(
        [
            reference.layer_adaptive(gradients_of(layers)),
            reference.constant(names, {"head": 10.0, "f*": 0.5}),
            0.8 ** np.arange(4, -1, -1.0),
            factors_of(BackMatching(), layers, one_group(model)).numpy(),
        ]
    )
    assert_close(factors_of(rule, layers, one_group(model)), expected, 1e-12)


def test_chain_needs_what_its_rules_need_each_once() -> None:
    rule = chain(LayerAdaptive(), LARS(), BackMatching())
    assert rule.needs == ("gradient_norm", "weight_norm", "decay_norm", "matrix_norm", "normalisation_gain")


def test_chain_keeps_a_state_for_each_rule() -> None:
    rule = chain(Given([1.0]), Given([2.0]))
    state = rule.init([], torch.device("cpu"))
    _, state = rule.factors(Statistics(), state)
    _, state = rule.factors(Statistics(), rule.end_epoch(state))
    assert state == {"0": {"steps": 2, "epochs": 1}, "1": {"steps": 2, "epochs": 1}}


def test_chain_replays_beside_a_rule_that_adapts(tmp_path: Path) -> None:
    model = network(0)
    layers = layers_of(model)
    names = [layer.name for layer in layers]
    recorded = [dict.fromkeys(names, float(step + 1)) for step in range(3)]
    save_factors(tmp_path / "file", recorded)
    rule = chain(Replay(tmp_path / "file"), LayerAdaptive())
    measured = LayerStatistics(layers, rule.needs)
    state = rule.init(layers, torch.device("cpu"))
    adaptive = reference.layer_adaptive(gradients_of(layers))
    for step in range(5):
        factors, state = rule.factors(measured.compute(one_group(model)), state)
        assert_close(factors, adaptive * min(step + 1, 3), 1e-12)


def test_first_rule_with_a_preference_decides() -> None:
    adaptive_first, lars_first = chain(LayerAdaptive(), LARS()), chain(Constant({"*": 2.0}), LARS())
    assert (adaptive_first.default_layers, adaptive_first.default_place) == ("module", "gradient")
    assert (lars_first.default_layers, lars_first.default_place) == ("parameter", "lr")
    assert lars_first.default_exclude is adaptive_first.default_exclude is one_dimensional


def test_chain_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"chain\(\) takes at least one rule, such as chain\(LayerAdaptive\(\)"):
        chain()


@pytest.mark.parametrize("combine", [lambda x: chain(LayerAdaptive(), x), lambda x: bounds(x, 0, 1)])
def test_what_is_no_rule_is_refused(combine: Any) -> None:
    with pytest.raises(TypeError, match=r"rule=LayerAdaptive is a class; call it: LayerAdaptive\(…\)"):
        combine(LayerAdaptive)
    with pytest.raises(TypeError, match=r"rule=2\.0 \(float\) is not a layerwise\.rules\.Rule"):
        combine(2.0)


# --- bounds -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(ANY, min_size=1, max_size=6), st.floats(0, 1e6), st.floats(0, 1e6))
def test_bounds_clamp_and_take_what_is_not_finite_as_one(values: list[float], low: float, width: float) -> None:
    clamped = first_factors(bounds(Given(values), low, low + width))
    np.testing.assert_array_equal(clamped, reference.bounds(np.array(values), low, low + width))
    assert ((low <= clamped) & (clamped <= low + width)).all()


@settings(deadline=None)
@given(st.lists(ANY, min_size=1, max_size=6), st.floats(0, 10), st.floats(0, 10))
def test_bounds_twice_are_bounds_once(values: list[float], low: float, width: float) -> None:
    once = bounds(Given(values), low, low + width)
    np.testing.assert_array_equal(first_factors(bounds(once, low, low + width)), first_factors(once))


def test_upper_bound_may_be_infinite() -> None:
    np.testing.assert_array_equal(first_factors(bounds(Given([0.5, 1e300]), 1, math.inf)), [1.0, 1e300])


@pytest.mark.parametrize("seed", SEEDS)
def test_argument_of_the_adapter_is_the_same_clamp(seed: int) -> None:
    model = network(seed)
    expected = reference.bounds(reference.layer_adaptive(gradients_of(layers_of(model))), 1.5, 4.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, bounds=(1.5, 4.0))
    optimizer.step()
    np.testing.assert_allclose(list(adapter.get_last_factors().values()), expected, rtol=1e-12)


def test_bounds_keep_the_preferences_of_the_rule() -> None:
    rule = bounds(LARS(), 0, 1)
    assert (rule.default_layers, rule.default_place, rule.default_decay) == (
        "parameter",
        "gradient",
        "scaled",
    )
    assert rule.default_exclude is one_dimensional
    assert rule.needs == LARS.needs


@pytest.mark.parametrize(
    "pair", [(-0.1, 1), (2, 1), (math.nan, 1), (0, math.nan), (math.inf, math.inf), (-math.inf, 1)], ids=repr
)
def test_bounds_out_of_range_are_refused(pair: tuple[float, float]) -> None:
    message = re.escape(f"bounds={pair!r} must be two numbers (low, high) with 0 <= low <= high, such as (0.1, 10)")
    with pytest.raises(ValueError, match=message):
        bounds(LayerAdaptive(), *pair)
    with pytest.raises(ValueError, match=message):
        layerwise.LayerwiseLR(torch.optim.SGD(network(0).parameters()), LayerAdaptive(), network(0), bounds=pair)


@pytest.mark.parametrize("pair", [("0", 1), (0, None), (True, 2)], ids=repr)
def test_bounds_that_are_no_numbers_are_refused(pair: tuple[Any, Any]) -> None:
    with pytest.raises(TypeError, match=re.escape(f"bounds={pair!r} must be two numbers (low, high)")):
        bounds(LayerAdaptive(), *pair)


@pytest.mark.parametrize("pair", [1.0, (1.0,), (0, 1, 2), "01"], ids=repr)
def test_adapter_refuses_bounds_that_are_no_pair(pair: Any) -> None:
    model = network(0)
    with pytest.raises(TypeError, match=re.escape(f"bounds={pair!r} must be two numbers (low, high)")):
        layerwise.LayerwiseLR(torch.optim.SGD(model.parameters()), LayerAdaptive(), model, bounds=pair)


@pytest.mark.parametrize("saved", [{}, {"0": {}}, {"0": {}, "1": {}, "2": {}}, [{}, {}]], ids=repr)
def test_a_saved_state_of_another_number_of_rules_is_refused_and_changes_nothing(saved: Any) -> None:
    model = network(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, chain(LayerAdaptive(), LayerDecay(0.5)), model)
    adapter.end_epoch()
    before = adapter.state_dict()
    with pytest.raises(ValueError, match="does not hold a state for each of the 2 rules; attach the same"):
        adapter.load_state_dict({**before, "epoch": 7, "state": saved})
    assert adapter.state_dict() == before
