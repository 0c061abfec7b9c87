"""What rules need that remember older gradients or weights: copies by parameter, and norms of layers of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._norms import JointNorms, tensor_norms
from .._tensors import as_dense_real, has_values, moved
from ..layers import Layer
from ..statistics import Gradients, common_device
from .base import Rule
from .state import State, described

COPIES = "copies"
"""The entry of the state with a tensor for each parameter."""


def refuse_shards(layers: Sequence[Layer], rule: Rule, remedy: str) -> None:
    """Raise a ValueError if parameters are sharded, whose statistic would be that of this process's part alone."""
    if any(shard is not None for layer in layers for shard in layer.shards):
        raise ValueError(f"{described(rule)} measures whole tensors, and the parameters are sharded: {remedy}")


def keys_of(layers: Sequence[Layer]) -> list[str]:
    """Return a name for each parameter's copy; it does not begin with an underscore, as a parameter's name may."""
    return [
        f"/{name}"
        for layer in layers
        for name in (layer.parameter_names or [f"{layer.name}.{i}" for i in range(len(layer.parameters))])
    ]


def wide(tensor: Tensor) -> torch.dtype:
    """Return the type in which a tensor's copy is kept: float32, or float64 as it is."""
    return torch.float64 if tensor.dtype in (torch.float64, torch.complex128) else torch.float32


def no_copies(layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Return zeros for the gradient of each parameter."""
    zeros: list[Tensor] = []
    for p in (p for layer in layers for p in layer.parameters):
        shape = (*p.shape, 2) if p.is_complex() else p.shape
        zeros.append(torch.zeros(shape, dtype=wide(p), device=p.device))
    return dict(zip(keys_of(layers), zeros, strict=True))


def weights_copied(layers: Sequence[Layer], keys: Sequence[str]) -> dict[str, Tensor]:
    """Return a copy of each parameter."""
    return dict(zip(keys, [p.detach().clone() for layer in layers for p in layer.parameters], strict=True))


def dense(gradient: Tensor) -> Tensor:
    """Return a gradient with its zeros if it is sparse, and as real numbers.

    Example:
        >>> dense(torch.tensor([0.0, 2.0]).to_sparse())
        tensor([0., 2.])
    """
    own = gradient.detach()
    return as_dense_real(own if own.layout is torch.strided else own.to_dense())


def gradients_copied(gradients: Gradients, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy of each gradient without the factor of a gradient scaler; zeros for a missing one.

    Args:
        gradients: This step's gradients.
        before: The copies of the step before, whose names and types are kept.
    """
    copies: list[Tensor] = []
    for gradient, old in zip(gradients.tensors, before.values(), strict=True):
        if gradient is None:
            copies.append(torch.zeros_like(old))
        else:
            copies.append(dense(gradient).to(old.dtype))
    scale: Any = 1.0 if gradients.scale is None else gradients.scale.to(torch.float64).reciprocal()
    if isinstance(scale, Tensor) and any(one.device != scale.device for one in copies):
        scaled = [one * moved(scale, one.device) for one in copies]
    else:
        scaled = list(torch._foreach_mul(copies, scale))
    return dict(zip(before, scaled, strict=True))


class LayerNorms:
    """Measures norms of layers from tensors, one for each parameter.

    Example:
        >>> norms = LayerNorms([Layer("", (torch.zeros(1), torch.zeros(1)))])
        >>> norms.of([torch.tensor([3.0]), torch.tensor([4.0])])
        [tensor([5.], dtype=torch.float64)]
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._device, dtype = common_device(layers)
        self._zeros = torch.zeros(len(layers), dtype=dtype, device=self._device)
        self._owners = [number for number, layer in enumerate(layers) for _ in layer.parameters]
        self._joint: dict[tuple[int, ...], JointNorms] = {}

    def of(self, *rows: Sequence[Tensor]) -> list[Tensor]:
        """Return the norms of the layers for each row of tensors, with one measurement for all of them."""
        norms, order = tensor_norms([tensor for row in rows for tensor in row], self._device)
        key = tuple(order)
        if key not in self._joint:
            self._joint.clear()
            position_of, count = {tensor: at for at, tensor in enumerate(order)}, len(self._owners)
            entries = [
                (position_of[row * count + i], row, owner, 1.0)
                for row in range(len(rows))
                for i, owner in enumerate(self._owners)
            ]
            self._joint[key] = JointNorms(entries, len(rows), self._zeros)
        return list(self._joint[key].of(norms))


class RemembersTensors(Rule):
    """A rule whose state holds a copy of each parameter or gradient under `COPIES`."""

    compares_layers = False

    def renewed(self, layers: Sequence[Layer], device: torch.device, state: State, old_names: Sequence[str]) -> State:
        """Return the state for new layers; copies are carried over by the parameters' names, not by layers."""
        kept: dict[str, Tensor] = state.get(COPIES, {})
        rest = {name: value for name, value in state.items() if name != COPIES}
        result = super().renewed(layers, device, rest, old_names)
        copies = {
            key: moved(kept[key], fresh.device)
            if key in kept and kept[key].shape == fresh.shape and has_values(kept[key])
            else fresh
            for key, fresh in result[COPIES].items()
        }
        return {**result, COPIES: copies}
