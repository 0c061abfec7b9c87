"""Trap 6: `load_state_dict` replaces the group dictionaries; copies and pickles have no hooks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import layerwise
from layerwise.rules import Constant, LayerAdaptive

every_place = pytest.mark.parametrize("apply", ["auto", "gradient", "lr", "update"])


@every_place
def test_the_adapter_goes_on_with_the_new_groups(apply, setup, train, weights, assert_same_bits):
    expected, undisturbed, _ = setup(LayerAdaptive(), apply=apply)
    train(expected, undisturbed)
    undisturbed.param_groups[0]["lr"] /= 2
    train(expected, undisturbed, first=3)
    model, optimizer, adapter = setup(LayerAdaptive(), apply=apply)
    train(model, optimizer)
    group = optimizer.param_groups[0]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups[0] is not group, "the trap: torch puts other dictionaries there"
    optimizer.param_groups[0]["lr"] /= 2
    train(model, optimizer, first=3)
    assert_same_bits(weights(model), weights(expected))
    assert adapter.layers == ["0", "2", "4"]


def test_the_rate_that_was_loaded_is_the_one_that_is_scaled(setup, train):
    model, optimizer, adapter = setup(Constant({"0": 2.0}))
    train(model, optimizer, 1)
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 0.25
    optimizer.load_state_dict(state)
    train(model, optimizer, 1)
    assert adapter.get_last_lr() == {"0": 0.5, "2": 0.25, "4": 0.25}


def test_the_automatic_place_follows_a_momentum_that_was_loaded(make_model, train, weights, assert_same_bits):
    model, expected = make_model(), make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    assert adapter.apply == "lr"
    with_momentum = torch.optim.SGD(expected.parameters(), lr=0.02, momentum=0.9)
    layerwise.LayerwiseLR(with_momentum, LayerAdaptive(), expected)
    optimizer.load_state_dict(with_momentum.state_dict())
    train(model, optimizer)
    train(expected, with_momentum)
    assert adapter.apply == "gradient"
    assert_same_bits(weights(model), weights(expected))


DUPLICATES = {"deepcopy": copy.deepcopy, "pickle": lambda thing: pickle.loads(pickle.dumps(thing))}


@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)
@every_place
def test_a_copy_has_no_hooks_and_steps_as_the_bare_optimizer(
    duplicate, apply, setup, make_model, train, weights, assert_same_bits
):
    model, optimizer, adapter = setup(Constant({"0": 5.0}), apply=apply)
    train(model, optimizer)
    twin, copied = duplicate((model, optimizer))
    assert not copied._optimizer_step_pre_hooks
    assert not copied._optimizer_step_post_hooks
    bare = make_model()
    bare.load_state_dict(model.state_dict())
    alone = torch.optim.SGD(bare.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1)
    alone.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = adapter.get_last_factors()
    train(twin, copied, first=3)
    train(bare, alone, first=3)
    assert_same_bits(weights(twin), weights(bare))
    assert adapter.get_last_factors() == before
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)
def test_attaching_to_the_copy_continues_the_training(duplicate, setup, train, weights, assert_same_bits):
    model, optimizer, adapter = setup(LayerAdaptive())
    train(model, optimizer)
    twin, copied = duplicate((model, optimizer))
    attached = layerwise.LayerwiseLR(copied, LayerAdaptive(), twin)
    attached.load_state_dict(adapter.state_dict())
    train(model, optimizer, first=3)
    train(twin, copied, first=3)
    assert_same_bits(weights(twin), weights(model))
    assert attached.get_last_factors() == adapter.get_last_factors()
