"""What an attachment keeps between steps."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn, optim

import layerwise
from layerwise.rules import LARS, Constant, LayerAdaptive

pytestmark = pytest.mark.usefixtures("few_objects")


def bytes_kept(*, place: str | None, rule: object = None, momentum: float = 0.9) -> int:
    """Bytes of all tensors alive after some steps of a network with 400,000 parameters."""
    model = nn.Sequential(*(nn.Linear(200, 200) for _ in range(10)))
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=momentum, weight_decay=0.01)
    adapter = None if place is None else layerwise.LayerwiseLR(optimizer, rule or LayerAdaptive(), model, apply=place)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(1, 200)).sum().backward()
        optimizer.step()
    gc.collect()
    # Of these types only: tensors that other tests have faked hold no memory.
    alive = {t.data_ptr(): t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)}
    total = sum(t.numel() * t.element_size() for t in alive.values())
    assert place is None or adapter is not None
    return total


@pytest.mark.parametrize("rule", [LayerAdaptive(), LARS(), Constant({"*": 2.0})], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("place", ["auto", "gradient", "lr", "update"])
def test_nothing_of_the_size_of_the_parameters_is_kept(place: str, rule: object) -> None:
    kept = bytes_kept(place=place, rule=rule) - bytes_kept(place=None)
    assert kept < 100 * 20  # 20 parameters, a few numbers each


def test_the_check_sees_a_buffer_of_the_size_of_the_parameters() -> None:
    assert bytes_kept(place=None, momentum=0.9) - bytes_kept(place=None, momentum=0.0) > 4 * 400_000
