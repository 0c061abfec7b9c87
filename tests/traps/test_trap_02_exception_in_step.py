"""Trap 2: an exception inside `step` skips the hooks after it; the groups must be whole all the same."""

from __future__ import annotations

import copy

import pytest
import torch

import layerwise
from layerwise.rules import Constant, LayerAdaptive, Rule

FACTORS = {"0": 0.5, "2": 3.0}
every_place = pytest.mark.parametrize("apply", ["auto", "gradient", "lr", "update"])


class Failing(torch.optim.SGD):
    """Raises in the middle of a step when told to."""

    fail = False

    def step(self, closure=None):
        if self.fail:
            raise OSError("out of memory")
        return super().step(closure)


def forbid(optimizer, args, kwargs):
    raise OSError("not now")


def by_the_optimizer(optimizer, backward, model):
    optimizer.fail = True
    with pytest.raises(OSError, match="out of memory"):
        optimizer.step()
    optimizer.fail = False


def by_a_hook_before(optimizer, backward, model):
    handle = optimizer.register_step_pre_hook(forbid)
    with pytest.raises(OSError, match="not now"):
        optimizer.step()
    handle.remove()


def by_a_rule(optimizer, backward, model):
    class Broken(Rule):
        def factors(self, statistics, state):
            raise OSError("no factors")

    other = layerwise.LayerwiseLR(optimizer, Broken(), model)
    with pytest.raises(OSError, match="no factors"):
        optimizer.step()
    other.detach()


every_failure = pytest.mark.parametrize(
    "fail", [by_the_optimizer, by_a_hook_before, by_a_rule], ids=lambda f: f.__name__.replace("_", " ")
)


def attach(make_model, apply, kind=Failing, **options):
    model = make_model()
    options = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, **options}
    optimizer = kind(model.parameters(), **options)
    layerwise.LayerwiseLR(optimizer, Constant(FACTORS), model, apply=apply)
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, apply=apply)
    return model, optimizer


@every_place
@every_failure
def test_the_groups_are_whole_after_a_failure(apply, fail, make_model, backward, train, weights, assert_same_bits):
    model, optimizer = attach(make_model, apply)
    train(model, optimizer)
    groups, group, state = optimizer.param_groups, optimizer.param_groups[0], optimizer.state
    contents, saved, before = dict(group), copy.deepcopy(optimizer.state_dict()), weights(model)
    backward(model, 3)
    fail(optimizer, backward, model)
    assert optimizer.param_groups is groups
    assert len(groups) == 1
    assert groups[0] is group
    assert optimizer.state is state
    assert group.keys() == contents.keys()
    assert all(group[name] is value for name, value in contents.items())
    assert_same_bits(optimizer.state_dict(), saved)
    assert_same_bits(weights(model), before)


@every_place
@every_failure
@pytest.mark.parametrize("steps_before", [0, 2], ids=["at the first step", "at a later step"])
def test_a_scheduler_after_a_failure_is_not_lost_and_training_goes_on(
    apply, fail, steps_before, make_model, backward, train, weights, assert_same_bits
):
    results = []
    for disturbed in (True, False):
        model, optimizer = attach(make_model, apply)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        train(model, optimizer, steps_before)
        optimizer._opt_called = True
        if disturbed:
            backward(model, steps_before)
            fail(optimizer, backward, model)
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == 0.01
        train(model, optimizer, first=steps_before)
        results.append([weights(model), optimizer.state_dict()])
    assert_same_bits(*results)


@every_place
@pytest.mark.parametrize("fail", [by_a_hook_before, by_a_rule], ids=["by a hook before", "by a rule"])
def test_a_first_step_that_never_began_leaves_no_momentum_behind(
    apply, fail, make_model, backward, train, weights, assert_same_bits
):
    # Dampening tells whether the next step is still taken as the first one.
    results = []
    for disturbed in (True, False):
        model, optimizer = attach(make_model, apply, torch.optim.SGD, dampening=0.5)
        if disturbed:
            backward(model)
            fail(optimizer, backward, model)
        train(model, optimizer)
        results.append(weights(model))
    assert_same_bits(*results)


def test_other_hooks_and_state_dict_see_whole_groups_in_the_middle_of_a_step(make_model, train):
    model, optimizer = attach(make_model, "lr", torch.optim.SGD)
    seen = []

    def look(optimizer, args, kwargs):
        seen.append((len(optimizer.param_groups), optimizer.state_dict()["param_groups"][0]["lr"]))

    optimizer.register_step_pre_hook(look)
    optimizer.register_step_post_hook(look)
    train(model, optimizer, 2)
    assert seen == [(1, 0.02)] * 4


@every_place
def test_a_failing_hook_after_the_step_leaves_whole_groups_too(apply, make_model, backward, train):
    model, optimizer = attach(make_model, apply)
    group = optimizer.param_groups[0]
    handle = optimizer.register_step_post_hook(forbid)
    backward(model)
    with pytest.raises(OSError, match="not now"):
        optimizer.step()
    handle.remove()
    assert [len(optimizer.param_groups), group["lr"], group["weight_decay"]] == [1, 0.02, 0.1]
    assert optimizer.param_groups[0] is group
    train(model, optimizer, first=1)
