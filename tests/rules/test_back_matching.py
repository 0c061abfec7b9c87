"""The rule in the manner of back-matching."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import layerwise
import reference
from layerwise.rules import BackMatching, LayerAdaptive
from reference import back_matching as back_matching_of
from reference.back_matching import Kind

from .samples import SEEDS, TOLERANCE, assert_close, factors_of, layers_of, network, one_group


def kind_of(module: nn.Module) -> Kind:
    """What a module is to the reference."""
    weight: Any = module.weight
    array = weight.detach().double().numpy()
    if isinstance(module, nn.BatchNorm2d):
        return reference.Normalisation(array, module.running_var.double().numpy(), module.eps)
    if isinstance(module, nn.LayerNorm):
        return reference.Normalisation(array)
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d):
        return reference.TransposedConvolution(array)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return reference.Convolution(array, module.stride, module.groups)
    return reference.Dense(array) if isinstance(module, nn.Linear) else reference.Other()


def factors(model: nn.Module, activation: float = 0.5, layers: str = "module") -> Tensor:
    return factors_of(BackMatching(activation), layers_of(model, layers), one_group(model))


def gain(module: nn.Module) -> float:
    """The s of a module, read off the factor of an identity layer below it."""
    return 1 / factors(nn.Sequential(nn.Conv2d(1, 1, 1), module.double()).double(), 1.0)[0].item()


def squared_gain_backwards(module: nn.Module, inputs: Tensor) -> float:
    """‖J‖² / n_in by automatic differentiation: what an input entry gets back of a white signal's energy."""
    jacobian = torch.autograd.functional.jacobian(module, inputs)
    return float(jacobian.square().sum()) / inputs.numel()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("activation", [0.5, 1, 0.3])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_factors_are_those_of_the_reference(seed: int, activation: float, dtype: torch.dtype) -> None:
    model = network(seed, dtype)
    expected = back_matching_of([kind_of(module) for module in model.children()], activation)
    assert_close(factors(model, activation), expected, 10 * TOLERANCE[dtype])


@pytest.mark.parametrize("seed", SEEDS)
def test_chain_of_every_kind_of_layer_agrees_with_the_reference(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3, stride=3),
        nn.Conv2d(4, 6, (3, 5), stride=(1, 2), groups=2),
        nn.Conv3d(6, 3, 2, stride=(1, 2, 3)),
        nn.Linear(7, 5),
        nn.LayerNorm(5),
        nn.Linear(5, 2, bias=False),
    ).double()
    assert_close(factors(model), back_matching_of([kind_of(module) for module in model]), 1e-12)


def test_linear_layer_has_its_squared_norm_over_its_inputs() -> None:
    linear = nn.Linear(6, 4).double()
    exact = squared_gain_backwards(linear, torch.zeros(6, dtype=torch.float64))
    assert gain(linear) == pytest.approx(exact, rel=1e-12)
    assert gain(linear) == pytest.approx(linear.weight.square().sum().item() / 6, rel=1e-12)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_has_the_gain_of_its_jacobian(stride: int, groups: int) -> None:
    convolution = nn.Conv2d(
        4, 6, 3, stride=stride, groups=groups, padding=1, padding_mode="circular", bias=False
    ).double()
    exact = squared_gain_backwards(convolution, torch.zeros(1, 4, 6, 6, dtype=torch.float64))
    assert gain(convolution) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_transposed_convolution_has_the_gain_of_its_jacobian(stride: int) -> None:
    convolution = nn.ConvTranspose2d(4, 6, 3, stride=stride, bias=False).double()
    exact = squared_gain_backwards(convolution, torch.zeros(1, 4, 5, 5, dtype=torch.float64))
    assert reference.back_matching([reference.Other(), kind_of(convolution)])[0] == pytest.approx(1 / exact)
    assert gain(convolution) == pytest.approx(exact, rel=1e-12)


def test_batch_normalisation_has_the_gain_of_its_running_statistics() -> None:
    norm = nn.BatchNorm2d(3).double().eval()
    norm.weight.data = torch.tensor([0.5, -2.0, 1.0]).double()
    norm.running_var = torch.tensor([4.0, 0.25, 1.0]).double()
    exact = squared_gain_backwards(norm, torch.zeros(1, 3, 2, 2, dtype=torch.float64))
    assert gain(norm) == pytest.approx(exact, rel=1e-12)
    assert gain(norm) == pytest.approx((0.5**2 / 4 + 4 / 0.25 + 1) / 3, rel=1e-4)


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.BatchNorm1d(3, track_running_stats=False)],
    ids=["LayerNorm", "GroupNorm", "BatchNorm1d_without_statistics"],
)
def test_normalisation_without_running_statistics_has_the_mean_square_of_its_gain(norm: nn.Module) -> None:
    norm.weight.data = torch.tensor([0.5, -2.0, 1.0])
    assert gain(norm) == pytest.approx((0.25 + 4 + 1) / 3, rel=1e-12)


def test_running_statistics_are_followed_as_they_change() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).double()
    layers, rule = layers_of(model), BackMatching(1.0)
    before = factors_of(rule, layers, one_group(model))[0].item()
    model[1].running_var.fill_(9.0)
    assert factors_of(rule, layers, one_group(model))[0].item() == pytest.approx(9 * before, rel=1e-4)


