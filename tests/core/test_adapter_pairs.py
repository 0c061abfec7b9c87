"""Two adapters on one optimizer, and a factor beside weight decay, against steps by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import layerwise
from layerwise.rules import Constant, LayerAdaptive

FACTORS = {"0": 0.5, "2": 3.0, "4": 1.0}
LR, MOMENTUM, DECAY = 0.02, 0.9, 0.1
PLACES = ("auto", "gradient", "lr", "update")


def layer_norm(module):
    return math.sqrt(sum(p.grad.square().sum().item() for p in module.parameters()))


def take_steps_by_hand(model, backward, attached, steps=3):
    """Take steps of SGD with momentum, each factor acting at its place: [(place, rule), …]."""
    velocity = {p: torch.zeros_like(p) for p in model.parameters()}
    for step in range(steps):
        backward(model, step)
        for name in FACTORS:
            product = {"gradient": 1.0, "lr": 1.0, "update": 1.0}
            for place, rule in attached:
                adaptive = isinstance(rule, LayerAdaptive)
                product[place] *= 1 + math.log1p(1 / layer_norm(model[int(name)])) if adaptive else FACTORS[name]
            for p in model[int(name)].parameters():
                with torch.no_grad():
                    velocity[p] = MOMENTUM * velocity[p] + product["gradient"] * (p.grad + DECAY * p)
                    p -= product["update"] * product["lr"] * LR * velocity[p]


PAIRS = {
    "two fixed": (Constant(FACTORS), Constant(FACTORS)),
    "adaptive, then fixed": (LayerAdaptive(), Constant(FACTORS)),
    "fixed, then adaptive": (Constant(FACTORS), LayerAdaptive()),
    "two adaptive": (LayerAdaptive(), LayerAdaptive()),
}


@pytest.mark.pairwise
@pytest.mark.parametrize(("first", "second"), list(itertools.product(PLACES, PLACES)))
@pytest.mark.parametrize("rules", PAIRS.values(), ids=PAIRS)
def test_two_adapters_multiply_at_every_pair_of_places(
    first, second, rules, setup, make_model, backward, train, weights, assert_close
):
    model, optimizer, one = setup(rules[0], apply=first, decay="scaled")
    two = layerwise.LayerwiseLR(optimizer, rules[1], model, apply=second, decay="scaled")
    train(model, optimizer)
    expected = make_model()
    take_steps_by_hand(expected, backward, [(one.apply, rules[0]), (two.apply, rules[1])])
    assert_close(weights(model), weights(expected))
    assert len(optimizer.param_groups) == 1


def test_two_fixed_factors_are_permanent_groups_with_the_product(setup, make_model, train, weights, assert_close):
    model, optimizer, _ = setup(Constant(FACTORS))
    layerwise.LayerwiseLR(optimizer, Constant({"4": 0.25}), model)
    train(model, optimizer)
    permanent = make_model()
    groups = layerwise.param_groups(permanent)
    for group, factor in zip(groups, (0.5, 3.0, 0.25), strict=True):
        group["lr"] = LR * factor
    train(permanent, torch.optim.SGD(groups, momentum=MOMENTUM, weight_decay=DECAY))
    assert_close(weights(model), weights(permanent))


def test_decay_is_multiplied_when_scaled_and_left_when_plain(setup, make_model, backward, weights, assert_close):
    for decay, factor_of_decay in (("scaled", 3.0), ("plain", 1.0)):
        model, optimizer, _ = setup(Constant({"*": 3.0}), apply="gradient", decay=decay)
        expected = make_model()
        backward(model)
        backward(expected)
        optimizer.step()
        with torch.no_grad():
            for p in expected.parameters():
                p -= LR * (3.0 * p.grad + factor_of_decay * DECAY * p)
        assert_close(weights(model), weights(expected))
