"""Attaching, asking, pausing and detaching."""

from __future__ import annotations

import gc
import logging
import math
import re
import weakref

import pytest
import torch
from torch import nn

import layerwise
from layerwise.rules import Constant, LayerAdaptive, Rule, Unfreezing

FACTORS = {"0": 0.5, "2": 3.0, "4": 1.0}
LR, MOMENTUM, DECAY = 0.02, 0.9, 0.1
PLACES = ("auto", "gradient", "lr", "update")


def layer_norm(module):
    return math.sqrt(sum(p.grad.square().sum().item() for p in module.parameters()))


def test_before_the_first_step_the_factors_are_one_and_the_rates_those_of_the_groups(setup):
    _, optimizer, adapter = setup(LayerAdaptive())
    assert adapter.layers == ["0", "2", "4"]
    assert adapter.get_last_factors() == {"0": 1.0, "2": 1.0, "4": 1.0}
    optimizer.param_groups[0]["lr"] = 0.5
    assert adapter.get_last_lr() == {"0": 0.5, "2": 0.5, "4": 0.5}


def test_after_a_step_the_factors_are_those_of_its_gradients(setup, backward):
    model, optimizer, adapter = setup(LayerAdaptive())
    for step in range(3):
        backward(model, step)
        expected = {name: 1 + math.log1p(1 / layer_norm(model[int(name)])) for name in adapter.layers}
        optimizer.step()
        assert adapter.get_last_factors() == pytest.approx(expected, rel=1e-14)
        assert adapter.get_last_lr() == {name: LR * f for name, f in adapter.get_last_factors().items()}


def test_a_layer_over_several_groups_has_the_rate_of_its_weight(make_model, train):
    model = make_model()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 1], "lr": 0.2},
        {"params": [p for p in model.parameters() if p.ndim == 2], "lr": 0.1},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.01)
    adapter = layerwise.LayerwiseLR(optimizer, Constant({"2": 3.0}), model)
    train(model, optimizer, 1)
    assert adapter.get_last_lr() == pytest.approx({"0": 0.1, "2": 0.3, "4": 0.1})
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1]


def test_while_paused_the_optimizer_steps_alone(setup, make_model, train, weights, assert_same_bits):
    model, optimizer, adapter = setup(Constant(FACTORS))
    with adapter.paused() as same, adapter.paused():
        assert same is adapter
        train(model, optimizer)
    bare = make_model()
    train(bare, torch.optim.SGD(bare.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY))
    assert_same_bits(weights(model), weights(bare))
    before = weights(model)["2.weight"]
    train(model, optimizer, 1)
    assert adapter.get_last_factors() == FACTORS
    assert not torch.equal(before, model[2].weight)


def test_a_pause_ends_also_with_an_exception(setup):
    _, _, adapter = setup(Constant(FACTORS))
    with pytest.raises(KeyError), adapter.paused():
        raise KeyError
    assert adapter.enabled


def no_hooks(optimizer):
    return not any(value for name, value in vars(optimizer).items() if name.endswith("_hooks"))


@pytest.mark.parametrize("apply", PLACES)
def test_a_detached_optimizer_is_as_one_that_never_had_an_adapter(
    apply, setup, make_model, train, weights, assert_same_bits
):
    model, optimizer, adapter = setup(Constant({"*": 1.0}), apply=apply)
    twin = make_model()
    never = torch.optim.SGD(twin.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    train(model, optimizer)
    train(twin, never)
    assert_same_bits(optimizer.state_dict(), never.state_dict())
    adapter.detach()
    adapter.detach()
    assert vars(optimizer).keys() == vars(never).keys()
    assert no_hooks(optimizer)
    assert_same_bits(optimizer.state_dict(), never.state_dict())
    train(model, optimizer, first=3)
    train(twin, never, first=3)
    assert_same_bits(weights(model), weights(twin))


def test_after_detaching_the_factors_act_no_more_and_another_adapter_stays(setup, train):
    model, optimizer, one = setup(Constant(FACTORS))
    two = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    one.detach()
    train(model, optimizer, 1)
    assert one.get_last_factors() == dict.fromkeys(FACTORS, 1.0)
    assert min(two.get_last_factors().values()) > 1
    two.detach()
    assert no_hooks(optimizer)


def test_repr_tells_the_rule_the_optimizer_the_layers_and_the_place(setup):
    _, _, adapter = setup(Constant({"2": 3.0}), exclude=["4"])
    assert repr(adapter) == (
        "LayerwiseLR(Constant(factors_by_pattern={'2': 3.0}) on SGD, 3 layers, apply='lr' by divided groups, "
        "1 excluded)"
    )
    adapter.detach()
    assert " on detached, " in repr(adapter)
    _, _, other = setup(LayerAdaptive(), layers=["0"])
    assert repr(other).endswith("1 layers, apply='gradient', decay='scaled', 4 parameters in no layer)")


@pytest.mark.parametrize("apply", PLACES)
def test_the_optimizer_is_freed_by_reference_counting_alone(setup, train, apply):
    model, optimizer, adapter = setup(LayerAdaptive(), apply=apply)
    train(model, optimizer)
    reference = weakref.ref(optimizer)
    gc.collect()
    gc.disable()
    try:
        del optimizer
        assert reference() is None
    finally:
        gc.enable()
    assert "no longer exists" in repr(adapter)
    adapter.detach()


def test_an_adapter_that_nobody_keeps_goes_on_acting(setup, backward):
    model, optimizer, adapter = setup(Constant({"*": 0.0}), apply="lr")
    del adapter
    gc.collect()
    backward(model)
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model[0].weight, before)


