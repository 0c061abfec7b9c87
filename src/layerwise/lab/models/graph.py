"""A graph convolution network, after Kipf and Welling 2017 (arXiv 1609.02907), in plain PyTorch."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from layerwise.lab.models import check_sizes


def normalised(adjacency: torch.Tensor) -> torch.Tensor:
    """Normalise the adjacency of a graph: Â = D^-½ (A + I) D^-½, D the row sums of A + I.

    Args:
        adjacency: A, symmetric, zero on its diagonal, not negative; dense, shape (nodes, nodes).

    Returns:
        Â, dense; ``.to_sparse()`` gives the form for large graphs, which ``GraphNetwork`` takes as well.

    Example:
        >>> normalised(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])

    Reference:
        Kipf and Welling 2017, section 2.2, the renormalisation.
    """
    with_loops = adjacency + torch.eye(len(adjacency), dtype=adjacency.dtype, device=adjacency.device)
    scale = with_loops.sum(1).rsqrt()
    return scale[:, None] * with_loops * scale


class GraphConvolution(nn.Module):
    """Each node's features become a linear map of the weighted mean of its own and its neighbours': Â X W + b.

    Args:
        inputs: features of a node.
        outputs: features of a node.
    """

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
    features with the defaults. The global random state is left alone.

    Args:
        seed: of the initial weights.
        inputs: features of a node.
        classes: outputs.
        width: features between convolutions.
        depth: convolutions; nodes see others that are as many edges away.

    Raises:
        UsageError: a size is no whole number from 1.
    """

    def __init__(self, seed: int, inputs: int, classes: int = 10, *, width: int = 16, depth: int = 2) -> None:
        check_sizes(inputs=inputs, classes=classes, width=width, depth=depth)
        super().__init__()
        sizes = [inputs, *[width] * (depth - 1), classes]
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            self.convolutions = nn.ModuleList(map(GraphConvolution, sizes, sizes[1:]))

    def forward(self, features: torch.Tensor, adjacency: torch.Tensor) -> torch.Tensor:
        """Compute the class scores of the nodes.

        Args:
            features: float32, shape (nodes, inputs).
            adjacency: Â as ``normalised`` gives it, dense or sparse.

        Returns:
            Scores before the softmax, shape (nodes, classes).
        """
        *inner, last = self.convolutions
        for convolution in inner:
            features = functional.relu(convolution(features, adjacency))
        return last(features, adjacency)
