"""The networks that the benchmarks run on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn, optim
from torch.nn import functional as F

import layerwise
from layerwise.lab.models.lenet import LeNet
from layerwise.rules import LayerAdaptive


def resnet50_parameters(seed: int = 0) -> nn.Module:
    """Return modules with the 161 parameters of ResNet-50 (25,557,032 numbers, 107 layers) and gradients."""
    torch.manual_seed(seed)
    modules: list[nn.Module] = [nn.Conv2d(3, 64, 7, bias=False), nn.BatchNorm2d(64)]
    width = 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for channels_in, channels, size in ((width, planes, 1), (planes, planes, 3), (planes, 4 * planes, 1)):
                modules += [nn.Conv2d(channels_in, channels, size, bias=False), nn.BatchNorm2d(channels)]
            if block == 0:
                modules += [nn.Conv2d(width, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)]
            width = 4 * planes
    model = nn.Sequential(*modules, nn.Linear(2048, 1000))
    for p in model.parameters():
        p.grad = 1e-2 * torch.randn_like(p)
    return model


def lenet_iteration(*, attach: bool, batch: int = 64) -> Callable[[], None]:
    """Return one training iteration of LeNet with SGD as Caffe sets it."""
    torch.manual_seed(0)
    model: nn.Module = LeNet(seed=0)
    model = model.to(memory_format=torch.channels_last)
    images = torch.rand(batch, 1, 28, 28).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,))
    optimizer = optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    if attach:
        layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)

    def iteration() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return iteration