def test_excluded_layers_keep_factor_one(setup, train):
    for exclude in (["0", "4"], ["[04]"], lambda name, p: not name.startswith("2.")):
        model, optimizer, adapter = setup(LayerAdaptive(), exclude=exclude)
        train(model, optimizer, 1)
        factors = adapter.get_last_factors()
        assert factors["0"] == factors["4"] == 1.0
        assert factors["2"] > 1


def test_a_callable_must_exclude_all_of_a_layers_parameters(setup, train):
    model, optimizer, adapter = setup(Constant({"*": 2.0}), exclude=lambda name, p: p.ndim == 1)
    train(model, optimizer, 1)
    assert set(adapter.get_last_factors().values()) == {2.0}
    model, optimizer, adapter = setup(Constant({"*": 2.0}), layers="parameter", exclude=lambda name, p: p.ndim == 1)
    train(model, optimizer, 1)
    assert {name: f == 1 for name, f in adapter.get_last_factors().items()} == {
        name: p.ndim == 1 for name, p in model.named_parameters()
    }


def test_bounds_clamp_the_factors(setup, train):
    model, optimizer, adapter = setup(Constant({"0": 0.1, "2": 10.0}), bounds=(0.5, 2))
    train(model, optimizer, 1)
    assert adapter.get_last_factors() == {"0": 0.5, "2": 2.0, "4": 1.0}
    assert "0.5, 2" in repr(adapter)


def test_only_the_layers_that_the_optimizer_holds_are_seen_and_others_are_told_of(make_model, train, caplog):
    model = make_model()
    optimizer = torch.optim.SGD(model[2:].parameters(), lr=LR)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    assert adapter.layers == ["2", "4"]
    assert not caplog.records
    extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = torch.optim.SGD([*model.parameters(), extra], lr=LR)
    with caplog.at_level(logging.WARNING, logger="layerwise"):
        layerwise.LayerwiseLR(optimizer, Constant({"*": 3.0}), model)
    assert "1 of the optimizer's 7 parameters are in no layer" in caplog.text
    extra.grad = torch.ones_like(extra)
    train(model, optimizer, 1)
    assert extra.tolist() == [1 - LR, 1 - LR]


class Returning(Rule):
    """Returns a given result."""

    def __init__(self, result):
        self.result = result

    def factors(self, statistics, state):
        return self.result


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (torch.ones(3), TypeError, "factors returned Tensor; it must return (factors, state)"),
        ((torch.ones(3),), TypeError, "factors returned tuple; it must return (factors, state)"),
        (None, TypeError, "factors returned NoneType; it must return (factors, state)"),
        ((torch.ones(2), {}), ValueError, "returned factors of shape (2,); return a tensor of shape (3,)"),
        (([1.0, 1.0, 1.0], {}), ValueError, "returned factors of shape list; return a tensor of shape (3,)"),
    ],
    ids=["no state", "alone", "nothing", "too few", "a list"],
)
def test_a_rule_that_returns_something_else_is_told_so_before_anything_changes(
    result, error, message, setup, backward, weights, assert_same_bits
):
    model, optimizer, _ = setup(Returning(result))
    backward(model)
    before = weights(model)
    with pytest.raises(error, match=re.escape(message)):
        optimizer.step()
    assert_same_bits(weights(model), before)
    assert not optimizer.state


def test_epochs_are_counted_for_a_rule_that_does_not_count_them(setup):
    _, _, adapter = setup(Returning((torch.ones(3), {})))
    adapter.end_epoch()
    assert adapter.epoch == 2
    assert adapter.state_dict()["state"] == {}


def test_without_its_optimizer_an_adapter_says_that_there_is_none(setup):
    _, optimizer, adapter = setup(LayerAdaptive())
    del optimizer
    with pytest.raises(RuntimeError, match="no longer exists; attach to the one in use"):
        adapter.get_last_lr()
    assert "on an optimizer that no longer exists" in repr(adapter)
    adapter.detach()
    assert "on detached" in repr(adapter)


# --- An optimizer that never steps ------------------------------------------------------------------------------------

NO_STEP = "end_epoch() is called, and SGD has taken no step with this LayerwiseLR: attach to the optimizer whose step()"


def no_step_lines(caplog):
    return [record for record in caplog.records if record.getMessage().startswith(NO_STEP)]


def test_an_epoch_without_a_step_is_logged_once(make_model, backward, caplog):
    model = make_model()
    attached, stepped = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    adapter = layerwise.LayerwiseLR(attached, Unfreezing(), model)
    for _ in range(3):
        backward(model)
        stepped.step()
        adapter.end_epoch()
    assert len(no_step_lines(caplog)) == 1
    adapter.detach()

    caplog.clear()
    adapter = layerwise.LayerwiseLR(stepped, Unfreezing(), model)  # the remedy
    for _ in range(3):
        backward(model)
        stepped.step()
        adapter.end_epoch()
    assert not caplog.records


def test_nothing_is_logged_after_a_load_or_when_detached(make_model, caplog):
    model = make_model()
    saved = layerwise.LayerwiseLR(torch.optim.SGD(model.parameters(), lr=0.1), Unfreezing(), model).state_dict()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, Unfreezing(), model)
    adapter.load_state_dict(saved)
    adapter.end_epoch()
    adapter.detach()
    other = layerwise.LayerwiseLR(optimizer, Unfreezing(), model)
    other.detach()
    other.end_epoch()
    assert not no_step_lines(caplog)
