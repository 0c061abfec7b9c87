"""A small convolutional network with group normalisation, for fine-tuning on few images."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from layerwise.lab.errors import UsageError
from layerwise.lab.models import check_sizes, seeded

GROUPS = 8
"""Groups of a normalisation; no statistics of a batch, so that few images are no worse estimated than many."""


class Block(nn.Module):
    """x ← relu(norm(maxpool(conv(x)))): half the height and width. 9 i o + 3 o parameters from i to o channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = nn.GroupNorm(GROUPS, outputs)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute the block; shape (n, channels, height, width)."""
        return functional.relu(self.norm(functional.max_pool2d(self.conv(hidden), 2)))


class SmallCNN(nn.Module):
    """Three blocks of w, 2 w and 4 w channels, the mean over all places, and scores.

    Modules that own parameters: blocks.0.conv, blocks.0.norm and so on, head. 9 w c + 90 w² + 21 w + (4 w + 1) k
    parameters for c channels, a width w and k classes: 94,986 with the defaults.
    """

    def __init__(self, seed: int, classes: int = 10, *, channels: int = 3, width: int = 32) -> None:
        check_sizes(classes=classes, channels=channels, width=width)
        if width % GROUPS:
            raise UsageError(f"width={width!r}: use a multiple of {GROUPS}, the groups of a normalisation")
        super().__init__()
        sizes = (channels, width, 2 * width, 4 * width)
        with seeded(seed):
            self.blocks = nn.ModuleList(map(Block, sizes[:-1], sizes[1:]))
            self.head = nn.Linear(4 * width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Score float32 of shape (n, channels, height, width), 8 pixels or more a side."""
        hidden = images
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.mean((2, 3)))
