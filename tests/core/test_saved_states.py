"""States that version 0.1.0 saved load, and training resumes with the same steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import layerwise
from layerwise.rules import (
    LARS,
    Directionality,
    GradientAmplification,
    LayerAdaptive,
    LayerDecay,
    LayerFreezing,
    Phase,
    RandomLayers,
    chain,
)

SAVED: dict[str, dict[str, Any]] = torch.load(Path(__file__).with_name("saved_by_0.1.0.pt"), weights_only=True)
RULES = {
    "LayerAdaptive": LayerAdaptive(),
    "LARS": LARS(trust_coefficient=0.5),
    "LayerDecay": LayerDecay(0.5),
    "amplification": GradientAmplification(Directionality(threshold=0.0), [Phase(1, False), Phase(9, True)]),
    "G_prime": GradientAmplification(
        Directionality(measure="G_prime", threshold=0.0), [Phase(1, False), Phase(9, True)]
    ),
    "random": GradientAmplification(RandomLayers(0.5, seed=3), [Phase(9, True)]),
    "freezing": LayerFreezing(threshold=0.5),
    "chain": chain(LayerAdaptive(), GradientAmplification(RandomLayers(0.5), [Phase(9, True)])),
}


def test_each_saved_rule_is_tried() -> None:
    assert RULES.keys() == SAVED.keys()


@pytest.mark.parametrize("name", RULES)
def test_a_state_of_0_1_0_resumes(name: str) -> None:
    """Saved in the middle of an epoch of three steps, after four; its file holds the weights five steps later."""
    saved = SAVED[name]
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model.load_state_dict(saved["model"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    optimizer.load_state_dict(saved["optimizer"])
    adapter = layerwise.LayerwiseLR(optimizer, RULES[name], model)
    adapter.load_state_dict(saved["adapter"])
    for step in range(4, 9):
        x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        if step % 3 == 2:
            adapter.end_epoch()
    torch.testing.assert_close([p.detach() for p in model.parameters()], saved["end"], rtol=1e-12, atol=1e-12)
    assert list(adapter.get_last_factors().values()) == pytest.approx(saved["factors"], rel=1e-12)
