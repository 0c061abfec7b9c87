"""VGG-19 for images of 32 x 32 pixels, a network of Basodi et al. 2023, tables 1 to 4.

The paper names the network and not its layout. Its running times fit the layout of kuangliu/pytorch-cifar
(inferred): the sixteen 3 x 3 convolutions of Simonyan and Zisserman 2014, table 1, column E, each with a bias
and followed by batch normalisation, and one fully connected layer instead of three.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from layerwise.lab.models import check_sizes, seeded

STAGES = ((1, 2), (2, 2), (4, 4), (8, 4), (8, 4))
"""Stage -> channels as a multiple of the width, convolutions. Simonyan and Zisserman 2014, table 1, column E."""


class VGG19(nn.Module):
    """Sixteen convolutions in five stages, each stage closed by max pooling, then one fully connected layer.

    Stage s holds conv{s}_1, bn{s}_1, ReLU, conv{s}_2, ... and pool{s}. 33 parametric modules, 66 parameter tensors;
    20,040,522 parameters at width 64, the channels of the first stage, with 10 classes.
    """

    def __init__(self, seed: int, classes: int = 10, width: int = 64, *, channels: int = 3) -> None:
        check_sizes(classes=classes, width=width, channels=channels)
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        with seeded(seed):
            for stage, (multiple, depth) in enumerate(STAGES, start=1):
                for position in range(1, depth + 1):
                    layers[f"conv{stage}_{position}"] = nn.Conv2d(channels, multiple * width, 3, padding=1)
                    layers[f"bn{stage}_{position}"] = nn.BatchNorm2d(multiple * width)
                    layers[f"relu{stage}_{position}"] = nn.ReLU()
                    channels = multiple * width
                layers[f"pool{stage}"] = nn.MaxPool2d(2, 2)
            self.features = nn.Sequential(layers)
            self.fc = nn.Linear(channels, classes)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Score float32 of shape (n, channels, 32, 32), of which the stages make one pixel."""
        return self.fc(self.features(pixels).flatten(1))
