"""Equation 9 of Singh et al. 2015."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import layerwise
import reference
from layerwise.rules import LayerAdaptive

from .samples import (
    SEEDS,
    TOLERANCE,
    assert_close,
    factors_of,
    gradients_of,
    layers_of,
    network,
    norms,
    one_group,
)

UNIT_VALUES = {
    1e-6: 14.815512,
    1e-3: 7.908755,
    1e-2: 5.615121,
    0.1: 3.397895,
    1.0: 1.693147,
    10.0: 1.095310,
    100.0: 1.009950,
}
NORMS = st.floats(1e-30, 1e12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("log_base", [math.e, 2, 10.0], ids=["base_e", "base_2", "base_10"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_factors_are_those_of_the_reference(seed: int, log_base: float, dtype: torch.dtype) -> None:
    model = network(seed, dtype)
    layers = layers_of(model)
    factors = factors_of(LayerAdaptive(log_base), layers, one_group(model))
    assert_close(factors, reference.layer_adaptive(gradients_of(layers), log_base), TOLERANCE[dtype])


def test_factors_of_a_large_float32_layer_are_those_of_the_reference() -> None:
    layer = nn.Linear(700, 600)
    generator = torch.Generator().manual_seed(5)
    for p in layer.parameters():
        p.grad = 1e-4 * torch.randn(p.shape, generator=generator)
    layers = layers_of(nn.Sequential(layer))
    factors = factors_of(LayerAdaptive(), layers, one_group(layer))
    assert_close(factors, reference.layer_adaptive(gradients_of(layers)), 1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_half_precision_gradients_are_measured_in_float32(seed: int) -> None:
    layer = nn.Linear(40, 40).to(torch.float16)
    generator = torch.Generator().manual_seed(seed)
    for p in layer.parameters():
        p.grad = (300 * torch.randn(p.shape, generator=generator)).half()  # whose squares overflow float16
    layers = layers_of(nn.Sequential(layer))
    factors = factors_of(LayerAdaptive(), layers, one_group(layer))
    assert_close(factors, reference.layer_adaptive(gradients_of(layers)), 1e-6)


@pytest.mark.parametrize(("norm", "factor"), UNIT_VALUES.items(), ids=lambda value: f"{value:g}")
def test_unit_values_of_equation_9(norm: float, factor: float) -> None:
    gradient = np.array([0.6 * norm, 0.8 * norm])
    assert reference.layer_adaptive([[gradient]])[0] == pytest.approx(factor, abs=5e-7)

    model = nn.Linear(1, 1).double()
    model.weight.grad = torch.tensor([[gradient[0]]])
    model.bias.grad = torch.tensor([gradient[1]])
    layers = layers_of(model)
    assert factors_of(LayerAdaptive(), layers, one_group(model)).item() == pytest.approx(factor, abs=5e-7)


@settings(deadline=None)
@given(st.lists(NORMS, min_size=2, max_size=8))
def test_factor_is_above_one_and_falls_as_the_norm_grows(values: list[float]) -> None:
    ordered = sorted(values)
    factors = LayerAdaptive().factors(norms(*ordered), {})[0].tolist()
    assert all(factor > 1 for factor in factors)
    for n, following, f, next_f in zip(ordered, ordered[1:], factors, factors[1:], strict=False):
        assert next_f < f if following > n * (1 + 1e-3) else next_f <= f


@settings(deadline=None)
@given(st.lists(NORMS, min_size=2, max_size=8))
def test_order_of_the_layers_step_sizes_is_kept(values: list[float]) -> None:
    ordered = sorted(values)
    steps = (torch.tensor(ordered, dtype=torch.float64) * LayerAdaptive().factors(norms(*ordered), {})[0]).tolist()
    for n, following, step, next_step in zip(ordered, ordered[1:], steps, steps[1:], strict=False):
        assert next_step > step if following > n * (1 + 1e-9) else next_step >= step * (1 - 1e-12)


@settings(deadline=None)
@given(st.lists(NORMS, min_size=1, max_size=8), st.floats(1.01, 1e6))
def test_another_base_divides_the_logarithm(values: list[float], base: float) -> None:
    natural = LayerAdaptive().factors(norms(*values), {})[0] - 1
    other = LayerAdaptive(base).factors(norms(*values), {})[0] - 1
    np.testing.assert_allclose(other.numpy() * math.log(base), natural.numpy(), rtol=1e-6, atol=1e-12)


def test_weight_and_bias_make_one_norm() -> None:
    model = nn.Linear(1, 1).double()
    model.weight.grad, model.bias.grad = torch.full((1, 1), 3.0).double(), torch.full((1,), 4.0).double()
    assert factors_of(LayerAdaptive(), layers_of(model), one_group(model)).item() == 1 + math.log1p(1 / 5)


def test_weight_decay_is_not_in_the_norm() -> None:
    model = network(0)
    plain = factors_of(LayerAdaptive(), layers_of(model), one_group(model))
    decayed = factors_of(LayerAdaptive(), layers_of(model), one_group(model, weight_decay=1.0))
    assert torch.equal(plain, decayed)


def broken(kind: str) -> nn.Sequential:
    """A network whose second layer has a gradient without a norm, and the last one an ordinary gradient."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)).double()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for p in model[1].parameters():
        p.grad = None if kind == "missing" else torch.full_like(p, {"zero": 0.0}.get(kind, float(kind)))
    return model


@pytest.mark.parametrize("kind", ["0", "missing", "nan", "inf", "-inf"])
def test_gradient_without_a_norm_gives_factor_one_and_leaves_the_others(kind: str) -> None:
    model = broken(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    before = model[1].weight.detach().clone()
    layers = layers_of(model)
    expected = reference.layer_adaptive(gradients_of(layers))
    optimizer.step()
    factors = adapter.get_last_factors()
    assert factors["1"] == 1.0
    np.testing.assert_allclose(list(factors.values()), expected, rtol=1e-12)
    if kind == "0":  # the optimizer's own decay, neither NaN nor scaled
        assert torch.allclose(model[1].weight, 0.95 * before, rtol=1e-15, atol=0)


def test_factor_follows_equation_9_down_to_the_smallest_normal_norm() -> None:
    smallest = 2.0**-126  # of float32, in which gradients come
    factor = LayerAdaptive().factors(norms(smallest), {})[0].item()
    assert factor == pytest.approx(1 + 126 * math.log(2), rel=1e-12)


@pytest.mark.parametrize("base", [1, 0.5, 0, -2.0, math.inf, math.nan, "e", None], ids=repr)
def test_base_that_is_no_number_above_one_is_refused(base: object) -> None:
    message = rf"log_base={re.escape(repr(base))} must be a finite number above 1, such as math\.e or 10"
    with pytest.raises(ValueError, match=message):
        LayerAdaptive(base)


def test_the_paper_takes_modules_the_gradient_and_scaled_decay() -> None:
    model = network(0)
    adapter = layerwise.LayerwiseLR(torch.optim.SGD(model.parameters(), momentum=0.9), LayerAdaptive(), model)
    assert adapter.layers == ["first", "norm", "second", "third", "head"]
    assert adapter.apply == "gradient"
    assert "decay='scaled'" in repr(adapter)
