"""Every scheduler of torch drives an optimizer with an adapter exactly as one without."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.optim import lr_scheduler as schedulers

import layerwise
from layerwise.rules import Constant, LayerAdaptive

# Up to PyTorch 2.6 SequentialLR itself steps its schedulers in a way that these warn of.
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in .scheduler.step:UserWarning")

STEPS = 12
RECIPES = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.95),
    "StepLR": lambda o: schedulers.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 5], 0.3),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.25, 4),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.2, 1.0, 6),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.05, step_size_up=3, cycle_momentum=True),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.05, total_steps=STEPS + 1),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=4), schedulers.CosineAnnealingLR(o, 6)], [4]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ExponentialLR(o, 0.9), schedulers.StepLR(o, 4, 0.5)], optimizer=o
    ),
}


def scheduler_classes():
    """Return what torch offers as schedulers, but for their base class."""
    members = inspect.getmembers(schedulers, inspect.isclass)
    return {
        name
        for name, member in members
        if issubclass(member, schedulers.LRScheduler) and member is not schedulers.LRScheduler and name[0] != "_"
    }


def test_no_scheduler_of_torch_is_left_untested():
    assert scheduler_classes() == set(RECIPES)


def advance(scheduler):
    if isinstance(scheduler, schedulers.ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


def values_of(optimizer):
    """Return all that a scheduler may write, of the optimizer's own groups."""
    return [{k: v for k, v in group.items() if k not in ("params", "param_names")} for group in optimizer.param_groups]


def run(model, backward, recipe, attach=None, order="before", each_step=None):
    """Train, and return the values of the groups at every step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=0.01)
    adapter = attach(optimizer, model) if attach and order == "after" else None
    scheduler = recipe(optimizer)
    adapter = attach(optimizer, model) if attach and order == "before" else adapter
    history = []
    for step in range(STEPS):
        backward(model, step)
        optimizer.step()
        history.append(values_of(optimizer))
        if each_step:
            each_step(optimizer, adapter)
        advance(scheduler)
    return history


both_orders = pytest.mark.parametrize("order", ["before", "after"], ids=["created before", "created after attaching"])
every_scheduler = pytest.mark.parametrize("name", sorted(RECIPES))
every_place = pytest.mark.parametrize("apply", ["auto", "gradient", "lr", "update"])


@pytest.mark.pairwise
@every_scheduler
@both_orders
@every_place
def test_a_factor_of_one_leaves_rates_momenta_and_weights_as_without_an_adapter(
    name, order, apply, make_model, backward, weights, assert_same_bits
):
    bare, attached = make_model(), make_model()
    expected = run(bare, backward, RECIPES[name])

    def attach(optimizer, model):
        return layerwise.LayerwiseLR(optimizer, Constant({"*": 1.0}), model, apply=apply)

    actual = run(attached, backward, RECIPES[name], attach, order)
    assert actual == expected
    assert_same_bits(weights(attached), weights(bare))


@every_scheduler
def test_the_schedule_really_changes_the_rate_in_this_test(name, make_model, backward):
    rates = [groups[0]["lr"] for groups in run(make_model(), backward, RECIPES[name])]
    assert len(set(rates)) > 1


@every_scheduler
@both_orders
def test_the_last_rate_of_a_layer_is_the_scheduled_rate_times_its_factor(name, order, make_model, backward):
    seen = []

    def compare(optimizer, adapter):
        factors = adapter.get_last_factors()
        rate = optimizer.param_groups[0]["lr"]
        assert adapter.get_last_lr() == {layer: rate * factor for layer, factor in factors.items()}
        assert min(factors.values()) > 1
        seen.append(rate)

    def attach(optimizer, model):
        return layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, apply="lr")

    history = run(make_model(), backward, RECIPES[name], attach, order, compare)
    expected = [groups[0]["lr"] for groups in run(make_model(), backward, RECIPES[name])]
    assert seen == expected
    assert [groups[0]["lr"] for groups in history] == expected


@every_scheduler
def test_a_scheduled_rate_times_a_factor_moves_the_weights_as_permanent_groups_would(
    name, make_model, backward, weights, assert_close
):
    factors = {"0": 0.5, "2": 3.0, "4": 1.0}
    model = make_model()

    def attach(optimizer, model):
        return layerwise.LayerwiseLR(optimizer, Constant(factors), model, apply="lr")

    run(model, backward, RECIPES[name], attach)

    permanent = make_model()
    template = torch.optim.SGD(permanent.parameters(), lr=0.02, momentum=0.9, weight_decay=0.01)
    groups = [{"params": list(permanent[int(layer)].parameters())} for layer in factors]
    optimizer = torch.optim.SGD(groups, lr=0.02, momentum=0.9, weight_decay=0.01)
    scheduler = RECIPES[name](template)
    for step in range(STEPS):
        for group, factor in zip(optimizer.param_groups, factors.values(), strict=True):
            group["lr"] = template.param_groups[0]["lr"] * factor
            group["momentum"] = template.param_groups[0]["momentum"]
        backward(permanent, step)
        template._opt_called = True  # it only carries the schedule
        optimizer.step()
        advance(scheduler)
    assert_close(weights(model), weights(permanent))


def test_the_last_rate_stays_that_of_the_step_when_a_scheduler_writes_into_a_tensor(make_model, backward):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.5, dtype=torch.float64), foreach=False)
    scheduler = schedulers.ExponentialLR(optimizer, 0.5)
    adapter = layerwise.LayerwiseLR(optimizer, Constant({"0": 2.0}), model)
    backward(model)
    optimizer.step()
    scheduler.step()
    assert float(optimizer.param_groups[0]["lr"]) == 0.25
    assert adapter.get_last_lr() == {"0": 1.0, "2": 0.5, "4": 0.5}
