"""A small convolutional network with group normalisation, to be trained before it is fine-tuned."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

from layerwise.lab.errors import UsageError
from layerwise.lab.models import check_sizes, seeded

GROUPS = 4


class Block(nn.Module):
    """A convolution of 3 x 3, group normalisation, ReLU and max pooling of 2 x 2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = nn.GroupNorm(GROUPS, outputs)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Halve the sides."""
        return functional.max_pool2d(functional.relu(self.norm(self.conv(hidden))), 2)


class SmallCNN(nn.Module):
    """Three blocks, and scores of the mean over positions.

    blocks.{0, 1, 2}.conv and .norm, head; widths w, 2 w and 4 w: 9 w (c + 10 w) + 21 w + 4 w k + k parameters for c
    channels and k classes. ``width`` is a multiple of 4, for the groups.
    """

    def __init__(self, seed: int, classes: int = 10, *, channels: int = 3, width: int = 16) -> None:
        check_sizes(classes=classes, channels=channels, width=width)
        if width % GROUPS:
            raise UsageError(f"width={width!r}: use a multiple of {GROUPS}, into which it normalises channels")
        super().__init__()
        with seeded(seed):
            sizes = pairwise((channels, width, 2 * width, 4 * width))
            self.blocks = nn.Sequential(*(Block(before, after) for before, after in sizes))
            self.head = nn.Linear(4 * width, classes)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Score float32 of shape (n, channels, height, width), sides of 8 or more."""
        return self.head(self.blocks(pixels).mean((2, 3)))
