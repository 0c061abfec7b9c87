"""What must hold for every rule."""

from __future__ import annotations

import copy
import doctest
import importlib
import inspect
import io
import math
import pickle
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import layerwise
import reference
from layerwise import rules
from layerwise.rules import ElementwiseRule, Rule
from layerwise.statistics import NEEDS
from rule_cases import RULES, Network

from .samples import (
    SEEDS,
    TOLERANCE,
    assert_close,
    bits,
    factors_of,
    gradients_of,
    layers_of,
    measured,
    network,
    one_group,
    quadratic_step,
    weights_of,
)

NAMES = ["first", "norm", "second", "third", "head"]
CLASSES = {
    name: kind
    for name, kind in vars(rules).items()
    if inspect.isclass(kind) and issubclass(kind, Rule) and kind not in (Rule, ElementwiseRule)
}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
}


@pytest.fixture(params=RULES)
def rule(request: pytest.FixtureRequest) -> Rule:
    return RULES[request.param].make(NAMES)


def attach(rule: Rule, model: nn.Module, optimizer: torch.optim.Optimizer) -> layerwise.LayerwiseLR:
    place = "gradient" if rule.needs_scale else "auto"
    return layerwise.LayerwiseLR(optimizer, rule, model, layers="module", exclude=None, apply=place)


