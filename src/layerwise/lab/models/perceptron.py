"""A deep perceptron without normalisation, in which gradients vanish towards the input."""

from __future__ import annotations

import torch
from torch import nn

from layerwise.lab.errors import UsageError
from layerwise.lab.models import check_sizes

ACTIVATIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}


class Perceptron(nn.Module):
    """Hidden layers of one width, each followed by a sigmoid or tanh, and scores.

    hidden.0 to hidden.{depth - 1}, head; (s + 1) w + (depth - 1) (w + 1) w + (w + 1) k parameters for inputs of s
    numbers, a width w and k classes. Weights are drawn as Glorot and Bengio 2010, eq. 16 ("Xavier"), uniform on
    (-a, a) with a = sqrt(6 / (inputs + outputs)); biases begin at 0.
    """

    def __init__(
        self,
        seed: int,
        classes: int = 10,
        *,
        depth: int = 8,
        width: int = 64,
        activation: str = "sigmoid",
        inputs: int = 28 * 28,
    ) -> None:
        check_sizes(classes=classes, depth=depth, width=width, inputs=inputs)
        if activation not in ACTIVATIONS:
            raise UsageError(f"activation={activation!r}: use one of {', '.join(ACTIVATIONS)}")
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.hidden = nn.ModuleList(nn.Linear(width if layer else inputs, width) for layer in range(depth))
        self.head = nn.Linear(width, classes)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter, generator=generator)
            else:
                nn.init.zeros_(parameter)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Score float32 of any shape (n, ...) with so many numbers an example."""
        hidden = pixels.flatten(1)
        for layer in self.hidden:
            hidden = self.activation(layer(hidden))
        return self.head(hidden)
