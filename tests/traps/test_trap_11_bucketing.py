"""Trap 11: a group for each layer makes an unfused step slow, so equal factors share one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import layerwise
from layerwise.rules import Constant

LAYERS = 40


def deep(**options):
    """Return a network of many layers with gradients, and SGD for it."""
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(LAYERS)))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, **options)


def count_groups(optimizer, steps=2):
    """Return how many groups `step` saw at each step: a hook after the adapter's gets what `step` runs on."""
    seen = []
    handle = optimizer.register_step_pre_hook(lambda _, args, kwargs: seen.append(len(args[0].param_groups)))
    for _ in range(steps):
        optimizer.step()
    handle.remove()
    assert len(optimizer.param_groups) <= min(seen)
    return seen


PLACES = {
    "rate": ({}, {"apply": "lr"}),
    "gradient, through the dampening": ({"momentum": 0.9}, {"apply": "auto"}),
    "gradient, with its decay": ({"momentum": 0.9, "weight_decay": 0.1}, {"apply": "gradient", "decay": "scaled"}),
}
every_place = pytest.mark.parametrize(("options", "arguments"), PLACES.values(), ids=PLACES)


class Preferring(Constant):
    """Fixed factors that ask for the gradient."""

    default_place = "gradient"


@every_place
@pytest.mark.parametrize(
    ("factors", "groups"),
    [
        ({"*": 1.0}, 1),
        ({"*": 2.0}, 1),
        ({"0": 2.0}, 2),
        ({"1*": 2.0, "*": 3.0}, 2),
        ({"0": 2.0, "7": 2.0, "1*": 0.5}, 3),
        ({str(i): float(i) for i in range(LAYERS)}, LAYERS),
    ],
    ids=["all one", "all equal", "one other", "two halves", "three values", "all different"],
)
def test_a_step_sees_one_group_for_each_distinct_factor(options, arguments, factors, groups):
    model, optimizer = deep(**options)
    adapter = layerwise.LayerwiseLR(optimizer, Preferring(factors), model, **arguments)
    assert count_groups(optimizer) == [groups, groups]
    assert len(set(adapter.get_last_factors().values())) == groups


@every_place
def test_each_group_of_the_optimizer_is_split_for_itself(options, arguments):
    model, _ = deep()
    groups = [{"params": list(model[:10].parameters())}, {"params": list(model[10:].parameters()), "lr": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=0.1, **options)
    layerwise.LayerwiseLR(optimizer, Preferring({"[0-4]": 2.0, "2*": 3.0}), model, **arguments)
    assert count_groups(optimizer) == [4, 4]


def test_excluded_layers_and_parameters_of_no_layer_share_the_group_of_factor_one():
    model, optimizer = deep()
    stranger = nn.Parameter(torch.ones(1))
    stranger.grad = torch.ones(1)
    optimizer.param_groups[0]["params"].append(stranger)
    layerwise.LayerwiseLR(optimizer, Constant({"1*": 1.0, "*": 2.0}), model, exclude=["2", "3"])
    assert count_groups(optimizer) == [2, 2]


@pytest.mark.parametrize("arguments", [{"apply": "update"}, {"apply": "gradient"}], ids=["update", "gradient"])
def test_other_places_leave_the_groups_whole(arguments):
    model, optimizer = deep(momentum=0.9)
    layerwise.LayerwiseLR(optimizer, Constant({str(i): float(i) for i in range(LAYERS)}), model, **arguments)
    assert count_groups(optimizer) == [1, 1]


def test_the_groups_of_two_adapters_are_those_of_the_distinct_pairs():
    model, optimizer = deep()
    layerwise.LayerwiseLR(optimizer, Constant({"1*": 2.0}), model)
    layerwise.LayerwiseLR(optimizer, Constant({"*1": 2.0}), model)
    assert count_groups(optimizer) == [4, 4]


def test_the_names_of_the_parameters_are_split_with_them():
    model, _ = deep()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    layerwise.LayerwiseLR(optimizer, Constant({"1*": 2.0}))
    names = {id(p): name for name, p in model.named_parameters()}

    def compare(_, args, kwargs):
        assert len(args[0].param_groups) == 2
        for group in args[0].param_groups:
            assert group["param_names"] == [names[id(p)] for p in group["params"]]

    optimizer.register_step_pre_hook(compare)
    optimizer.step()
