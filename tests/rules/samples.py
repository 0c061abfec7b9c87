"""Random networks with random gradients, and the way from them to a rule's factors."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from layerwise.layers import Layer, make_layers
from layerwise.rules import Rule
from layerwise.statistics import OF_STEP, LayerStatistics, Statistics

SEEDS = [0, 1, 2, 3]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Relative. A float32 norm of a few thousand entries is good to 1e-7, of a few million to 1e-4."""

Groups = list[dict[str, Any]]


def network(seed: int, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Five layers, weights and gradients on sizes from 1e-3 to 1e3, each layer on its own."""
    model = nn.Sequential(
        OrderedDict(
            first=nn.Conv2d(3, 8, 3),
            norm=nn.BatchNorm2d(8),
            second=nn.Conv2d(8, 12, 3, stride=2, bias=False),
            third=nn.Linear(48, 30),
            head=nn.Linear(30, 10),
        )
    ).to(dtype)
    generator = torch.Generator().manual_seed(seed)

    def random(shape: Sequence[int], size: float) -> Tensor:
        return (size * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    def size() -> float:
        return 10.0 ** float(6 * torch.rand((), generator=generator) - 3)

    for child in model.children():
        weight_size, gradient_size = size(), size()
        for p in child.parameters(recurse=False):
            p.data = random(p.shape, weight_size)
            p.grad = random(p.shape, gradient_size)
    model.norm.running_var = random((8,), 1.0).abs() + 0.1
    return model


def one_group(model: nn.Module, **options: Any) -> Groups:
    """The parameter groups of an optimizer that holds the model in one group."""
    return [{"params": list(model.parameters()), "lr": 0.1, "weight_decay": 0.0, **options}]


def layers_of(model: nn.Module, specification: Any = "module") -> list[Layer]:
    return make_layers(dict(model.named_parameters()), specification, model)


def measured(layers: Sequence[Layer], needs: Collection[str], groups: Groups, scale: float = 1.0) -> Statistics:
    """The statistics of a step that moves the weights by -lr g, whose direction is the gradient.

    `scale` is that of a gradient scaler, by which the gradients are multiplied.
    """
    statistics = LayerStatistics(layers, needs)
    before = statistics.compute(groups, None if scale == 1 else torch.tensor(scale))
    if OF_STEP.isdisjoint(needs):
        return before
    rates = [group["lr"] for group in groups]
    changes = [None if p.grad is None else p.grad.double() * (rates[0] / scale) for p in statistics.members]
    return statistics.after(before, statistics.squares(changes), groups, rates)


def factors_of(rule: Rule, layers: Sequence[Layer], groups: Groups) -> Tensor:
    """A rule's first factors, by the same path as in a step of an optimizer."""
    state = rule.init(layers, layers[0].parameters[0].device)
    return rule.factors(measured(layers, rule.needs, groups), state)[0]


def gradients_of(layers: Sequence[Layer]) -> list[list[np.ndarray]]:
    return [[p.grad.double().numpy() for p in layer.parameters if p.grad is not None] for layer in layers]


def weights_of(layers: Sequence[Layer]) -> list[list[np.ndarray]]:
    return [[p.detach().double().numpy() for p in layer.parameters] for layer in layers]


def assert_close(factors: Tensor, expected: np.ndarray, relative: float) -> None:
    """Every factor within a relative distance, none of them NaN."""
    assert factors.shape == expected.shape
    np.testing.assert_allclose(factors.double().numpy(), expected, rtol=relative, atol=0)


def norms(*values: float) -> Statistics:
    """Gradient norms alone."""
    return Statistics(gradient_norm=torch.tensor(values, dtype=torch.float64))


def quadratic_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """One step of a training that depends on the weights and on the step, and on nothing else."""
    optimizer.zero_grad()
    loss = sum((p.square().sum() * (i + 1) + (p * math.sin(step + i)).sum()) for i, p in enumerate(model.parameters()))
    (0.1 * loss).backward()
    optimizer.step()


def bits(model: nn.Module) -> list[list[float]]:
    return [p.detach().reshape(-1).tolist() for p in model.parameters()]
