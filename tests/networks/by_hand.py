"""Small networks of each kind, the layers that each must have, and their training written once more by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import reference
from layerwise.lab.models.graph import GraphNetwork, normalised
from layerwise.lab.models.recurrent import RecurrentClassifier
from layerwise.lab.models.transformer import TransformerLanguageModel
from layerwise.lab.models.vit import VisionTransformer

Layers = dict[str, list[str]]
"""Layer name -> the names of its parameters."""


@dataclass(frozen=True)
class Case:
    """A small network in float64.

    Attributes:
        build: makes it, with the same weights each time.
        loss: of the network and the number of the step; other data at each step.
        layers: that `layers="module"` must find, in this order.
    """

    build: Callable[[], nn.Module]
    loss: Callable[[Any, int], Tensor]
    layers: Layers


def of_block(number: int) -> Layers:
    parts = ["norm1", "attention.query_key_value", "attention.output", "norm2", "expand", "contract"]
    return {name: with_bias(name) for name in (f"blocks.{number}.{part}" for part in parts)}


def with_bias(name: str) -> list[str]:
    return [f"{name}.weight", f"{name}.bias"]


def normal(model: nn.Module, step: int, *shape: int) -> Tensor:
    """Return the numbers of a step, in the type of the network's parameters."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(1000 + step), dtype=torch.float64)
    return numbers.to(next(model.parameters()).dtype)


def loss_of_text(model: nn.Module, step: int) -> Tensor:
    symbols = torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(1000 + step))
    return functional.cross_entropy(model(symbols[:, :-1]).flatten(0, 1), symbols[:, 1:].flatten())


def loss_of_sequences(model: nn.Module, step: int) -> Tensor:
    return functional.cross_entropy(model(normal(model, step, 5, 6, 3)), torch.arange(5) % 4)


def loss_of_images(model: nn.Module, step: int) -> Tensor:
    return functional.cross_entropy(model(normal(model, step, 5, 2, 6, 6)), torch.arange(5) % 4)


def ring(nodes: int) -> Tensor:
    """Return the adjacency of a ring with one chord."""
    adjacency = torch.zeros(nodes, nodes, dtype=torch.float64)
    for a, b in [*((i, (i + 1) % nodes) for i in range(nodes)), (0, nodes // 2)]:
        adjacency[a, b] = adjacency[b, a] = 1
    return adjacency


def loss_of_nodes(model: nn.Module, step: int) -> Tensor:
    features = normal(model, step, 8, 5)
    return functional.cross_entropy(model(features, normalised(ring(8)).to(features.dtype))[:6], torch.arange(6) % 3)


CASES: dict[str, Case] = {
    "transformer": Case(
        lambda: TransformerLanguageModel(0, vocabulary=11, context=6, width=8, depth=2, heads=2).double(),
        loss_of_text,
        {
            "embedding": ["embedding.weight"],
            "position": ["position.weight"],
            **of_block(0),
            **of_block(1),
            "norm": with_bias("norm"),
        },
    ),
    "LSTM": Case(
        lambda: RecurrentClassifier(0, 4, inputs=3, width=5, depth=2).double(),
        loss_of_sequences,
        {
            "recurrent": [
                f"recurrent.{part}_l{depth}"
                for depth in (0, 1)
                for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            ],
            "head": with_bias("head"),
        },
    ),
    "graph network": Case(
        lambda: GraphNetwork(0, 5, 3, width=8, depth=3).double(),
        loss_of_nodes,
        {f"convolutions.{i}": with_bias(f"convolutions.{i}") for i in range(3)},
    ),
    "vision transformer": Case(
        lambda: VisionTransformer(0, 4, side=6, patch=3, channels=2, width=8, depth=2, heads=2).double(),
        loss_of_images,
        {
            "": ["class_token", "position"],
            "patches": with_bias("patches"),
            **of_block(0),
            **of_block(1),
            "norm": with_bias("norm"),
            "head": with_bias("head"),
        },
    ),
}

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01),
    "Nesterov": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
}
"""Optimizers as people use them with these networks; `solver` has the same constants."""


def named(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def expected_factors(model: nn.Module, layers: Layers) -> dict[str, float]:
    """Return the factors of equation 9 from the gradients that are there, slowly and in float64."""
    parameters = named(model)
    gradients = [
        [g.double().numpy() for g in (parameters[name].grad for name in names) if g is not None]
        for names in layers.values()
    ]
    return dict(zip(layers, reference.layer_adaptive(gradients).tolist(), strict=True))


class ByHand:
    """A training of a network in NumPy: the solver's equations, one factor a layer, nothing of torch's optimizers.

    Args:
        model: float64; its parameters are stepped in place.
        layers: its layers.
        optimizer: a key of `OPTIMIZERS`.
    """

    def __init__(self, model: nn.Module, layers: Layers, optimizer: str) -> None:
        parameters = named(model)
        self.parameters = [parameters[name] for names in layers.values() for name in names]
        self.names = list(layers)
        layer_of = [i for i, names in enumerate(layers.values()) for _ in names]
        arrays = [p.detach().numpy() for p in self.parameters]  # which share the parameters' memory
        if optimizer == "AdamW":
            self.rate = 0.01
            self.solver: Any = reference.Adam(arrays, layer_of, weight_decay=0.1, decoupled=True)
        else:
            self.rate = 0.05
            self.solver = reference.TorchSGD(
                arrays, layer_of, momentum=0.9, weight_decay=0.01, nesterov=optimizer == "Nesterov"
            )

    def step(self, factors: dict[str, float]) -> None:
        gradients: Sequence[np.ndarray] = [p.grad.numpy() for p in self.parameters]
        self.solver.step(gradients, self.rate, [factors[name] for name in self.names])


class PermanentGroups:
    """A bare optimizer of torch with one group a layer, whose rate is set to lr · f before each step."""

    def __init__(self, model: nn.Module, layers: Layers, optimizer: str) -> None:
        parameters = named(model)
        groups = [{"params": [parameters[name] for name in names], "layer": layer} for layer, names in layers.items()]
        self.optimizer = OPTIMIZERS[optimizer](groups)

    def step(self, factors: dict[str, float]) -> None:
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] *= factors[group["layer"]]
        self.optimizer.step()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
