"""A graph convolution network, after Kipf and Welling 2017 (arXiv 1609.02907), in plain PyTorch."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from layerwise.lab.models import check_sizes, seeded


def nearest_neighbours(features: torch.Tensor, count: int) -> torch.Tensor:
    """Join each node to its nearest others by Euclidean distance, in either direction: the adjacency, 1 or 0."""
    distances = torch.cdist(features, features).fill_diagonal_(torch.inf)
    nearest = distances.topk(count, largest=False).indices
    adjacency = torch.zeros(len(features), len(features)).scatter_(1, nearest, 1.0)
    return torch.maximum(adjacency, adjacency.T)


def normalised(adjacency: torch.Tensor) -> torch.Tensor:
    """Normalise a symmetric dense adjacency with a diagonal of zeros: Â = D^-½ (A + I) D^-½, D the row sums of A + I.

    Kipf and Welling 2017, section 2.2. ``GraphNetwork`` takes Â dense or, for large graphs, ``.to_sparse()``.
    """
    with_loops = adjacency + torch.eye(len(adjacency), dtype=adjacency.dtype, device=adjacency.device)
    scale = with_loops.sum(1).rsqrt()
    return scale[:, None] * with_loops * scale


class GraphConvolution(nn.Module):
    """Each node's features become a linear map of the weighted mean of its own and its neighbours': Â X W + b."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(inputs, outputs)))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, features: torch.Tensor, adjacency: torch.Tensor) -> torch.Tensor:
        """Compute Â X W + b; features (nodes, inputs), adjacency (nodes, nodes), dense or sparse."""
        return adjacency @ (features @ self.weight) + self.bias


class GraphNetwork(nn.Module):
    """Graph convolutions with ReLU between them; the last one gives the scores of each node.

    i w + w for the first, w² + w for each in between, w k + k for the last with k classes: 12,730 parameters for 784
    features with the defaults. Nodes see others that are as many edges away as there are convolutions.
    """

    def __init__(self, seed: int, inputs: int, classes: int = 10, *, width: int = 16, depth: int = 2) -> None:
        check_sizes(inputs=inputs, classes=classes, width=width, depth=depth)
        super().__init__()
        sizes = [inputs, *[width] * (depth - 1), classes]
        with seeded(seed):
            self.convolutions = nn.ModuleList(map(GraphConvolution, sizes, sizes[1:]))

    def forward(self, features: torch.Tensor, adjacency: torch.Tensor) -> torch.Tensor:
        """Score the nodes from their features, shape (nodes, inputs), and Â as ``normalised`` gives it."""
        *inner, last = self.convolutions
        for convolution in inner:
            features = functional.relu(convolution(features, adjacency))
        return last(features, adjacency)
