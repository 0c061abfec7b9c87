"""Each network's layers, factors and steps against trainings written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import layerwise
import reference
from layerwise.lab.models.graph import GraphConvolution
from layerwise.rules import Directionality, GradientAmplification, LayerAdaptive, Phase
from layerwise.rules.selection import KINDS as KIND_CLASSES

from .by_hand import CASES, OPTIMIZERS, ByHand, Case, PermanentGroups, expected_factors, named

STEPS = 6
every_network = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def attach(model: nn.Module, optimizer: str, **arguments) -> tuple[torch.optim.Optimizer, layerwise.LayerwiseLR]:
    bare = OPTIMIZERS[optimizer](model.parameters())
    return bare, layerwise.LayerwiseLR(bare, LayerAdaptive(), model, **arguments)


def backward(case: Case, model: nn.Module, step: int) -> None:
    model.zero_grad()
    case.loss(model, step).backward()


def assert_near(actual: nn.Module, expected: nn.Module) -> None:
    """Raise unless the weights agree up to rounding.

    Attention does not change with the bias of the keys, so that its gradients are rounding errors, which AdamW divides
    by their own size.
    """
    for (name, a), b in zip(actual.named_parameters(), expected.parameters(), strict=True):
        close = 1e-9 if name.endswith("query_key_value.bias") else 1e-13
        torch.testing.assert_close(a, b, rtol=1e-12, atol=close, msg=lambda text, name=name: f"{name}: {text}")


@every_network
def test_the_layers_are_the_modules_with_parameters_in_the_models_order(case: Case) -> None:
    model = case.build()
    _, adapter = attach(model, "AdamW")
    assert {layer.name: list(layer.parameter_names) for layer in adapter.layer_table()} == case.layers
    assert adapter.layers == list(case.layers)
    owned = [p for layer in adapter.layer_table() for p in layer.parameters]
    assert len(owned) == len({id(p) for p in owned}) == len(list(model.parameters()))
    modules = dict(model.named_modules())
    assert all(layer.module is modules[layer.name] for layer in adapter.layer_table())


@every_optimizer
@every_network
def test_factors_and_weights_are_those_of_the_equations_at_every_step(case: Case, optimizer: str) -> None:
    model, twin = case.build(), case.build()
    ours, adapter = attach(model, optimizer)
    hand = ByHand(twin, case.layers, optimizer)
    seen = []
    for step in range(STEPS):
        backward(case, model, step)
        backward(case, twin, step)
        factors = expected_factors(twin, case.layers)
        ours.step()
        assert adapter.get_last_factors() == pytest.approx(factors, rel=1e-9)
        hand.step(factors)
        assert_near(model, twin)
        seen.append(tuple(factors.values()))
    assert min(min(row) for row in seen) > 1
    assert all(len(set(column)) == STEPS for column in zip(*seen, strict=True))  # they follow the gradient
    assert all(len(set(row)) == len(case.layers) for row in seen)


AMPLIFIED = [Phase(1, False), Phase(3, True)]
KINDS = {
    "transformer": ("fc", "embedding"),
    "LSTM": ("recurrent", "fc"),
    "graph network": (GraphConvolution,),
    "vision transformer": ("fc", "bn"),
}
"""Network -> the kinds of layers that are measured."""


@pytest.mark.parametrize("measure", ["G", "G_prime"])
@every_optimizer
@every_network
def test_the_layers_amplified_are_those_of_the_equations(case: Case, optimizer: str, measure: Any) -> None:
    model, twin = case.build(), case.build()
    ours = OPTIMIZERS[optimizer](model.parameters())
    kinds = next(KINDS[name] for name, one in CASES.items() if one is case)
    rule = GradientAmplification(Directionality(measure, threshold=0.5, kinds=kinds), AMPLIFIED)
    adapter = layerwise.LayerwiseLR(ours, rule, model)
    hand = ByHand(twin, case.layers, optimizer)
    hand.solver.decay = "plain"  # of SGD; AdamW's goes with the rate
    classes = tuple(one for kind in kinds for one in (KIND_CLASSES[kind] if isinstance(kind, str) else (kind,)))
    modules = dict(twin.named_modules())
    measured = [name for name in case.layers if isinstance(modules[name], classes)]
    factors = dict.fromkeys(case.layers, 1.0)
    for epoch in (1, 2, 3):
        gradients = []
        for step in range(STEPS):
            for each in (model, twin):
                backward(case, each, step)
                for name, p in each.named_parameters():
                    if name.endswith("query_key_value.bias"):  # of the keys' part all that is left are rounding errors
                        p.grad.zero_()
            parameters = named(twin)
            gradients.append([[parameters[n].grad.numpy().copy() for n in case.layers[name]] for name in measured])
            ours.step()
            assert adapter.get_last_factors() == factors
            hand.step(factors)
            assert_near(model, twin)
        adapter.end_epoch()
        if epoch == 2:
            values = reference.directionality(gradients, measure)
            chosen = reference.chosen(reference.z_scores(values), 0.5)
            factors |= {name: 2.0 for name, one in zip(measured, chosen, strict=True) if one}
            found = adapter.get_last_selection()
            assert [found[name].value for name in measured] == pytest.approx(list(values), rel=1e-5)
            assert {name for name, one in found.items() if one.selected} == {n for n, f in factors.items() if f > 1}
            assert 0 < sum(chosen) < len(measured) + (len(measured) == 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_network
def test_weights_are_to_the_bit_those_of_permanent_groups_at_the_same_rates(
    case: Case, dtype: torch.dtype, assert_same_bits
) -> None:
    model, twin = case.build().to(dtype), case.build().to(dtype)
    ours, adapter = attach(model, "AdamW")
    hand = PermanentGroups(twin, case.layers, "AdamW")
    for step in range(STEPS):
        backward(case, model, step)
        ours.step()
        backward(case, twin, step)
        hand.step(adapter.get_last_factors())
        assert_same_bits(named(model), named(twin))


@every_optimizer
@every_network
def test_frozen_layers_stay_as_they_are_to_the_bit_and_the_others_do_not_notice(
    case: Case, optimizer: str, assert_same_bits
) -> None:
    model, twin = case.build(), case.build()
    frozen = list(case.layers)[1::2]
    for network in (model, twin):
        for layer in frozen:
            for name in case.layers[layer]:
                named(network)[name].requires_grad_(False)
    before = {name: named(model)[name].clone() for layer in frozen for name in case.layers[layer]}
    trained = {layer: names for layer, names in case.layers.items() if layer not in frozen}
    ours, adapter = attach(model, optimizer)  # which holds the frozen ones too
    hand = ByHand(twin, trained, optimizer)
    for step in range(STEPS):
        backward(case, model, step)
        backward(case, twin, step)
        factors = expected_factors(twin, trained)
        ours.step()
        hand.step(factors)
        assert adapter.get_last_factors() == pytest.approx({**dict.fromkeys(frozen, 1.0), **factors}, rel=1e-9)
    assert adapter.layers == list(case.layers)
    assert_near(model, twin)
    assert_same_bits({name: named(model)[name].detach() for name in before}, before)


@every_network
def test_an_optimizer_of_the_trained_parameters_alone_has_no_frozen_layers(case: Case) -> None:
    model = case.build()
    frozen, *trained = case.layers
    for name in case.layers[frozen]:
        named(model)[name].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    assert layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model).layers == trained


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@every_network
def test_a_layer_without_a_gradient_in_some_steps_keeps_factor_one_and_its_weights_in_those(
    case: Case, optimizer: str, assert_same_bits
) -> None:
    model, twin = case.build(), case.build()
    ours, adapter = attach(model, optimizer, apply="lr")
    hand = PermanentGroups(twin, case.layers, optimizer)
    absent = list(case.layers)[1::2]
    for step in range(STEPS):
        for network in (model, twin):
            backward(case, network, step)
            if step % 2:
                for layer in absent:
                    for name in case.layers[layer]:
                        named(network)[name].grad = None
        before = {name: named(model)[name].detach().clone() for layer in absent for name in case.layers[layer]}
        factors = expected_factors(twin, case.layers)
        ours.step()
        hand.step(factors)
        assert adapter.get_last_factors() == pytest.approx(factors, rel=1e-9)
        if step % 2:
            assert [factors[layer] for layer in absent] == [1.0] * len(absent)
            assert_same_bits({name: named(model)[name].detach() for name in before}, before)
    assert_near(model, twin)


@every_network
def test_the_norm_is_of_the_gradients_that_are_there_when_a_part_of_a_layer_is_frozen(case: Case) -> None:
    model = case.build()
    for names in case.layers.values():
        if len(names) > 1:
            named(model)[names[0]].requires_grad_(False)
    ours, adapter = attach(model, "AdamW")
    for step in range(2):
        backward(case, model, step)
        factors = expected_factors(model, case.layers)
        ours.step()
        assert adapter.get_last_factors() == pytest.approx(factors, rel=1e-9)
        assert min(factors.values()) > 1


@every_network
def test_a_seed_gives_the_same_weights_and_leaves_the_global_random_state_alone(case: Case, assert_same_bits) -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    first = case.build()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    with torch.device("meta"):
        second = case.build()
    assert_same_bits(named(first), named(second))
