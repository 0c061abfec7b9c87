"""A small vision transformer, after Dosovitskiy et al. 2020, arXiv 2010.11929; its blocks are in ``transformer.py``."""

from __future__ import annotations

import torch
from torch import nn

from layerwise.lab.errors import UsageError
from layerwise.lab.models import check_sizes, seeded
from layerwise.lab.models.transformer import DEVIATION, blocks


class VisionTransformer(nn.Module):
    """Patches and a class token with learned positions, blocks, normalisation, and scores from the class token.

    The root owns ``class_token`` and ``position``, as in the networks that BEiT fine-tunes; then come patches, six
    modules a block, norm, head. (s + 1) w + w + (p + 1) w + depth (12 w² + 13 w) + 2 w + k (w + 1) parameters for p
    patches of s numbers, k classes and a width w: 105,098 with the defaults. ``side`` and ``patch`` are pixels.
    """

    def __init__(
        self,
        seed: int,
        classes: int = 10,
        *,
        side: int = 28,
        patch: int = 7,
        channels: int = 1,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
    ) -> None:
        check_sizes(classes=classes, side=side, patch=patch, channels=channels, width=width, depth=depth, heads=heads)
        if side % patch:
            raise UsageError(f"patch={patch!r} with side={side!r}: use a side of a patch that divides the image's")
        super().__init__()
        with seeded(seed):
            self.class_token = nn.Parameter(torch.zeros(1, 1, width))
            self.position = nn.Parameter(torch.empty(1, (side // patch) ** 2 + 1, width).normal_(std=DEVIATION))
            self.patches = nn.Conv2d(channels, width, patch, stride=patch)
            self.blocks = blocks(depth, width, heads, causal=False)
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, classes)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Score float32 of shape (n, channels, side, side)."""
        patches = self.patches(pixels).flatten(2).transpose(1, 2)
        hidden = torch.cat([self.class_token.expand(len(pixels), -1, -1), patches], dim=1) + self.position
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden[:, 0]))
