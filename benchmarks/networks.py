"""The networks that the benchmarks run on."""

from __future__ import annotations

import torch
from torch import nn

from layerwise.lab.models.transformer import TransformerLanguageModel


def resnet_parameters(depths: tuple[int, int, int, int]) -> nn.Module:
    """Return modules with the parameters of an ImageNet ResNet of bottleneck blocks."""
    torch.manual_seed(0)
    modules: list[nn.Module] = [nn.Conv2d(3, 64, 7, bias=False), nn.BatchNorm2d(64)]
    width = 64
    for planes, blocks in zip((64, 128, 256, 512), depths, strict=True):
        for block in range(blocks):
            for channels_in, channels, size in ((width, planes, 1), (planes, planes, 3), (planes, 4 * planes, 1)):
                modules += [nn.Conv2d(channels_in, channels, size, bias=False), nn.BatchNorm2d(channels)]
            if block == 0:
                modules += [nn.Conv2d(width, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)]
            width = 4 * planes
    return nn.Sequential(*modules, nn.Linear(2048, 1000))


def resnet50_parameters() -> nn.Module:
    """161 tensors, 25,557,032 numbers, 107 layers."""
    return resnet_parameters((3, 4, 6, 3))


def resnet101_parameters() -> nn.Module:
    """314 tensors, 44,549,160 numbers, 209 layers."""
    return resnet_parameters((3, 4, 23, 3))


def small_layers(count: int = 1000, size: int = 64) -> nn.Module:
    """Layers of 64 numbers each."""
    return nn.Sequential(*(nn.Linear(size // 4, 4, bias=False) for _ in range(count)))


def transformer_parameters(depth: int = 24, width: int = 512) -> nn.Module:
    """A language model of 24 blocks: 78 million numbers, 147 layers."""
    return TransformerLanguageModel(seed=0, vocabulary=4096, context=256, width=width, depth=depth, heads=8)


def with_gradients(model: nn.Module) -> nn.Module:
    """Give every parameter a gradient."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = 1e-2 * torch.randn(p.shape, generator=generator)
    return model
