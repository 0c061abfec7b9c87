"""Numbers at the edge: gradients that are NaN, infinite, subnormal, zero or huge, in any layer at any step."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from edges import DTYPES, FAULTS, OPTIMIZERS, RULES, Fault, every_case, fits, network, put_gradients
from exact import same_bits
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import layerwise
import reference
from layerwise.layers import Layer
from layerwise.rules import Directionality, GradientAmplification, Phase
from layerwise.rules.directionality import LARGEST
from rule_cases import RULES as CASES
from rule_cases import Network

pytestmark = pytest.mark.full

READS_GRADIENTS = {
    name
    for name, case in CASES.items()
    # The references give the first factors; those of a rule that remembers differ later.
    if case.reference and "gradient_norm" in RULES[name].needs and RULES[name].needs_own_layer_only()
}


def arrays(parameters: Any) -> list[np.ndarray]:
    return [p.detach().double().numpy() for p in parameters]


def expected_factors(name: str, optimizer: torch.optim.Optimizer, layers: list[Layer]) -> list[float]:
    """The factors of rules that read gradients, by the slow reference."""
    gradients = [arrays(p.grad for p in layer.parameters) for layer in layers]
    weights = [arrays(layer.parameters) for layer in layers]
    decays = [[optimizer.param_groups[0]["weight_decay"]] * len(layer.parameters) for layer in layers]
    with np.errstate(over="ignore", invalid="ignore"):
        names = [layer.name for layer in layers]
        found = CASES[name].reference(Network(names, gradients, weights, decays, rates=[2.0**-6] * len(layers)))
    return [float(f) if layer.included else 1.0 for f, layer in zip(found, layers, strict=True)]


def representable(tensors: list[Tensor]) -> bool:
    """Tell whether the sum of these squares is neither lost nor infinite in the type in which it is formed."""
    sizes = torch.cat([t.detach().double().abs().flatten() for t in tensors])
    smallest, largest = (1e-140, 1e140) if tensors[0].dtype is torch.float64 else (1e-15, 1e18)
    return bool(sizes.isfinite().all() and sizes.max() < largest and sizes.max() > smallest)


def check_steps(dtype: torch.dtype, rule: str, kind: str, place: str, faults: list[Fault]) -> None:
    """Step an attached optimizer beside the bare one, which before each step is given weights and state anew."""
    assume(fits(rule, kind, place))
    model, bare = network(dtype), network(dtype)
    optimizer, alone = OPTIMIZERS[kind](model.parameters()), OPTIMIZERS[kind](bare.parameters())
    adapter = layerwise.LayerwiseLR(optimizer, RULES[rule], model, apply=place)
    probe = layerwise.LayerwiseLR(alone, RULES[rule], bare, apply=place)
    probe.detach()
    layers, twins = adapter.layer_table(), probe.layer_table()
    for step in range(4):
        bare.load_state_dict(model.state_dict())
        alone.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for each in (model, bare):
            put_gradients(each, step, faults)
        expected = expected_factors(rule, alone, twins) if rule in READS_GRADIENTS else [math.nan] * len(layers)
        known = [representable([p.grad for p in t.parameters]) and representable([*t.parameters]) for t in twins]
        optimizer.step()
        alone.step()
        factors = adapter.get_last_factors()
        assert all(map(math.isfinite, factors.values())), factors
        for layer, twin, foreseen, sound in zip(layers, twins, expected, known, strict=True):
            factor = factors[layer.name]
            gradients = [p.grad for p in twin.parameters]
            if rule in READS_GRADIENTS:
                if sound:
                    assert factor == pytest.approx(foreseen, rel=1e-5), layer.name
                elif not all(g.isfinite().all() for g in gradients) or not any(map(torch.any, gradients)):
                    assert factor == 1, layer.name
            if factor == 1:
                for p, q in zip(layer.parameters, twin.parameters, strict=True):
                    same_bits(p.detach(), q.detach())
                    same_bits(optimizer.state.get(p, {}), alone.state.get(q, {}))
        if step % 2:
            adapter.end_epoch()
    if adapter.rule.get_selection(adapter._attached.state) is not None:
        assert all(math.isnan(one.value) or 0 <= one.value <= 1 for one in adapter.get_last_selection().values())


@settings(max_examples=150, deadline=None, derandomize=True)
@every_case
def test_a_layer_with_factor_one_does_what_the_optimizer_alone_would_do(dtype, rule, kind, place, faults):
    check_steps(dtype, rule, kind, place, faults)


@pytest.mark.faults
@settings(max_examples=5_000, deadline=None, print_blob=True)
@every_case
def test_a_layer_with_factor_one_does_what_the_optimizer_alone_would_do_5_000_cases(dtype, rule, kind, place, faults):
    check_steps(dtype, rule, kind, place, faults)


def check_sums(dtype: torch.dtype, measure: str, faults: list[Fault]) -> None:
    """Measure an epoch with such gradients, beside G and G′ of the stored gradients of the steps that count."""
    model = network(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rule = GradientAmplification(Directionality(measure, threshold=0.5), [Phase(2, True)])
    adapter = layerwise.LayerwiseLR(optimizer, rule, model)
    counted = []
    for step in range(4):
        put_gradients(model, step, faults)
        layers = [arrays(p.grad for p in layer.parameters) for layer in adapter.layer_table()]
        with np.errstate(over="ignore"):
            size = sum(float(np.abs(array).sum()) for layer in layers for array in layer)
        if 0 < size < LARGEST:
            counted.append(layers)
        optimizer.step()
    adapter.end_epoch()
    selection = adapter.get_last_selection().values()
    if counted:
        expected = reference.directionality(counted, measure)
        assert [one.value for one in selection] == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-6)
        assert all(math.isfinite(one.z) for one in selection)
    else:
        assert all(math.isnan(one.value) for one in selection)


every_epoch = given(dtype=st.sampled_from(DTYPES), measure=st.sampled_from(["G", "G_prime"]), faults=FAULTS)


@settings(max_examples=100, deadline=None, derandomize=True)
@every_epoch
def test_steps_that_are_not_finite_or_huge_leave_the_sums_of_an_epoch_alone(dtype, measure, faults):
    check_sums(dtype, measure, faults)


@pytest.mark.faults
@settings(max_examples=3_000, deadline=None, print_blob=True)
@every_epoch
def test_steps_that_are_not_finite_or_huge_leave_the_sums_of_an_epoch_alone_3_000_cases(dtype, measure, faults):
    check_sums(dtype, measure, faults)
