"""Your own convolutional network in three steps: a plain loop, one line more, and a look at the layers."""

import argparse

import torch
from torch import nn
from torch.nn import functional

import layerwise
from layerwise.lab import data

digits = data.load("digits5k")  # 5,000 real digits that come with layerwise; nothing is downloaded
images, labels = data.pixels(digits.train_images), digits.train_labels
test_images, test_labels = data.pixels(digits.test_images), digits.test_labels


def train(epochs, rule=None, monitored=False):
    # Step 1: your network, your optimizer, your loop.
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 5, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    # Step 2: one line; the loop below stays as it is.
    adapter = layerwise.LayerwiseLR(optimizer, rule, model) if rule else None

    # Step 3: see what the layers do.
    monitor = layerwise.Monitor(optimizer, model, every=20) if monitored else None

    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()

    with torch.no_grad():
        right = (model(test_images).argmax(1) == test_labels).float().mean()
    return 100 * float(right), optimizer, adapter, monitor


parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=3)
epochs = parser.parse_args().epochs

plain, *_ = train(epochs)
print(f"plain SGD at 0.01:       {plain:.0f} % of the test digits are right")

adaptive, optimizer, adapter, monitor = train(epochs, layerwise.rules.LayerAdaptive(), monitored=True)
print(f"with LayerAdaptive:      {adaptive:.0f} %")
print("rates of the last step: ", {layer: round(rate, 3) for layer, rate in adapter.get_last_lr().items()})
record = monitor.get_last_record()
for layer, ratio in zip(record.layers, record.update_ratio, strict=True):
    print(f"layer {layer} changed by {ratio:.1%} of its weights in update {record.step}")

# Is it more than a larger rate? The same training at the mean of the factors, for every layer alike.
mean = sum(adapter.get_last_factors().values()) / 3
larger, *_ = train(epochs, layerwise.rules.Constant({"*": mean}))
print(f"plain SGD at {0.01 * mean:.3f}:      {larger:.0f} %")
