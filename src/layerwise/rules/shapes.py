"""What follows from the shapes of a layer's parameters alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers import Layer
from ..statistics import common_device


def sizes_of(layers: Sequence[Layer]) -> Tensor:
    """Return n_l, the number of each layer's weights."""
    device, dtype = common_device(layers)
    return torch.tensor([sum(p.numel() for p in layer.whole()) for layer in layers], dtype=dtype, device=device)


def shape_of(layer: Layer) -> tuple[int, int]:
    """Return (d_out, d_in) of a layer's largest parameter; (n, 1) if it has one dimension or none.

    The convention of the owning class decides, not the position of a dimension: `nn.Linear` holds d_out × d_in, a
    transposed convolution d_in × d_out/groups, an embedding vocabulary × width, Hugging Face's `Conv1D` d_in × d_out.

    Example:
        >>> conv = nn.ConvTranspose2d(6, 4, 3, groups=2)
        >>> shape_of(Layer("", tuple(conv.parameters()), module=conv))
        (4, 27)
    """
    largest = max(layer.whole(), key=Tensor.numel)
    if largest.ndim < 2:
        return largest.numel(), 1
    module, first, second = layer.module, largest.shape[0], largest.shape[1]
    kernel = largest[0, 0].numel()
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return second * module.groups, first // module.groups * kernel
    if type(module).__name__ == "Conv1D":
        return second, first
    return first, second * kernel
