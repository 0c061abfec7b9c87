"""The gain of normalisation layers, channel by channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .layers import Layer
from .tensors import local, moved


def gain_shares(layers: Sequence[Layer], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return what each parameter adds to the mean of γ²/σ² over its layer's channels, and which layers have one.

    Args:
        layers: The layers. Those whose module is a normalisation (it has an eps) and that hold its weight γ have a
            gain; σ² is the running variance plus eps, and 1 for normalisations that keep none.
        like: A tensor of the type and on the device of the result.

    Returns:
        The shares, one for each parameter of each layer in order (of γ only this process's channels count), and a Bool
        tensor, one for each layer.
    """
    shares = like.new_zeros(sum(len(layer.parameters) for layer in layers))
    has_gain = torch.zeros(len(layers), dtype=torch.bool, device=like.device)
    position = 0
    for number, layer in enumerate(layers):
        module: Any = layer.module
        weight: Any = getattr(module, "weight", None)
        for i, parameter in enumerate(layer.parameters):
            # Under layers="parameter" the gain is that of the layer with the weight.
            if hasattr(module, "eps") and parameter is weight:
                shares[position + i] = _gain_share(layer, i, like.dtype)
                has_gain[number] = True
        position += len(layer.parameters)
    return shares, has_gain


def _gain_share(layer: Layer, i: int, dtype: torch.dtype) -> Tensor:
    module: Any = layer.module
    weight, piece = layer.parameters[i], layer.pieces[i] if layer.pieces else None
    variance: Tensor | None = getattr(module, "running_var", None)
    gains = local(weight.detach()).to(dtype).square()
    if variance is not None:
        variance = moved(variance, weight.device) if piece is None else local(piece.of(variance, weight))
        gains = gains / (variance.to(dtype) + module.eps)
    return gains.sum() / (weight.numel() if piece is None else piece.shape.numel())
