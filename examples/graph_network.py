"""A graph network on 1,000 real digits, each joined to its nearest others, 50 of them labelled.

python examples/graph_network.py [SEEDS]
"""

import sys

import torch
from torch.nn import functional

import layerwise
from layerwise.lab import data
from layerwise.lab.models.graph import GraphNetwork, nearest_neighbours, normalised

RATE, STEPS, NODES, LABELLED, NEIGHBOURS = 0.1, 60, 1000, 5, 10
digits = data.load("digits5k")
features, labels = data.pixels(digits.train_images[:NODES]).flatten(1), digits.train_labels[:NODES]
adjacency = normalised(nearest_neighbours(features, NEIGHBOURS)).to_sparse()
labelled = torch.cat([(labels == digit).nonzero()[:LABELLED, 0] for digit in range(10)])
others = torch.ones(NODES, dtype=torch.bool).index_fill(0, labelled, False)


def train(seed, lr, rule=None):
    """Train from the seed's weights; give the error in % on the nodes without a label, and the mean factor."""
    model = GraphNetwork(seed, features.shape[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    adapter = layerwise.LayerwiseLR(optimizer, rule, model) if rule else None
    factors = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        functional.cross_entropy(model(features, adjacency)[labelled], labels[labelled]).backward()
        optimizer.step()
        factors.extend(adapter.get_last_factors().values() if adapter else ())
    with torch.no_grad():
        wrong = model(features, adjacency).argmax(1) != labels
    return 100 * wrong[others].float().mean().item(), sum(factors) / len(factors) if factors else 1.0


seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
plain = [train(seed, RATE)[0] for seed in seeds]
adaptive, means = zip(*(train(seed, RATE, layerwise.rules.LayerAdaptive()) for seed in seeds), strict=True)
control = [train(seed, RATE * mean)[0] for seed, mean in zip(seeds, means, strict=True)]

majority = labels[others].bincount().max().item() / others.sum().item()
print(f"error in % on {int(others.sum())} nodes; naming the most frequent digit has {100 * (1 - majority):.1f}\n")
print(f"{'arm':<26}" + "".join(f"{f'seed {seed}':>9}" for seed in seeds))
rows = {"plain": plain, "layer-adaptive": adaptive, "plain at the mean factor": control, "the mean factor": means}
for name, row in rows.items():
    print(f"{name:<26}" + "".join(f"{value:>9.2f}" for value in row))
print(
    "\nA few seeds at one untuned rate are a glimpse and no comparison; graph and labelled nodes are the same for all."
)
print("The row to beat is the third.")
