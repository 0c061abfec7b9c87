"""Fine-tuning with layer decay: a network that knows the digits 0 to 4 learns 5 to 9 from few examples."""

import argparse
import copy
import statistics

import torch
from torch import nn
from torch.nn import functional

import layerwise
from layerwise.lab import data

digits = data.load("digits5k")
images, labels = data.pixels(digits.train_images), digits.train_labels
test_images, test_labels = data.pixels(digits.test_images), digits.test_labels


def train(model, optimizer, rows, epochs):
    for _ in range(epochs):
        for chosen in rows[torch.randperm(len(rows))].split(32):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[chosen]), labels[chosen] % 5).backward()
            optimizer.step()


def accuracy(model, wanted):
    with torch.no_grad():
        return 100 * float((model(test_images[wanted]).argmax(1) == test_labels[wanted] % 5).float().mean())


parser = argparse.ArgumentParser()
parser.add_argument("--seeds", type=int, default=5)
seeds = parser.parse_args().seeds

# Before: a network that was trained on the digits 0 to 4.
torch.manual_seed(0)
body = [nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 5, stride=2), nn.ReLU(), nn.Flatten()]
trained = nn.Sequential(*body, nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 5))
train(trained, torch.optim.AdamW(trained.parameters(), lr=1e-3), (labels < 5).nonzero()[:, 0], epochs=3)
print(f"digits 0 to 4: {accuracy(trained, test_labels < 5):.0f} % right")

# Now: ten images of each of the digits 5 to 9, a new head, and rates that fall from the head to the input.
new = (labels >= 5).nonzero()[:, 0]
few = torch.cat([new[labels[new] == digit][:10] for digit in range(5, 10)])
found, moved = {}, {}
for decay in (None, 0.9, 0.7, 0.5):
    results = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = copy.deepcopy(trained)
        model[7].reset_parameters()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        if decay is not None:
            adapter = layerwise.LayerwiseLR(optimizer, layerwise.rules.LayerDecay(decay), model)
        train(model, optimizer, few, epochs=20)
        results.append(accuracy(model, test_labels >= 5))
    found[decay] = results
    first, known = model[0].weight.detach(), trained[0].weight.detach()
    moved[decay] = float((first - known).norm() / known.norm())
    name = "one rate" if decay is None else f"LayerDecay({decay})"
    print(f"{name:<16} {statistics.mean(results):.0f} % right, the mean of {seeds} seeds")

print("rates at 0.5:", {layer: f"{rate:.2g}" for layer, rate in adapter.get_last_lr().items()})
print(f"the first layer moved by {moved[None]:.0%} at one rate, by {moved[0.5]:.0%} at a decay of 0.5")
gains = [decayed - plain for decayed, plain in zip(found[0.7], found[None], strict=True)]
print(f"LayerDecay(0.7) is better in {sum(gain > 0 for gain in gains)} of {seeds} seeds")
