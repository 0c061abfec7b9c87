"""The gain of normalisation layers, channel by channel."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .layers import Layer
from .tensors import local, moved


def check_alike(layers: Sequence[Layer], needs: Collection[str]) -> None:
    """Raise if processes would find other gains each, from running variances of their own batches.

    Raises:
        ValueError: A rule asks for gains, several processes train, and a batch normalisation is not synchronised.
    """
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if "normalisation_gain" not in needs or not several or torch.distributed.get_world_size() == 1:
        return
    for layer in layers:
        module: Any = layer.module
        batch = isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
        if batch and module.running_var is not None and not any(layer.pieces):
            raise ValueError(
                f"layer {layer.name!r} keeps a running variance of its own in each process, so the processes would "
                "find other factors each and drift apart; use torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)"
            )


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
        variance = (
            moved(variance, weight.device) if piece is None else moved(local(piece.of(variance, weight)), gains.device)
        )
        gains = gains / (variance.to(dtype) + module.eps)
    return gains.sum() / (weight.numel() if piece is None else piece.shape.numel())
