"""Graphs of real images: each image is a node, joined to those that are nearest to it."""

from __future__ import annotations

import torch


def nearest_neighbours(features: torch.Tensor, count: int) -> torch.Tensor:
    """Join each node to its nearest others by Euclidean distance.

    Two nodes are joined where either is among the nearest of the other.

    Args:
        features: shape (nodes, numbers of a node).
        count: nearest others of each node, below the number of nodes.

    Returns:
        The adjacency: symmetric, 1 where two nodes are joined, else 0; float32, shape (nodes, nodes).

    Example:
        >>> nearest_neighbours(torch.tensor([[0.0], [1.0], [5.0]]), 1)
        tensor([[0., 1., 0.],
                [1., 0., 1.],
                [0., 1., 0.]])
    """
    distances = torch.cdist(features, features).fill_diagonal_(torch.inf)
    nearest = distances.topk(count, largest=False).indices
    adjacency = torch.zeros(len(features), len(features)).scatter_(1, nearest, 1.0)
    return torch.maximum(adjacency, adjacency.T)
