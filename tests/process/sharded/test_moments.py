"""Moments of sharded gradients are those of the whole ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import distribute_tensor

import reference
from layerwise.layers import make_layers
from layerwise.sharding import find_shards
from layerwise.statistics import LayerStatistics

from .cases import network
from .processes import run
from .training import fsdp2

CASES = [  # of float32 and float16 the numbers as they are rounded
    ("float64", 0.0, 1e-12),
    ("float64", 1e4, 1e-8),  # 2e-8 of the mean would be 2e-4
    ("float32", 0.0, 1e-12),
    ("float16", 0.0, 1e-12),
]
MISSING = "up.weight"


def gradient_of(name: str, shape: torch.Size, dtype: str, offset: float) -> Tensor | None:
    """Return the same gradient in every process; None for one parameter."""
    generator = torch.Generator().manual_seed(len(name))
    whole = torch.randn(shape, generator=generator, dtype=torch.float64) + offset
    return None if name == MISSING else whole.to(getattr(torch, dtype))


def measured(rank: int, dtype: str, offset: float) -> tuple[list[float], list[float], list[float]]:
    model = fsdp2(network().to(getattr(torch, dtype)))
    for name, p in model.named_parameters():
        whole = gradient_of(name, p.shape, dtype, offset)
        p.grad = None if whole is None else distribute_tensor(whole * 4, p.device_mesh, p.placements)
    found = find_shards(list(model.parameters()), model)
    layers = make_layers(dict(model.named_parameters()), "module", model, found)
    statistics: Any = LayerStatistics(layers, ["gradient_mean", "gradient_std"])
    groups = [{"params": list(model.parameters()), "lr": 0.1}]
    both = statistics.compute(groups, torch.tensor(4.0))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    zero = statistics.compute(groups)
    return both.gradient_mean.tolist(), both.gradient_std.tolist(), [*zero.gradient_mean, *zero.gradient_std]


@pytest.mark.dist
@pytest.mark.parametrize(("dtype", "offset", "tolerance"), CASES)
def test_moments_of_shards_are_those_of_the_whole_gradient(dtype: str, offset: float, tolerance: float) -> None:
    expected = []
    for module in network().named_children():
        parameters = {f"{module[0]}.{name}": p for name, p in module[1].named_parameters()}
        gradients = [gradient_of(name, p.shape, dtype, offset) for name, p in parameters.items()]
        arrays = [g.double().numpy() for g in gradients if g is not None]
        expected.append(reference.gradient_moments(arrays, sum(p.numel() for p in parameters.values())))
    results = run(2, measured, dtype, offset)
    assert results[0] == results[1]
    for mean, deviation, (wanted, spread) in zip(*results[0][:2], expected, strict=True):
        assert mean == pytest.approx(wanted, rel=tolerance, abs=tolerance * spread)
        assert deviation == pytest.approx(spread, rel=tolerance)
    assert results[0][2] == [0.0] * 10
