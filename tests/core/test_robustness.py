"""What the step of an attached optimizer must survive, each found by somebody who tried to break it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import layerwise
from layerwise.rules import LARC, LayerAdaptive, Rule


def test_the_rule_cannot_be_exchanged_under_the_adapter():
    model = nn.Linear(2, 1)
    adapter = layerwise.LayerwiseLR(torch.optim.SGD(model.parameters(), lr=0.1), LayerAdaptive(), model)
    with pytest.raises(AttributeError):
        adapter.rule = LayerAdaptive(10)


def test_a_named_group_may_be_thinned_out():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    group, frozen = optimizer.param_groups[0], model[0].weight.clone()
    group["params"] = group["params"][2:]
    model(torch.ones(5, 3)).sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, frozen)


def test_state_may_hold_more_than_parameters():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.state["global_step"] = 3
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    for _ in range(2):
        model(torch.ones(5, 3)).sum().backward()
        optimizer.step()
    assert optimizer.state["global_step"] == 3


def test_what_a_hook_or_a_disguised_subclass_writes_into_the_groups_is_kept():
    class Counting(torch.optim.SGD):
        __module__ = torch.optim.SGD.__module__

        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1

    def count(optimizer, args, kwargs):
        for group in args[0].param_groups:
            group["k"] = group.get("k", 0) + 1

    for kind in (Counting, torch.optim.SGD):
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        optimizer = kind(model.parameters(), lr=0.1)
        layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
        if kind is torch.optim.SGD:
            optimizer.register_step_pre_hook(count)
        for _ in range(3):
            model(torch.ones(5, 3)).sum().backward()
            optimizer.step()
        assert optimizer.param_groups[0]["k"] == 3


def test_the_last_rate_is_that_of_a_step_with_factors():
    class FailsOnce(Rule):
        calls = 0

        def factors(self, statistics, state):
            self.calls += 1
            if self.calls == 2:
                raise KeyError("once")
            return torch.full_like(statistics.gradient_norm, 2.0), state

    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, FailsOnce(), model)
    model(torch.ones(5, 3)).sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.01
    with pytest.raises(KeyError):
        optimizer.step()
    assert adapter.get_last_lr() == {"": 0.2}


def test_norms_of_gradients_with_a_graph_are_not_recorded():
    packed = []
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    loss = model(torch.ones(5, 3)).square().sum()
    for p, gradient in zip(
        model.parameters(), torch.autograd.grad(loss, [*model.parameters()], create_graph=True), strict=True
    ):
        p.grad = gradient
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
        optimizer.step()
    assert not packed


def test_a_rate_that_is_learned_is_read_without_a_warning():
    model = nn.Linear(3, 2)
    rate = torch.tensor(0.1, requires_grad=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, foreach=False)
    layerwise.LayerwiseLR(optimizer, LARC(), model, apply="lr")
    model(torch.ones(5, 3)).sum().backward()
    optimizer.step()
