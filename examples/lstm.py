"""An LSTM that reads digits row by row, with SGD and clipped gradients: one layer of all its depths, or one per depth.

python examples/lstm.py [SEEDS]
"""

import re
import sys

import torch
from torch.nn import functional

import layerwise
from layerwise.lab import data
from layerwise.lab.models.recurrent import RecurrentClassifier

RATE, EPOCHS, BATCH = 0.1, 3, 32
digits = data.load("digits5k")  # real ones, of MNIST
images, labels = data.pixels(digits.train_images)[:, 0], digits.train_labels
tests = data.pixels(digits.test_images)[:, 0]


def one_a_depth(name, parameter):
    """Name the layer of a parameter by its module, and within an nn.LSTM or nn.GRU by its depth."""
    module, _, last = name.rpartition(".")
    depth = re.search(r"_l(\d+)(?:_reverse)?$", last)
    return f"{module}.{depth[1]}".lstrip(".") if depth else module


def train(seed, lr, layers=None):
    """Train from the seed's weights on the seed's batches; give the test error in % and the mean factor."""
    model = RecurrentClassifier(seed, width=32)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    rule = layerwise.rules.LayerAdaptive()
    adapter = layerwise.LayerwiseLR(optimizer, rule, model, layers=layers) if layers else None
    generator, factors = torch.Generator().manual_seed(seed), []
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(labels), generator=generator).split(BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            factors.extend(adapter.get_last_factors().values() if adapter else ())
    with torch.no_grad():
        error = 100 * (model(tests).argmax(1) != digits.test_labels).float().mean().item()
    return error, sum(factors) / len(factors) if factors else 1.0


seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
plain = [train(seed, RATE)[0] for seed in seeds]
module = [train(seed, RATE, "module")[0] for seed in seeds]
depth, means = zip(*(train(seed, RATE, one_a_depth) for seed in seeds), strict=True)
control = [train(seed, RATE * mean)[0] for seed, mean in zip(seeds, means, strict=True)]

print(f"test error in %\n\n{'arm':<32}" + "".join(f"{f'seed {seed}':>9}" for seed in seeds))
rows = {"plain": plain, "layer-adaptive, one LSTM layer": module, "layer-adaptive, one per depth": depth}
for name, row in {**rows, "plain at the last's mean factor": control, "that mean factor": means}.items():
    print(f"{name:<32}" + "".join(f"{value:>9.2f}" for value in row))
print("\nA few seeds at one untuned rate are a glimpse and no comparison. Layer-adaptive rates are larger on average,")
print("so the row to beat is the fourth.")
