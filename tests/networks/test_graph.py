"""The graph network: its equations, dense and sparse, and real digits joined to their nearest others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import layerwise
from layerwise.lab.errors import UsageError
from layerwise.lab.models.graph import GraphNetwork, nearest_neighbours, normalised
from layerwise.rules import LayerAdaptive, LayerDecay

from .by_hand import CASES, loss_of_nodes, ring


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        ({"inputs": 784}, 12_730),
        ({"inputs": 5, "classes": 3, "width": 8, "depth": 3}, 147),
        ({"inputs": 7, "depth": 1}, 80),
    ],
    ids=["default", "deep", "one convolution"],
)
def test_the_parameter_count_is_that_of_the_convolutions(sizes, count):
    assert sum(p.numel() for p in GraphNetwork(0, **sizes).parameters()) == count


def test_the_adjacency_is_normalised_entry_by_entry():
    adjacency = ring(7)
    expected = torch.zeros(7, 7, dtype=torch.float64)
    for i in range(7):
        for j in range(7):
            joined = 1.0 if i == j else float(adjacency[i, j])
            degrees = (1 + float(adjacency[i].sum())) * (1 + float(adjacency[j].sum()))
            expected[i, j] = joined / degrees**0.5
    torch.testing.assert_close(normalised(adjacency), expected, rtol=1e-14, atol=0)


def test_a_node_without_neighbours_sees_itself_alone():
    assert normalised(torch.zeros(3, 3)).equal(torch.eye(3))


def test_the_scores_are_those_of_the_equations_node_by_node():
    model = CASES["graph network"].build()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype))
    adjacency = normalised(ring(8))
    features = torch.randn(8, 5, dtype=torch.float64)
    x = features.numpy()
    for number, convolution in enumerate(model.convolutions):
        w, b = convolution.weight.detach().numpy(), convolution.bias.detach().numpy()
        rows = []
        for i in range(8):
            mean = sum(float(adjacency[i, j]) * x[j] for j in range(8))
            row = np.array([mean @ w[:, k] + b[k] for k in range(w.shape[1])])
            rows.append(np.maximum(row, 0) if number < 2 else row)
        x = np.array(rows)
    np.testing.assert_allclose(model(features, adjacency).detach().numpy(), x, rtol=1e-11, atol=1e-13)


def test_a_sparse_adjacency_gives_the_same_scores_and_gradients():
    model, twin = CASES["graph network"].build(), CASES["graph network"].build()
    features, adjacency = torch.randn(8, 5, dtype=torch.float64), normalised(ring(8))
    dense, sparse = model(features, adjacency), twin(features, adjacency.to_sparse())
    torch.testing.assert_close(sparse, dense, rtol=1e-12, atol=1e-14)
    dense.square().sum().backward()
    sparse.square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-11, atol=1e-13)


def test_layer_decay_counts_the_convolutions():
    model = CASES["graph network"].build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, LayerDecay(0.5), model)
    loss_of_nodes(model, 0).backward()
    optimizer.step()
    assert adapter.get_last_lr() == pytest.approx(
        {"convolutions.0": 0.025, "convolutions.1": 0.05, "convolutions.2": 0.1}
    )


def test_nearest_neighbours_are_those_of_a_slow_search_in_either_direction():
    features = torch.randn(30, 4, dtype=torch.float64)
    expected = torch.zeros(30, 30)
    for i in range(30):
        order = sorted((j for j in range(30) if j != i), key=lambda j: float((features[i] - features[j]).norm()))
        for j in order[:3]:
            expected[i, j] = expected[j, i] = 1
    assert torch.equal(nearest_neighbours(features, 3), expected)


@pytest.mark.parametrize("name", ["inputs", "classes", "width", "depth"])
def test_a_size_below_one_is_named(name):
    with pytest.raises(UsageError, match=f"{name}=0: use a whole number from 1"):
        GraphNetwork(0, **{"inputs": 5, name: 0})


def test_on_a_graph_of_real_digits_it_beats_the_majority_and_a_linear_classifier_of_the_same_labels(digits):
    features, labels = digits.images[:1000].flatten(1), digits.labels[:1000]
    adjacency = normalised(nearest_neighbours(features, 10)).to_sparse()
    labelled = torch.cat([(labels == digit).nonzero()[:5, 0] for digit in range(10)])
    others = torch.ones(1000, dtype=torch.bool).index_fill(0, labelled, False)

    def accuracy(model, scores):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
        for _ in range(60):
            optimizer.zero_grad()
            functional.cross_entropy(scores()[labelled], labels[labelled]).backward()
            optimizer.step()
        with torch.no_grad():
            return (scores().argmax(1) == labels)[others].double().mean().item()

    network, linear = GraphNetwork(0, 784), nn.Linear(784, 10)
    of_the_graph = accuracy(network, lambda: network(features, adjacency))
    assert of_the_graph > accuracy(linear, lambda: linear(features)) + 0.02
    majority = labels[others].bincount().max().item() / int(others.sum())
    assert of_the_graph > 0.65 > 5 * majority
