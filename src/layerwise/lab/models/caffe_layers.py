"""What networks written for Caffe need and PyTorch has not: fillers, multipliers of a layer, normalisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True)
class LayerValues:
    """What a prototxt says of a layer's weight and bias besides their shapes.

    Caffe caffe.proto, messages FillerParameter and ParamSpec.
    """

    std: float  # of the weight's filler, "gaussian" with mean 0
    bias: float = 0.0
    _: KW_ONLY
    lr_mult: tuple[float, float] = (1.0, 1.0)  # multipliers of the base rate, of weight and bias
    decay_mult: tuple[float, float] = (1.0, 1.0)


class CaffeNetwork(nn.Module):
    """A network whose layers are called as in its prototxt, without buffers; see ``values``."""

    values: ClassVar[Mapping[str, LayerValues]]
    """Name -> values of every layer with parameters, in order."""

    def fill(self, seed: int) -> None:
        """Give a network that was made on the device ``meta`` its memory, on the CPU, and fill it as Caffe does.

        weight ~ N(0, std²), layer after layer from one generator; bias = a constant. Caffe include/caffe/filler.hpp,
        classes GaussianFiller and ConstantFiller. Building on ``meta`` first draws none of PyTorch's own initial
        weights: that would take longer than the rest for AlexNet, and would change the global random state.
        """
        self.to_empty(device="cpu")
        generator = torch.Generator("cpu").manual_seed(seed)
        with torch.no_grad():
            for name, values in self.values.items():
                self.get_parameter(f"{name}.weight").normal_(0.0, values.std, generator=generator)
                self.get_parameter(f"{name}.bias").fill_(values.bias)

    @property
    def multipliers(self) -> dict[str, tuple[float, float]]:
        """Parameter name -> (lr_mult, decay_mult), of the prototxt."""
        return {
            f"{name}.{part}": (values.lr_mult[index], values.decay_mult[index])
            for name, values in self.values.items()
            for index, part in enumerate(("weight", "bias"))
        }


def normalise_within_channel(hidden: torch.Tensor, *, size: int, alpha: float, beta: float) -> torch.Tensor:
    """Divide each number by the strength of its neighbourhood: y = x (1 + alpha mean(x²))^(-beta).

    The mean is over size x size pixels of the same channel around x, size odd, and counts those outside the image as
    zeros. Caffe src/caffe/layers/lrn_layer.cpp, WithinChannelForward (its k is not used there and stands at 1).
    """
    mean = functional.avg_pool2d(hidden * hidden, size, 1, size // 2)
    return hidden * (1.0 + alpha * mean) ** -beta


def normalise_across_channels(hidden: torch.Tensor, *, size: int, alpha: float, beta: float) -> torch.Tensor:
    """Divide each number by the strength of the same pixel in size channels around x, size odd.

    y = x (1 + alpha / size * sum(x²))^(-beta). Caffe src/caffe/layers/lrn_layer.cpp, CrossChannelForward_cpu, k = 1.
    """
    return functional.local_response_norm(hidden, size, alpha, beta, 1.0)


def max_pool(hidden: torch.Tensor) -> torch.Tensor:
    """Pool 3 x 3 pixels with stride 2; the last window may hang over the edge."""
    return functional.max_pool2d(hidden, 3, 2, ceil_mode=True)
