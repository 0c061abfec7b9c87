"""The gradients that `diagnose` makes up where there are none."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

import layerwise
from layerwise.rules import LayerAdaptive, Rule


class Noting(Rule):
    """Notes the norms of the gradients that it is given."""

    needs = ("gradient_norm",)
    noted: ClassVar[list[list[float]]] = []

    def factors(self, statistics, state):
        self.noted.append(statistics.gradient_norm.tolist())
        return torch.ones_like(statistics.gradient_norm), state


def stack(count):
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(count)))


def test_layers_of_one_shape_are_timed_with_gradients_of_their_own():
    model = stack(48)
    for layers in ("module", "parameter"):
        Noting.noted.clear()
        layerwise.diagnose(torch.optim.AdamW(model.parameters()), model, Noting(), layers=layers, seconds=0.01)
        assert all(len(set(norms)) == len(norms) for norms in Noting.noted)
        assert len(Noting.noted[0]) == (48 if layers == "module" else 96)


def test_layers_of_one_shape_are_timed_with_parts_of_their_own():
    parts: set[int] = set()  # of trials on toys, too

    class Counting(torch.optim.AdamW):
        def step(self, closure=None):
            parts.add(len(self.param_groups))
            return super().step(closure)

    model = stack(48)
    layerwise.diagnose(Counting(model.parameters()), model, LayerAdaptive(), apply="lr", seconds=0.01)
    assert {1, 48} <= parts
    assert max(parts) == 48


def test_the_gradients_made_up_are_the_same_each_time_and_leave_the_generator_alone():
    model = stack(3)
    optimizer = torch.optim.AdamW(model.parameters())
    before = torch.get_rng_state()
    noted = []
    for _ in range(2):
        Noting.noted.clear()
        layerwise.diagnose(optimizer, model, Noting(), seconds=0.01)
        noted.append(Noting.noted[0])
    assert noted[0] == noted[1]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())
