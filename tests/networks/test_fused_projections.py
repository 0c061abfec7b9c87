"""A fused projection whose parts are made parameters is three separate ones, to rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import layerwise
from layerwise.rules import LayerAdaptive, Rule, Trust

SIZES = (4, 2, 2)  # of queries, keys and values: groups of queries share the others


class Joined(nn.Module):
    def forward(self, *parts: torch.Tensor) -> torch.Tensor:
        return torch.cat(parts)

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return weight.split(SIZES)


class Separate(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(part.clone()) for part in weight.split(SIZES)])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.cat([inputs @ part.T for part in self.parts], dim=-1)


@pytest.mark.parametrize("rule", [LayerAdaptive(), Trust()], ids=["LayerAdaptive", "Trust"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_parts_have_the_factors_and_weights_of_separate_projections(kind: type, rule: Rule) -> None:
    fused = nn.Linear(5, sum(SIZES), bias=False, dtype=torch.float64)
    separate = Separate(fused.weight.detach())
    parametrize.register_parametrization(fused, "weight", Joined())
    adapters = []
    steps = []
    for model in (fused, separate):
        optimizer = kind(model.parameters(), lr=0.05, weight_decay=0.1)
        adapters.append(layerwise.LayerwiseLR(optimizer, rule, model, layers="parameter", exclude=None))
        steps.append(optimizer)
    for step in range(5):
        inputs = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip((fused, separate), steps, strict=True):
            optimizer.zero_grad()
            model(inputs).square().sum().backward()
            optimizer.step()
        ours, theirs = (list(adapter.get_last_factors().values()) for adapter in adapters)
        assert ours == pytest.approx(theirs, rel=1e-12)
        assert len(set(ours)) == 3
    assert list(adapters[0].get_last_factors()) == ["weight0", "weight1", "weight2"]
    torch.testing.assert_close(fused.weight, torch.cat(list(separate.parts)), rtol=1e-12, atol=1e-14)
    parametrize.remove_parametrizations(fused, "weight")
    torch.testing.assert_close(fused.weight, torch.cat(list(separate.parts)), rtol=1e-12, atol=1e-14)
