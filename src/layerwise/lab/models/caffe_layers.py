"""What networks written for Caffe need and PyTorch has not: fillers, multipliers of a layer, normalisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True)
class LayerValues:
    """What a prototxt says of a layer's weight and bias besides their shapes.

    Attributes:
        std: of the weight's filler, "gaussian" with mean 0.
        bias: what the bias is filled with.
        lr_mult: multipliers of the base rate, of weight and bias; 1 where the prototxt gives none.
        decay_mult: the same of the weight decay.

    Reference:
        Caffe caffe.proto, messages FillerParameter and ParamSpec.
    """

    std: float
    bias: float = 0.0
    _: KW_ONLY
    lr_mult: tuple[float, float] = (1.0, 1.0)
    decay_mult: tuple[float, float] = (1.0, 1.0)


def materialise_(model: nn.Module, layers: Mapping[str, LayerValues], seed: int) -> None:
    """Give a network made on the device ``meta`` its memory, on the CPU, and fill it as Caffe's fillers do.

    weight ~ N(0, std^2), layer after layer from one generator; bias = a constant.

    Building on ``meta`` first draws none of PyTorch's own initial weights: that would take longer than the rest
    for AlexNet, and would change the global random state.

    Args:
        model: its parameters are ``<layer>.weight`` and ``<layer>.bias``, and it has no buffers.
        layers: name -> values of every layer with parameters.
        seed: of the weights, the same on every device since they are drawn on the CPU.

    Reference:
        Caffe include/caffe/filler.hpp, classes GaussianFiller and ConstantFiller.
    """
    model.to_empty(device="cpu")
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for name, values in layers.items():
            model.get_parameter(f"{name}.weight").normal_(0.0, values.std, generator=generator)
            model.get_parameter(f"{name}.bias").fill_(values.bias)


def multipliers_of(layers: Mapping[str, LayerValues]) -> dict[str, tuple[float, float]]:
    """Give the multipliers by the names that ``named_parameters`` gives.

    Args:
        layers: name -> values of every layer with parameters.

    Returns:
        Parameter name -> (lr_mult, decay_mult).
    """
    return {
        f"{name}.{part}": (values.lr_mult[index], values.decay_mult[index])
        for name, values in layers.items()
        for index, part in enumerate(("weight", "bias"))
    }


def normalise_within_channel(hidden: torch.Tensor, *, size: int, alpha: float, beta: float) -> torch.Tensor:
    """Divide each number by the strength of its neighbourhood in the same channel.

    y = x (1 + alpha mean(x^2))^(-beta); the mean is over size x size pixels around x, and counts those outside the
    image as zeros: the sum is always divided by size^2.

    Args:
        hidden: shape (n, channels, height, width).
        size: side of the neighbourhood, odd.
        alpha: weight of the mean.
        beta: exponent.

    Returns:
        Shape of ``hidden``.

    Raises:
        ValueError: size is even or below 1.

    Reference:
        Caffe src/caffe/layers/lrn_layer.cpp, WithinChannelForward (its k is not used there and stands at 1).
    """
    _require_centre(size)
    mean = functional.avg_pool2d(hidden * hidden, size, 1, size // 2)
    return hidden * (1.0 + alpha * mean) ** -beta


def normalise_across_channels(hidden: torch.Tensor, *, size: int, alpha: float, beta: float) -> torch.Tensor:
    """Divide each number by the strength of the same pixel in neighbouring channels.

    y = x (1 + alpha / size * sum(x^2))^(-beta); the sum is over size channels with that of x in their middle.

    Args:
        hidden: shape (n, channels, height, width).
        size: channels of the neighbourhood, odd.
        alpha: weight of the mean.
        beta: exponent.

    Returns:
        Shape of ``hidden``.

    Raises:
        ValueError: size is even or below 1.

    Reference:
        Caffe src/caffe/layers/lrn_layer.cpp, CrossChannelForward_cpu, with k = 1.
    """
    _require_centre(size)
    return functional.local_response_norm(hidden, size, alpha, beta, 1.0)


def _require_centre(size: int) -> None:
    if size < 1 or size % 2 == 0:
        raise ValueError(f"size={size!r}: use an odd whole number from 1, so that the neighbourhood has a middle")
