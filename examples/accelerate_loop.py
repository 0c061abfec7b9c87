"""Per-layer rates with Accelerate: gradients amplified in the layers where they are most directed.

In the clone: pip install -e '.[lab,transformers]' and python examples/accelerate_loop.py
"""

import tempfile
from itertools import pairwise

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import layerwise
from layerwise.lab import data
from layerwise.rules import Directionality, GradientAmplification, Phase

digits = data.load("digits5k")  # the lab's embedded data; nothing is downloaded
training = TensorDataset(data.pixels(digits.train_images), digits.train_labels)
tests, answers = data.pixels(digits.test_images), digits.test_labels

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
set_seed(0)
widths = [784, 64, 48, 32, 24, 10]
layers = [layer for sizes in pairwise(widths) for layer in (nn.Linear(*sizes), nn.ReLU())]
model = nn.Sequential(nn.Flatten(), *layers[:-1])
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(training, 32, shuffle=True))

# Epoch 1 is plain, in epoch 2 gradients are measured, in epochs 3 and 4 those of the chosen layers are doubled.
rule = GradientAmplification(Directionality("G", threshold=0.7), [Phase(1, False), Phase(4, True)])
adapter = layerwise.LayerwiseLR(optimizer, rule, model)  # before prepare would do as well
accelerator.register_for_checkpointing(adapter)  # save_state and load_state keep it

for epoch in range(1, 5):
    for images, labels in loader:
        with accelerator.accumulate(model):
            accelerator.backward(functional.cross_entropy(model(images), labels))
            accelerator.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad()
    adapter.end_epoch()
    with torch.no_grad():
        accuracy = (model(tests).argmax(1) == answers).float().mean()
    amplified = [name for name, factor in adapter.get_last_factors().items() if factor > 1]
    print(f"epoch {epoch}  accuracy {float(accuracy):.1%}  amplified: {', '.join(amplified) or 'none'}")

print("G of each layer, as epoch 2 measured it:")
for name, layer in adapter.get_last_selection().items():
    print(f"  {name}  {layer.value:.3f}  z {layer.z:.2f}")
with tempfile.TemporaryDirectory() as folder:
    accelerator.save_state(folder)
    accelerator.load_state(folder)
print(f"the adapter came back from the checkpoint and goes on with epoch {adapter.epoch}")
