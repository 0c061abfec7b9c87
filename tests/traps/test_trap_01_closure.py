"""Trap 1: hooks run before the closure of `step(closure)`, which computes the gradients."""

from __future__ import annotations

import pytest
import torch

import layerwise
from layerwise.rules import Constant, LayerAdaptive

FORMS = {
    "positional": lambda optimizer, closure: optimizer.step(closure),
    "named": lambda optimizer, closure: optimizer.step(closure=closure),
}
every_form = pytest.mark.parametrize("call", FORMS.values(), ids=FORMS)
every_place = pytest.mark.parametrize("apply", ["auto", "gradient", "lr", "update"])
KINDS = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=0.1),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.02),
}


@every_form
@every_place
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_step_with_a_closure_is_a_backward_and_a_step(
    call, apply, kind, make_model, backward, train, weights, assert_same_bits
):
    expected, model = make_model(), make_model()
    optimizer = kind(expected.parameters())
    reference = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), expected, apply=apply)
    train(expected, optimizer)
    factors = reference.get_last_factors()

    optimizer = kind(model.parameters())
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, apply=apply)
    calls = []
    for step in range(3):

        def closure(step=step):
            calls.append(step)
            return backward(model, step)

        loss = call(optimizer, closure)
        assert loss is not None
        assert loss.ndim == 0
    assert calls == [0, 1, 2], "the closure must run once a step"
    assert_same_bits(weights(model), weights(expected))
    assert adapter.get_last_factors() == factors


@every_form
def test_the_first_step_already_sees_the_gradients_of_its_closure(call, setup, backward):
    model, optimizer, adapter = setup(LayerAdaptive())
    call(optimizer, lambda: backward(model))
    assert min(adapter.get_last_factors().values()) > 1


@every_form
def test_the_loss_of_the_closure_is_returned_as_it_is(call, setup, backward):
    model, optimizer, _ = setup(LayerAdaptive())
    losses = []

    def closure():
        losses.append(backward(model))
        return losses[0]

    assert call(optimizer, closure) is losses[0]


def test_none_is_no_closure(setup, make_model, backward, weights, assert_same_bits):
    networks = []
    for arguments in ((), (None,)):
        model, optimizer, _ = setup(LayerAdaptive())
        backward(model)
        assert optimizer.step(*arguments) is None
        networks.append(weights(model))
    model, optimizer, _ = setup(LayerAdaptive())
    backward(model)
    assert optimizer.step(closure=None) is None
    assert_same_bits(networks[0], networks[1])
    assert_same_bits(networks[0], weights(model))


@every_form
def test_two_adapters_share_one_evaluation(call, setup, backward):
    model, optimizer, first = setup(LayerAdaptive())
    second = layerwise.LayerwiseLR(optimizer, Constant({"0": 2.0}), model)
    calls = []
    call(optimizer, lambda: (calls.append(0), backward(model))[1])
    assert len(calls) == 1
    assert first.get_last_factors()["0"] > 1
    assert second.get_last_factors()["0"] == 2.0


@every_form
def test_a_paused_adapter_leaves_the_closure_to_the_optimizer(
    call, setup, make_model, backward, weights, assert_same_bits
):
    model, optimizer, adapter = setup(LayerAdaptive())
    bare = make_model()
    alone = torch.optim.SGD(bare.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1)
    with adapter.paused():
        call(optimizer, lambda: backward(model))
    call(alone, lambda: backward(bare))
    assert_same_bits(weights(model), weights(bare))


@every_form
def test_a_closure_that_fails_moves_nothing_and_the_next_step_is_sound(
    call, setup, backward, train, weights, assert_same_bits
):
    model, optimizer, _ = setup(LayerAdaptive())
    expected, undisturbed, _ = setup(LayerAdaptive())

    def closure():
        raise KeyError("no batch")

    before = weights(model)
    with pytest.raises(KeyError, match="no batch"):
        call(optimizer, closure)
    assert_same_bits(weights(model), before)
    train(model, optimizer)
    train(expected, undisturbed)
    assert_same_bits(weights(model), weights(expected))


@every_form
def test_an_optimizer_that_evaluates_its_closure_twice_is_told_that_this_cannot_work(call, make_model, backward):
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            return super().step(closure)

    model = make_model()
    optimizer = Twice(model.parameters(), lr=0.02)
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    with pytest.raises(RuntimeError, match="evaluates its closure more than once a step"):
        call(optimizer, lambda: backward(model))
