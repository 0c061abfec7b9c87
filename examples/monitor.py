"""Which layers learn? A small network on 4,000 real digits, watched.

In the clone: pip install -e '.[lab]' and python examples/monitor.py [FOLDER]
"""

import sys
from pathlib import Path

import polars
import torch
from torch import nn
from torch.nn import functional

import layerwise
from layerwise.lab import data

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/monitor")  # a second run adds to the files of the first
torch.manual_seed(0)
digits = data.load("digits5k")
images, labels = data.pixels(digits.train_images), digits.train_labels

model = nn.Sequential()
model.add_module("conv1", nn.Conv2d(1, 8, 5, stride=2))
model.add_module("relu1", nn.ReLU())
model.add_module("conv2", nn.Conv2d(8, 16, 5, stride=2))
model.add_module("relu2", nn.ReLU())
model.add_module("flat", nn.Flatten())
model.add_module("head", nn.Linear(256, 10))

optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
layerwise.LayerwiseLR(optimizer, layerwise.rules.LayerAdaptive(), model)  # leave it out: the monitor needs none
outlets = [layerwise.sinks.JSONL(folder / "layers.jsonl"), layerwise.sinks.Parquet(folder / "layers")]

with layerwise.Monitor(optimizer, model, every=20, sinks=outlets) as monitor:
    for _ in range(3):
        for rows in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()

print(monitor.get_last_record())
table = polars.read_parquet(folder / "layers" / "*.parquet")
print("\nupdate ratio by step, one column per layer")
print(table.pivot("layer", index="step", values="update_ratio", aggregate_function="last").tail(5))
