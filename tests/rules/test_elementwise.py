"""Rules written once for numbers and for tensors: both give the same."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import layerwise
from layerwise.adapter import MOST_NUMBERS
from layerwise.rules import LARC, LARS, ElementwiseRule, LayerAdaptive
from layerwise.rules.base import finite_or_one
from layerwise.rules.elementwise import is_elementwise, log1p, minimum, where
from layerwise.rules.state import State
from layerwise.statistics import Statistics

RULES = {
    "LayerAdaptive": LayerAdaptive(),
    "LayerAdaptive_base_10": LayerAdaptive(10),
    "LARS": LARS(),
    "LARS_without_eps": LARS(eps=0),
    "LARC": LARC(),
    "LARC_without_eps": LARC(eps=0),
    "LARC_scaled": LARC(clip=False),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
EDGES = [0.0, 5e-324, 1e-300, 1.0, 1e300, math.inf, math.nan]


class Inverse(ElementwiseRule):
    """f_l = 1 / ‖g_l‖²."""

    def factor(self, gradient_norm: Any) -> Any:
        return 1 / gradient_norm**2


def assert_same(rule: ElementwiseRule, columns: dict[str, list[float]]) -> None:
    """Both ways give the same numbers, once what is not finite counts as 1."""
    tensors = {name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()}
    expected = finite_or_one(rule.factors(Statistics(**tensors), {})[0])
    numbers = finite_or_one(torch.tensor(rule.numbers(columns), dtype=torch.float64))
    torch.testing.assert_close(numbers, expected, rtol=1e-14, atol=0)


@every_rule
@given(st.data())
@settings(deadline=None, max_examples=60)
def test_numbers_and_tensors_give_the_same_factors(rule: ElementwiseRule, data: st.DataObject) -> None:
    norms = st.lists(st.floats(1e-12, 1e12) | st.sampled_from(EDGES), min_size=4, max_size=4)
    assert_same(rule, {name: data.draw(norms, name) for name in rule.needs})


@pytest.mark.parametrize("norm", EDGES)
def test_numbers_that_python_cannot_form_are_those_of_a_tensor(norm: float) -> None:
    assert_same(Inverse(), {"gradient_norm": [2.0, norm, 0.5]})
    assert Inverse().numbers({"gradient_norm": [2.0, norm, 0.5]})[::2] == [0.25, 4.0]


@pytest.mark.parametrize("x", [-math.inf, -2.0, -1.0, -0.5, 0.0, 1e-20, 3.0, math.inf, math.nan])
def test_the_functions_take_numbers_and_tensors_alike(x: float) -> None:
    tensor = torch.tensor([x], dtype=torch.float64)
    functions = [log1p, lambda y: minimum(y, 1.0), lambda y: where(y > 0, y, 7.0)]
    for function in functions:
        assert function(x) == pytest.approx(function(tensor).item(), rel=1e-15, nan_ok=True)


def steps(model: nn.Module, rule: Any, count: int = 3, **options: Any) -> tuple[list[dict[str, float]], list[Tensor]]:
    """Return the factors of some steps, and the weights after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1, **options)
    adapter = layerwise.LayerwiseLR(optimizer, rule, model)
    generator, seen = torch.Generator().manual_seed(1), []
    for _ in range(count):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
        optimizer.step()
        seen.append(adapter.get_last_factors())
    return seen, [p.detach().clone() for p in model.parameters()]


def network(layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(2, 2, dtype=torch.float64) for _ in range(layers)))


