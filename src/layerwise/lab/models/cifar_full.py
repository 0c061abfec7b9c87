"""Caffe's two CIFAR-10 networks; the full one is that of the experiments of Singh et al. 2015.

The paper calls all three pooling layers max pooling, but also says that the architecture is Caffe's, where the
second and the third take the mean: so do these. All windows are 3 x 3 with stride 2 and the last one may hang over
the edge, so that 32 pixels become 16, 8 and 4; a mean is then over the pixels inside the image.

Both are faster in the memory format ``torch.channels_last``.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from layerwise.lab.models import check_sizes
from layerwise.lab.models.caffe_layers import CaffeNetwork, LayerValues, max_pool, normalise_within_channel


class CifarFull(CaffeNetwork):
    """Three convolutions of 5 x 5, two of them followed by normalisation, and one fully connected layer.

    conv1 32, max pooling, ReLU, normalisation; conv2 32, ReLU, mean pooling, normalisation; conv3 64, ReLU, mean
    pooling; ip1. 89,578 parameters with 10 classes. Every number is that of Caffe cifar10_full_train_test.prototxt,
    which gives conv3 no multipliers.
    """

    values: ClassVar = {
        "conv1": LayerValues(0.0001, lr_mult=(1.0, 2.0)),
        "conv2": LayerValues(0.01, lr_mult=(1.0, 2.0)),
        "conv3": LayerValues(0.01),
        "ip1": LayerValues(0.01, lr_mult=(1.0, 2.0), decay_mult=(250.0, 0.0)),
    }

    def __init__(self, seed: int, *, classes: int = 10) -> None:
        check_sizes(classes=classes)
        super().__init__()
        with torch.device("meta"):
            self.conv1 = nn.Conv2d(3, 32, 5, padding=2)
            self.conv2 = nn.Conv2d(32, 32, 5, padding=2)
            self.conv3 = nn.Conv2d(32, 64, 5, padding=2)
            self.ip1 = nn.Linear(64 * 4 * 4, classes)
        self.fill(seed)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Score float32 of shape (n, 3, 32, 32), raw bytes minus the mean image, not scaled."""
        hidden = _normalise(functional.relu(max_pool(self.conv1(pixels))))
        hidden = _normalise(_mean_pool(functional.relu(self.conv2(hidden))))
        hidden = _mean_pool(functional.relu(self.conv3(hidden)))
        return self.ip1(hidden.flatten(1))


class CifarQuick(CaffeNetwork):
    """Three convolutions of 5 x 5 and two fully connected layers without a ReLU between them.

    conv1 32, max pooling, ReLU; conv2 32, ReLU, mean pooling; conv3 64, ReLU, mean pooling; ip1 64; ip2. 145,578
    parameters with 10 classes. Every number is that of Caffe cifar10_quick_train_test.prototxt.
    """

    values: ClassVar = {
        "conv1": LayerValues(0.0001, lr_mult=(1.0, 2.0)),
        "conv2": LayerValues(0.01, lr_mult=(1.0, 2.0)),
        "conv3": LayerValues(0.01, lr_mult=(1.0, 2.0)),
        "ip1": LayerValues(0.1, lr_mult=(1.0, 2.0)),
        "ip2": LayerValues(0.1, lr_mult=(1.0, 2.0)),
    }

    def __init__(self, seed: int, *, classes: int = 10) -> None:
        check_sizes(classes=classes)
        super().__init__()
        with torch.device("meta"):
            self.conv1 = nn.Conv2d(3, 32, 5, padding=2)
            self.conv2 = nn.Conv2d(32, 32, 5, padding=2)
            self.conv3 = nn.Conv2d(32, 64, 5, padding=2)
            self.ip1 = nn.Linear(64 * 4 * 4, 64)
            self.ip2 = nn.Linear(64, classes)
        self.fill(seed)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Score the same inputs as ``CifarFull``."""
        hidden = functional.relu(max_pool(self.conv1(pixels)))
        hidden = _mean_pool(functional.relu(self.conv2(hidden)))
        hidden = _mean_pool(functional.relu(self.conv3(hidden)))
        return self.ip2(self.ip1(hidden.flatten(1)))


def _mean_pool(hidden: torch.Tensor) -> torch.Tensor:
    return functional.avg_pool2d(hidden, 3, 2, ceil_mode=True)


def _normalise(hidden: torch.Tensor) -> torch.Tensor:
    return normalise_within_channel(hidden, size=3, alpha=5e-5, beta=0.75)
