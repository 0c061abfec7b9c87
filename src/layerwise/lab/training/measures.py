"""What a run measures of each layer, now and then, without changing the training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import nn

from layerwise._norms import subtract, tensor_norms
from layerwise.layers import Layer, make_layers, named_parameters_of


class LayerMeasures:
    """Norms of each layer around one update: ‖g‖, ‖w‖ and ‖w_after - w_before‖ / ‖w_before‖ over its parameters.

    In float64 from norms of the tensors. A measured step costs a copy of the parameters and three passes over them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self.layers: list[Layer] = make_layers(named_parameters_of(optimizer, model), "module", model)
        self.names = [layer.name for layer in self.layers]
        self._parameters = [p for layer in self.layers for p in layer.parameters]
        self._optimizer = optimizer
        self._before: list[torch.Tensor] = []
        self._gradients: dict[str, float] = {}

    def rates(self) -> dict[str, float]:
        """Give the rate of each layer: that of the group of its first parameter, its weight as a rule."""
        group_of = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        return {layer.name: float(group_of[id(layer.parameters[0])]["lr"]) for layer in self.layers}

    def before(self) -> None:
        """Take the gradients' norms, and copies of the weights; call it after the backward pass."""
        with torch.no_grad():
            gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self._parameters]
            self._gradients = self._joined(gradients)
            self._before = [p.detach().clone() for p in self._parameters]

    def after(self) -> dict[str, dict[str, float]]:
        """Give gradient_norm, weight_norm and update_ratio of each layer; call it after the update."""
        with torch.no_grad():
            weights = self._joined(self._before)
            updates = self._joined(subtract(self._before, self._parameters, in_place=True))
        self._before = []
        ratios = {name: updates[name] / weights[name] if weights[name] > 0 else 0.0 for name in weights}
        return {"gradient_norm": self._gradients, "weight_norm": weights, "update_ratio": ratios}

    def _joined(self, tensors: Sequence[torch.Tensor]) -> dict[str, float]:
        measured, order = tensor_norms(tensors, tensors[0].device)
        norms = iter([norm for _, norm in sorted(zip(order, measured.tolist(), strict=True))])
        return {
            layer.name: sum(norm * norm for norm in islice(norms, len(layer.parameters))) ** 0.5
            for layer in self.layers
        }