@pytest.mark.parametrize("rule", [LayerAdaptive(), LARS(), LARC()], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("layers", [3, MOST_NUMBERS // 2 + 1, MOST_NUMBERS + 1])
def test_an_attached_rule_trains_alike_by_numbers_and_by_tensors(
    rule: ElementwiseRule, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    factors, weights = steps(network(layers), rule)
    monkeypatch.setattr("layerwise.adapter.MOST_NUMBERS", 0)
    expected_factors, expected_weights = steps(network(layers), rule)
    for step, expected in zip(factors, expected_factors, strict=True):
        assert step == pytest.approx(expected, rel=1e-14)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-12, atol=0)


def test_a_subclass_with_factors_of_its_own_is_asked_for_them() -> None:
    class Doubled(LayerAdaptive):
        def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
            factors, state = super().factors(statistics, state)
            return 2 * factors, state

    assert not is_elementwise(Doubled())
    plain, _ = steps(network(3), LayerAdaptive(), count=1)
    doubled, _ = steps(network(3), Doubled(), count=1)
    assert doubled[0] == pytest.approx({name: 2 * factor for name, factor in plain[0].items()}, rel=1e-14)


class Inconsistent(ElementwiseRule):
    """What φ must not be; `kind` says which."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.needs: Any = {"gradient_norm", "weight_norm"} if kind == "no order" else ("gradient_norm",)

    def factor(self, *statistics: Any) -> Any:
        if self.kind == "branch":
            return 1 / statistics[0] if statistics[0] < 1 else 1 / statistics[0] ** 2
        if self.kind == "a function of tensors":
            return torch.sqrt(1 / statistics[0])
        return 2.0


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no order", "must be a tuple"),
        ("branch", "cannot take tensors"),
        ("constant", "not one factor each"),
        (
            "a function of tensors",
            r"cannot take the numbers of one layer .*sqrt.*; write it with operators \(x \*\* 0\.5",
        ),
    ],
)
def test_a_rule_that_works_only_as_numbers_or_only_as_tensors_is_refused_when_attached(kind: str, words: str) -> None:
    model = network(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=words):
        layerwise.LayerwiseLR(optimizer, Inconsistent(kind), model)
    assert not optimizer._optimizer_step_pre_hooks


def test_a_power_that_python_makes_complex_is_that_of_a_tensor() -> None:
    class Root(ElementwiseRule):
        def factor(self, gradient_norm: Any) -> Any:
            return (1 - gradient_norm) ** 0.5

    assert_same(Root(), {"gradient_norm": [0.5, 4.0, 0.0]})
    assert math.isnan(Root().numbers({"gradient_norm": [0.5, 4.0]})[1])


def test_factors_set_on_the_instance_are_asked_for() -> None:
    rule = Inverse()
    rule.factors = lambda statistics, state: (torch.full((3,), 7.0), state)
    factors, _ = steps(network(3), rule, count=1)
    assert list(factors[0].values()) == [7.0] * 3


def test_the_default_device_does_not_matter() -> None:
    for place in ("update", "lr"):
        model = network(3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        adapter = layerwise.LayerwiseLR(optimizer, Inverse(), model, apply=place)
        for i, p in enumerate(model.parameters()):
            p.grad = torch.zeros_like(p) if i < 2 else torch.ones_like(p)
        with torch.device("meta"):
            optimizer.step()
        assert adapter.get_last_factors() == pytest.approx({"0": 1.0, "1": 1 / 6, "2": 1 / 6})


def test_a_layer_whose_norm_is_zero_changes_no_bit_of_another_layers_factor() -> None:
    norms = [0.1 * (i + 1) for i in range(200)]
    alone = LayerAdaptive().numbers({"gradient_norm": norms})
    assert LayerAdaptive().numbers({"gradient_norm": [*norms, 0.0]})[:-1] == alone


def test_factors_are_floats_also_where_a_rule_returns_whole_numbers() -> None:
    class Whole(ElementwiseRule):
        def factor(self, gradient_norm: Any) -> Any:
            return where(gradient_norm > 1, gradient_norm, 2)

    for rule in (LARC(trust_coefficient=1e9), Whole()):
        factors, _ = steps(network(3), rule, count=1)
        assert {type(factor) for factor in factors[0].values()} == {float}


def test_a_rule_that_cannot_divide_by_some_number_is_taken() -> None:
    class Pole(ElementwiseRule):
        def factor(self, gradient_norm: Any) -> Any:
            return 1 / (gradient_norm - 2)

    assert Pole().numbers({"gradient_norm": [3.0, 2.5]}) == [1.0, 2.0]
    factors, _ = steps(network(3), Pole(), count=1)
    assert len(factors[0]) == 3


class Noise(ElementwiseRule):
    """The mean and the deviation of a layer's gradient, which are no numbers on the CPU."""

    needs = ("gradient_mean", "gradient_std")

    def factor(self, gradient_mean: Any, gradient_std: Any) -> Any:
        return 1 + gradient_mean**2 / (gradient_mean**2 + gradient_std**2)


def test_moments_of_gradients_are_those_of_stepping_in_backward_too() -> None:
    weights, factors = [], []
    for attach in (layerwise.LayerwiseLR, layerwise.step_in_backward):
        model = network(3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        adapter = (
            attach(optimizer, Noise(), model) if attach is layerwise.LayerwiseLR else attach(optimizer, model, Noise())
        )
        for step in range(3):
            optimizer.zero_grad()
            model(torch.full((4, 2), 1.0 + step, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
        factors.append(adapter.get_last_factors())
        weights.append([p.detach() for p in model.parameters()])
    assert all(1 < factor < 2 for factor in factors[0].values())
    assert factors[0] == pytest.approx(factors[1], rel=1e-14)
    torch.testing.assert_close(*weights, rtol=1e-14, atol=0)


def test_a_layer_without_a_gradient_has_no_part_in_the_mean_of_factors_of_moments() -> None:
    model = network(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    adapter = layerwise.LayerwiseLR(optimizer, Noise(), model, normalize="mean")
    for number, p in enumerate(model.parameters()):
        p.grad = torch.zeros_like(p) if number < 2 else torch.arange(p.numel(), dtype=p.dtype).view_as(p) + number
    optimizer.step()
    factors = adapter.get_last_factors()
    assert factors.pop("0") == 1
    assert sum(factors.values()) / 2 == pytest.approx(1, rel=1e-14)
