"""Per-layer rates in a Fabric loop: attach before or after fabric.setup. LARS on 4,000 digits, with a checkpoint.

LARS's layers are single parameters, "0.weight" and "0.bias". Its factor is about 0.001 times weight norm over gradient
norm, so lr is far larger than SGD's; biases keep the plain lr, here 5. LARC(clip=True) never exceeds lr.

In the clone: pip install -e '.[lab,lightning]' and python examples/fabric_loop.py
"""

import tempfile
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.nn import functional

import layerwise
from layerwise.lab import data

digits = data.load("digits5k")  # the lab's embedded data; nothing is downloaded
images, labels = data.pixels(digits.train_images), digits.train_labels
tests, answers = data.pixels(digits.test_images), digits.test_labels

fabric = Fabric(accelerator="cpu", precision="bf16-mixed")
fabric.seed_everything(0, verbose=False)
model = nn.Sequential(
    nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 5, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
)
optimizer = torch.optim.SGD(model.parameters(), lr=5.0, momentum=0.9, weight_decay=5e-4)
model, optimizer = fabric.setup(model, optimizer)
adapter = layerwise.LayerwiseLR(optimizer, layerwise.rules.LARS(), model)  # this line is all there is

for epoch in range(1, 4):
    for rows in torch.randperm(len(labels)).split(64):
        loss = functional.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=5.0)
        optimizer.step()
    adapter.end_epoch()  # for rules that count epochs
    with torch.no_grad():
        accuracy = (model(tests).argmax(1) == answers).float().mean()
    rates = "  ".join(f"{name}: {rate:.4f}" for name, rate in adapter.get_last_lr().items())
    print(f"epoch {epoch}  accuracy {float(accuracy):.1%}  rate of each weight and bias  {rates}")

with tempfile.TemporaryDirectory() as folder:  # Fabric saves and loads the adapter as it does model and optimizer
    state = {"model": model, "optimizer": optimizer, "adapter": adapter}
    fabric.save(Path(folder, "checkpoint"), state)
    fabric.load(Path(folder, "checkpoint"), state)
print(f"the adapter came back from the checkpoint and goes on with epoch {adapter.epoch}")
