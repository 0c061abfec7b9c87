"""Caffe's AlexNet, the network of the ImageNet experiment of Singh et al. 2015."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from layerwise.lab.errors import UsageError
from layerwise.lab.models import check_sizes
from layerwise.lab.models.caffe_layers import CaffeNetwork, LayerValues, max_pool, normalise_across_channels

SIDE = 227  # pixels of a side of the input, crop_size in Caffe bvlc_alexnet/train_val.prototxt
_values = partial(LayerValues, lr_mult=(1.0, 2.0), decay_mult=(1.0, 0.0))


class AlexNet(CaffeNetwork):
    """Five convolutions and three fully connected layers; the second, fourth and fifth convolution in two halves.

    conv1 96 of 11 x 11, stride 4; conv2 256 of 5 x 5; conv3 384, conv4 384 and conv5 256 of 3 x 3; fc6 and fc7 4096;
    fc8. ReLU after all but the last; after it normalisation across channels and max pooling (conv1, conv2), max
    pooling (conv5), dropout of 0.5 (fc6, fc7). 60,965,224 parameters with 1000 classes. Every number is that of Caffe
    bvlc_alexnet/train_val.prototxt. ``width`` multiplies the outputs of all layers but the last, for small machines;
    the distributions of the initial weights stay those of the full network.
    """

    values: ClassVar = {
        "conv1": _values(0.01, 0.0),
        "conv2": _values(0.01, 0.1),
        "conv3": _values(0.01, 0.0),
        "conv4": _values(0.01, 0.1),
        "conv5": _values(0.01, 0.1),
        "fc6": _values(0.005, 0.1),
        "fc7": _values(0.005, 0.1),
        "fc8": _values(0.01, 0.0),
    }

    def __init__(self, seed: int, *, classes: int = 1000, width: float = 1.0) -> None:
        check_sizes(classes=classes)
        # Both 96 and 256 channels have two equal halves in steps of a sixteenth, and in no smaller ones.
        if not (width > 0 and float(16 * width).is_integer()):
            raise UsageError(
                f"width={width!r}: use a positive multiple of 1/16 (0.0625), so that all channels come in two halves"
            )
        super().__init__()
        channels_96, channels_256, channels_384, units = (int(width * size) for size in (96, 256, 384, 4096))
        with torch.device("meta"):
            self.conv1 = nn.Conv2d(3, channels_96, 11, stride=4)
            self.conv2 = nn.Conv2d(channels_96, channels_256, 5, padding=2, groups=2)
            self.conv3 = nn.Conv2d(channels_256, channels_384, 3, padding=1)
            self.conv4 = nn.Conv2d(channels_384, channels_384, 3, padding=1, groups=2)
            self.conv5 = nn.Conv2d(channels_384, channels_256, 3, padding=1, groups=2)
            self.fc6 = nn.Linear(channels_256 * 6 * 6, units)
            self.fc7 = nn.Linear(units, units)
            self.fc8 = nn.Linear(units, classes)
        self.fill(seed)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Score bytes minus the mean image, not scaled, shape (n, 3, 227, 227); dropout draws from the global state."""
        hidden = max_pool(_normalise(functional.relu(self.conv1(pixels))))
        hidden = max_pool(_normalise(functional.relu(self.conv2(hidden))))
        hidden = functional.relu(self.conv3(hidden))
        hidden = functional.relu(self.conv4(hidden))
        hidden = max_pool(functional.relu(self.conv5(hidden)))
        hidden = functional.dropout(functional.relu(self.fc6(hidden.flatten(1))), 0.5, self.training)
        hidden = functional.dropout(functional.relu(self.fc7(hidden)), 0.5, self.training)
        return self.fc8(hidden)


def _normalise(hidden: torch.Tensor) -> torch.Tensor:
    return normalise_across_channels(hidden, size=5, alpha=1e-4, beta=0.75)
