"""What follows from the shapes of a layer's parameters alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..layers import Layer, inputs_first
from ..statistics import common_device


def sizes_of(layers: Sequence[Layer]) -> Tensor:
    """Return n_l, the number of each layer's weights."""
    device, dtype = common_device(layers)
    return torch.tensor([sum(p.numel() for p in layer.whole()) for layer in layers], dtype=dtype, device=device)


def largest_of(layer: Layer) -> tuple[str, Tensor]:
    """Return the name and a tensor of the whole shape of a layer's largest parameter."""
    names = layer.parameter_names or (layer.name,) * len(layer.parameters)
    return max(zip(names, layer.whole(), strict=True), key=lambda pair: pair[1].numel())


def shape_of(layer: Layer) -> tuple[int, int]:
    """Return (d_out, d_in) of a layer's largest parameter; (n, 1) if it has one dimension or none.

    The convention of the owning class decides, not the position of a dimension: `nn.Linear` holds d_out × d_in, a
    transposed convolution d_in × d_out/groups, an embedding vocabulary × width, Hugging Face's `Conv1D` d_in × d_out.

    Example:
        >>> conv = torch.nn.ConvTranspose2d(6, 4, 3, groups=2)
        >>> shape_of(Layer("", tuple(conv.parameters()), module=conv))
        (4, 27)
    """
    largest = largest_of(layer)[1]
    if largest.ndim < 2:
        return largest.numel(), 1
    first, second, *kernel = largest.shape
    if inputs_first(layer.module):
        groups: int = getattr(layer.module, "groups", 1)
        return second * groups, first // groups * math.prod(kernel)
    return first, second * math.prod(kernel)