@pytest.mark.parametrize("activation", [0.5, 0.25, 1])
def test_one_activation_lies_between_two_weight_layers(activation: float) -> None:
    model = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(4)]).double()
    for layer in model:
        layer.weight.data = torch.eye(4).double()  # s = 1 without the activations
    expected = [activation**-above for above in (3, 2, 1, 0)]
    assert factors(model, activation).tolist() == pytest.approx(expected, rel=1e-12)


def test_no_activation_lies_below_the_first_weight_layer() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)).double()
    for linear in (model[1], model[2]):
        linear.weight.data = torch.eye(4).double()
    assert factors(model).tolist() == pytest.approx([2, 2, 1], rel=1e-12)


def test_normalisation_between_weight_layers_adds_no_activation() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)).double()
    for linear in (model[0], model[2]):
        linear.weight.data = torch.eye(4).double()
    assert factors(model).tolist() == pytest.approx([2, 2, 1], rel=1e-12)


def test_top_layer_has_factor_one() -> None:
    for seed in SEEDS:
        assert factors(network(seed))[-1] == 1.0


def test_layer_of_zero_weight_has_gain_one() -> None:
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)]).double()
    model[2].weight.data.zero_()
    expected = back_matching_of([kind_of(layer) for layer in model])
    assert np.isfinite(expected).all()
    assert_close(factors(model), expected, 1e-12)


@pytest.mark.parametrize("broken", [float("inf"), float("nan"), 1e200])
def test_a_layer_whose_weight_is_not_finite_does_not_stop_those_below_it(broken: float) -> None:
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)]).double()
    model[2].weight.data[0, 0] = broken
    with np.errstate(over="ignore"):
        expected = back_matching_of([kind_of(layer) for layer in model])
    assert (expected > 0).all()
    assert_close(factors(model), expected, 1e-12)


def test_normalisation_of_zero_gain_has_gain_one() -> None:
    """As after the usual start of a residual branch, whose last normalisation has γ = 0."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)).double()
    model[1].weight.data.zero_()
    assert_close(factors(model), back_matching_of([kind_of(layer) for layer in model]), 1e-12)


def test_learned_slope_of_an_activation_is_no_normalisation() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 4)).double()
    assert_close(factors(model), back_matching_of([kind_of(layer) for layer in model]), 1e-12)


def test_each_normalisation_counts_once_when_parameters_are_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.LayerNorm(4), nn.Linear(4, 2, bias=False)).double()
    model[1].weight.data.fill_(3.0)
    by_module, by_parameter = factors(model).tolist(), factors(model, layers="parameter").tolist()
    assert by_parameter[0] == pytest.approx(by_module[0], rel=1e-12)


def test_deep_chain_of_small_gains_stays_exact() -> None:
    model = nn.Sequential(*[nn.Linear(3, 3, bias=False) for _ in range(60)]).double()
    for layer in model:
        layer.weight.data = 0.01 * torch.eye(3).double()
    expected = back_matching_of([kind_of(layer) for layer in model])
    assert expected[0] == pytest.approx(20_000.0**59, rel=1e-9)
    assert_close(factors(model), expected, 1e-10)


def test_factors_reach_the_rates_of_an_optimizer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, BackMatching(), model)
    expected = factors(model).tolist()
    model(torch.ones(1, 4).double()).sum().backward()
    optimizer.step()
    assert list(adapter.get_last_factors().values()) == pytest.approx(expected, rel=1e-12)
    assert adapter.apply == "lr"


@pytest.mark.parametrize("activation", [0, -0.5, 1.5, math.nan, math.inf, "0.5"], ids=repr)
def test_activation_out_of_range_is_refused(activation: Any) -> None:
    message = rf"activation={re.escape(repr(activation))} must be in \(0, 1\]; 0\.5 for ReLU, 1 to leave it out"
    with pytest.raises((TypeError, ValueError), match=message):
        BackMatching(activation)


def perceptron(*sizes: int) -> nn.Sequential:
    layers = [part for pair in pairwise(sizes) for part in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize(
    ("sizes", "low", "high"), [((784, 64, 32, 10), 150, 400), ((784, *[64] * 8, 10), 5e6, 3e7)], ids=str
)
def test_factors_grow_with_depth_as_its_page_says(sizes: tuple[int, ...], low: float, high: float) -> None:
    assert low < factors(perceptron(*sizes))[0] < high


def test_the_log_warns_of_deep_networks_without_an_upper_bound(caplog: pytest.LogCaptureFixture) -> None:
    def warned(rule: Any, model: nn.Module, **options: Any) -> bool:
        caplog.clear()
        layerwise.LayerwiseLR(torch.optim.SGD(model.parameters(), lr=0.1), rule, model, **options)
        return any("grow exponentially with depth" in message for message in caplog.messages)

    deep, shallow = perceptron(4, 4, 4, 4), perceptron(4, 4, 4)
    assert warned(BackMatching(), deep)
    assert warned(layerwise.rules.chain(LayerAdaptive(), BackMatching()), deep)
    assert warned(BackMatching(), deep, bounds=(0, math.inf))
    assert not warned(BackMatching(), deep, bounds=(0.1, 10))
    assert not warned(layerwise.rules.bounds(BackMatching(), 0.1, 10), deep)
    assert not warned(BackMatching(), shallow)
