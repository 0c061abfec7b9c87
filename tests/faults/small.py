"""Small networks of every kind and optimizers for them, on which any sequence of calls is made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn, optim

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "SGD": (optim.SGD, {"lr": 0.02, "weight_decay": 0.0}, {}),
    "SGD with decay": (optim.SGD, {"lr": 0.02, "weight_decay": 0.05}, {}),
    "momentum": (optim.SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.05}, {}),
    "momentum, foreach": (optim.SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.0}, {"foreach": True}),
    "dampening": (optim.SGD, {"lr": 0.02, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}, {}),
    "Nesterov": (optim.SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}, {}),
    "Adam": (optim.Adam, {"lr": 0.02, "weight_decay": 0.05, "eps": 1e-4}, {}),
    "AdamW": (optim.AdamW, {"lr": 0.02, "weight_decay": 0.05, "eps": 1e-4}, {}),
    "AdamW, fused": (optim.AdamW, {"lr": 0.02, "weight_decay": 0.05, "eps": 1e-4}, {"fused": True}),
    "Adagrad": (optim.Adagrad, {"lr": 0.02, "weight_decay": 0.05, "eps": 1e-4}, {}),
    "RMSprop": (optim.RMSprop, {"lr": 0.02, "weight_decay": 0.05, "eps": 1e-4, "momentum": 0.5}, {}),
}
NETWORKS = ("linear", "convolution", "batch normalisation", "embedding", "tied")


class Small(nn.Module):
    """A first layer, something between, a head; and a layer that the optimizer gets later."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        width = 4
        if kind == "convolution":
            self.first = nn.Conv1d(1, 2, 2)
            self.between = nn.Sequential(nn.GroupNorm(1, 2), nn.Flatten())
            width = 6
        elif kind in ("embedding", "tied"):
            self.first = nn.Embedding(5, 4)
            self.between = nn.Sequential(nn.LayerNorm(4))
        else:
            normalised = kind == "batch normalisation"
            self.first = nn.Linear(4, 4, bias=not normalised)  # its gradient would be rounding alone
            norm = nn.BatchNorm1d(4) if normalised else nn.Identity()
            self.between = nn.Sequential(norm, nn.Linear(4, 4))
        self.head = nn.Linear(width, 5)
        if kind == "tied":
            self.head.weight = self.first.weight
        self.later = nn.Linear(5, 2)
        self.double()

    def loss(self, step: int) -> Tensor:
        """A loss that is another one at each step."""
        generator = torch.Generator().manual_seed(step)
        if self.kind in ("embedding", "tied"):
            inputs = torch.randint(0, 5, (6,), generator=generator)
        else:
            inputs = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        if self.kind == "convolution":
            inputs = inputs[:, None]
        hidden = torch.tanh(self.head(torch.tanh(self.between(self.first(inputs)))))
        return (self.later(hidden) - torch.randn(6, 2, generator=generator, dtype=torch.float64)).square().mean()
