"""Caffe's LeNet, the network of the MNIST experiments of Singh et al. 2015, section IV."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional


def caffe_xavier_(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Fill a weight, shape (outputs, ...), as Caffe's ``xavier`` filler does by default (variance_norm FAN_IN).

    Uniform on (-a, a) with a = sqrt(3 / fan_in), fan_in the inputs of one output unit; PyTorch's ``xavier_uniform_``
    divides 6 by fan_in + fan_out. Caffe include/caffe/filler.hpp, class XavierFiller.
    """
    bound = math.sqrt(3.0 / (weight.numel() / weight.shape[0]))
    with torch.no_grad():
        return weight.uniform_(-bound, bound, generator=generator)


class LeNet(nn.Module):
    """Two convolutions, each followed by max pooling and by no ReLU, then two fully connected layers.

    conv1 20 of 5 x 5, pool 2; conv2 50 of 5 x 5, pool 2; ip1 500, ReLU; ip2 10. 431,080 parameters. Layers
    are called as in Caffe lenet_train_test.prototxt ("ip" for inner product); biases begin at 0.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.ip1 = nn.Linear(800, 500)
        self.ip2 = nn.Linear(500, 10)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("weight"):
                caffe_xavier_(parameter, generator)
            else:
                nn.init.zeros_(parameter)

    @property
    def multipliers(self) -> dict[str, tuple[float, float]]:
        """Parameter name -> (lr_mult, decay_mult), Caffe lenet_train_test.prototxt, which gives no decay_mult."""
        return {name: (2.0 if name.endswith("bias") else 1.0, 1.0) for name, _ in self.named_parameters()}

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Score float32 of shape (n, 1, 28, 28), raw bytes / 256."""
        hidden = functional.max_pool2d(self.conv1(pixels), 2, 2)
        hidden = functional.max_pool2d(self.conv2(hidden), 2, 2)
        hidden = functional.relu(self.ip1(hidden.flatten(1)))
        return self.ip2(hidden)
