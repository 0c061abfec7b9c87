"""A small network, its batches, and the loop that a framework's training is compared with: nothing but PyTorch."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from layerwise import LayerwiseLR
from layerwise.rules import Directionality, GradientAmplification, LayerAdaptive, Phase

BATCH, BATCHES = 4, 6
RULES = {
    "LayerAdaptive": LayerAdaptive(),
    # Epoch 2 is one of analysis; 3 and 4 are amplified, and 3 is one of analysis again.
    "GradientAmplification": GradientAmplification(
        Directionality("G", threshold=0.5, reselect=2), [Phase(1, False), Phase(6, True)]
    ),
}


def network(seed: int = 1) -> nn.Sequential:
    """Three layers that have parameters: first, second, head."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = OrderedDict(
            first=nn.Linear(6, 8), bend=nn.Tanh(), second=nn.Linear(8, 5), again=nn.Tanh(), head=nn.Linear(5, 3)
        )
        return nn.Sequential(layers)


def examples() -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(BATCH * BATCHES, 6, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long())


def batches() -> list[tuple[Tensor, Tensor]]:
    inputs, labels = examples().tensors
    return list(zip(inputs.split(BATCH), labels.split(BATCH), strict=True))


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    inputs, labels = batch
    return functional.cross_entropy(model(inputs), labels)


def momentum(parameters: Any, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=0.01)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    adapter: LayerwiseLR | None,
    *,
    epochs: int = 3,
    accumulate: int = 1,
    clip: float | None = None,
    half: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    scheduler: Any = None,
) -> nn.Module:
    """Train as the PyTorch documentation does it; the last batch of an epoch is always followed by a step."""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(epochs):
        for number, batch in enumerate(batches(), start=1):
            with torch.autocast("cpu", half, cache_enabled=False) if half else nullcontext():
                loss = loss_of(model, batch)
            scaler.scale(loss / accumulate).backward()
            if number % accumulate and number != BATCHES:
                continue
            if clip is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
        if adapter is not None:
            adapter.end_epoch()
    return model
