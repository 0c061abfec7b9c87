"""Freezing by gradient fluctuation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import layerwise
import reference
from layerwise.rules import LayerFreezing


@pytest.mark.parametrize("measure", ["G", "G_prime"])
def test_layers_with_fluctuating_gradients_stand_still_until_they_are_measured_again(measure: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4, dtype=torch.float64) for _ in range(3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, LayerFreezing(0.5, start=2, every=2, measure=measure), model)
    assert adapter.apply == "lr"
    noise = {2: {"1"}, 4: {"0", "1"}, 6: set()}
    frozen: set[str] = set()
    for epoch in range(1, 8):
        steps = []
        for _ in range(20):
            for name, layer in model.named_children():
                for p in layer.parameters():
                    fluctuating = name in noise.get(epoch, set())
                    p.grad = torch.randn_like(p) if fluctuating else torch.ones_like(p) + 0.1 * torch.randn_like(p)
            steps.append([[p.grad.numpy().copy() for p in layer.parameters()] for layer in model])
            before = {name: layer.weight.detach().clone() for name, layer in model.named_children()}
            optimizer.step()
            still = {name for name, layer in model.named_children() if torch.equal(layer.weight, before[name])}
            assert still == frozen
        adapter.end_epoch()
        if epoch in noise:
            scores = [one.value for one in adapter.get_last_selection().values()]
            np.testing.assert_allclose(scores, reference.freezing_score(steps, measure), atol=1e-12)
            frozen = {name for name, one in adapter.get_last_selection().items() if one.selected}
            assert frozen == noise[epoch]


def test_the_log_warns_when_every_layer_is_frozen_and_only_then(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, LayerFreezing(0.5, every=1), model)
    for noisy, warned in (("0", False), ("01", True)):
        for _ in range(20):
            for name, layer in model.named_children():
                for p in layer.parameters():
                    p.grad = torch.randn_like(p) if name in noisy else torch.ones_like(p)
            optimizer.step()
        caplog.clear()
        adapter.end_epoch()
        assert any("all 2 layers are frozen, with scores from 0." in message for message in caplog.messages) == warned