def through_memory(value: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(value)


def through_a_file(value: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.pairwise
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_factors_are_one_finite_number_a_layer(
    request: pytest.FixtureRequest, rule: Rule, seed: int, dtype: torch.dtype
) -> None:
    model = network(seed, dtype)
    layers = layers_of(model)
    state = rule.init(layers, torch.device("cpu"))
    factors, _ = rule.factors(measured(layers, rule.needs, one_group(model)), state)
    assert (factors.shape, factors.dtype) == ((len(layers),), torch.float64)
    assert torch.isfinite(factors).all()
    freezes = RULES[request.node.callspec.params["rule"]].freezes
    assert (factors >= 0).all() if freezes else (factors > 0).all()


def test_rule_changes_neither_its_state_nor_the_network(rule: Rule) -> None:
    model = network(0)
    before, gradients = bits(model), [p.grad.clone() for p in model.parameters()]
    layers = layers_of(model)
    statistics = measured(layers, rule.needs, one_group(model))
    state = rule.init(layers, torch.device("cpu"))
    first, _ = rule.factors(statistics, state)
    again, _ = rule.factors(statistics, state)
    assert torch.equal(first, again)
    assert bits(model) == before
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_statistics_outside_its_needs_are_not_read(rule: Rule) -> None:
    model = network(0)
    layers = layers_of(model)
    state = rule.init(layers, torch.device("cpu"))
    asked, _ = rule.factors(measured(layers, rule.needs, one_group(model)), state)
    everything, _ = rule.factors(measured(layers, NEEDS, one_group(model)), state)
    assert torch.equal(asked, everything)


def test_scaled_gradients_are_measured_unscaled(rule: Rule) -> None:
    model = network(0)
    layers = layers_of(model)
    state = rule.init(layers, torch.device("cpu"))
    expected, _ = rule.factors(measured(layers, rule.needs, one_group(model)), state)
    for p in model.parameters():
        p.grad *= 1024.0
    scaled = measured(layers, rule.needs, one_group(model), 1024.0)
    torch.testing.assert_close(rule.factors(scaled, state)[0], expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("gradient", [0.0, math.nan, None], ids=["zero", "nan", "missing"])
def test_step_without_gradients_gives_finite_factors(rule: Rule, gradient: float | None) -> None:
    model = network(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)
    adapter = attach(rule, model, optimizer)
    for p in model.parameters():
        p.grad = None if gradient is None else torch.full_like(p, gradient)
    optimizer.step()
    assert all(math.isfinite(factor) for factor in adapter.get_last_factors().values())
    if gradient is not math.nan:  # NaN gradients make NaN weights without a rule too
        assert all(math.isfinite(value) for values in bits(model) for value in values)


@pytest.mark.pairwise
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("carried", [through_memory, through_a_file])
def test_run_continues_to_the_bit_from_a_state_taken_in_the_middle(
    rule: Rule, optimizer: str, carried: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    model = network(1)
    first = OPTIMIZERS[optimizer](model)
    adapter = attach(rule, model, first)
    for step in range(3):
        quadratic_step(model, first, step)
    adapter.end_epoch()
    saved = carried({"model": model.state_dict(), "optimizer": first.state_dict(), "adapter": adapter.state_dict()})
    for step in range(3, 7):
        quadratic_step(model, first, step)

    fresh = network(2)
    second = OPTIMIZERS[optimizer](fresh)
    resumed = attach(rule, fresh, second)
    fresh.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["adapter"])
    assert resumed.epoch == 2
    for step in range(3, 7):
        quadratic_step(fresh, second, step)
    assert resumed.get_last_factors() == adapter.get_last_factors()
    assert bits(fresh) == bits(model)


def test_rows_have_factors_or_are_refused(rule: Rule) -> None:
    model = network(0)
    optimizer = OPTIMIZERS["SGD"](model)
    if not rule.takes_units():
        with pytest.raises(ValueError, match="use layers='parameter'"):
            layerwise.LayerwiseLR(optimizer, rule, model, layers="unit")
        return
    adapter = layerwise.LayerwiseLR(optimizer, rule, model, layers="unit", exclude=None)
    before = bits(model)
    quadratic_step(model, optimizer, 0)
    assert all(math.isfinite(factor) for factor in adapter.get_last_factors().values())
    assert bits(model) != before


def test_saved_state_does_not_change_with_later_steps(rule: Rule) -> None:
    model = network(0)
    optimizer = OPTIMIZERS["SGD"](model)
    adapter = attach(rule, model, optimizer)
    quadratic_step(model, optimizer, 0)
    saved = adapter.state_dict()
    kept = through_a_file(saved)
    quadratic_step(model, optimizer, 1)
    assert repr(saved) == repr(kept)


def test_a_copy_and_a_pickle_of_a_rule_give_its_factors(rule: Rule) -> None:
    model = network(0)
    layers, groups = layers_of(model), one_group(model)
    expected = factors_of(rule, layers, groups)
    for twin in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        assert torch.equal(factors_of(twin, layers, groups), expected)
        assert repr(twin) == repr(rule)


def test_the_repr_of_a_rule_names_it(request: pytest.FixtureRequest, rule: Rule) -> None:
    assert repr(rule).startswith(request.node.callspec.params["rule"].partition("_")[0])


@pytest.mark.pairwise
@pytest.mark.parametrize("name", [name for name, case in RULES.items() if case.reference])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_first_factors_are_those_of_the_reference(name: str, seed: int, dtype: torch.dtype) -> None:
    model = network(seed, dtype)
    layers = layers_of(model)
    known = Network(
        NAMES,
        gradients_of(layers),
        weights_of(layers),
        decays=[[0.01] * len(layer.parameters) for layer in layers],
        rates=[0.1] * len(layers),
    )
    factors = factors_of(RULES[name].make(NAMES), layers, one_group(model, weight_decay=0.01))
    assert_close(factors, RULES[name].reference(known), TOLERANCE[dtype])


@pytest.mark.parametrize("name", CLASSES)
def test_every_rule_is_exported_and_has_a_row_and_a_reference(name: str) -> None:
    assert name in rules.__all__
    rows = [case for case in RULES.values() if type(case.make(NAMES)) is CLASSES[name]]
    assert rows, f"add a row for {name} to tests/rule_cases.py"
    modules = {module for _, module, _ in pkgutil.iter_modules(reference.__path__)}
    assert any(case.reference for case in rows) or CLASSES[name].__module__.rpartition(".")[2] in modules


@pytest.mark.parametrize("name", [*CLASSES, "chain", "bounds"])
def test_the_docstring_of_every_rule_has_its_equation_its_parts_and_an_example(name: str) -> None:
    text = inspect.getdoc(getattr(rules, name)) or ""
    assert "f_l" in text or "g_l" in text
    if name in CLASSES:
        assert "\nStart: `LayerwiseLR(" in text
    for heading in ("Args:", "Raises:", "Example:"):
        assert f"\n{heading}\n" in text, heading
    module = importlib.import_module(getattr(rules, name).__module__)
    tests = [one for one in doctest.DocTestFinder().find(module) if one.name == f"{module.__name__}.{name}"]
    assert [one for one in tests if one.examples]
    assert all(doctest.DocTestRunner().run(one).failed == 0 for one in tests)
