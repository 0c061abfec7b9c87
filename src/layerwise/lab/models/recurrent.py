"""An LSTM (Hochreiter and Schmidhuber 1997) that reads a sequence and names its class."""

from __future__ import annotations

import torch
from torch import nn

from layerwise.lab.models import check_sizes, seeded


class RecurrentClassifier(nn.Module):
    """Stacked LSTMs, and scores from the last state of the topmost; an image is read row by row.

    PyTorch keeps all depths in one module, ``recurrent``, and calls their parameters ``weight_ih_l0``, ``weight_ih_l1``
    and so on; so ``layers="module"`` makes one layer of them, and docs/networks.md shows the function that makes one a
    depth. Each depth has 4 h (i + h + 2) parameters for i inputs and h states, the head k (h + 1) for k classes: 57,994
    with the defaults.
    """

    def __init__(self, seed: int, classes: int = 10, *, inputs: int = 28, width: int = 64, depth: int = 2) -> None:
        check_sizes(classes=classes, inputs=inputs, width=width, depth=depth)
        super().__init__()
        with seeded(seed):
            self.recurrent = nn.LSTM(inputs, width, num_layers=depth, batch_first=True)
            self.head = nn.Linear(width, classes)

    def forward(self, sequences: torch.Tensor) -> torch.Tensor:
        """Score float32 of shape (n, steps, inputs)."""
        states, _ = self.recurrent(sequences)
        return self.head(states[:, -1])
