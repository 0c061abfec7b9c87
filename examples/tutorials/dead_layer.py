"""Finding a dead layer: first with a Monitor in your own loop, then with `layerwise doctor dead_layer.py:task`."""

import torch
from torch import nn
from torch.nn import functional

import layerwise
from layerwise.lab import Task, data


def task(seed, bias=-50.0):
    digits = data.load("digits5k")
    images, labels = data.pixels(digits.train_images).flatten(1), digits.train_labels
    tests, test_labels = data.pixels(digits.test_images).flatten(1), digits.test_labels
    model = nn.Sequential(
        nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    nn.init.constant_(model[2].bias, bias)  # the fault: no input can lift this layer above 0
    return Task(
        model=model,
        batches=lambda epoch: [(images[rows], labels[rows]) for rows in torch.randperm(len(labels)).split(64)],
        loss=lambda model, batch: functional.cross_entropy(model(batch[0]), batch[1]),
        metric=lambda model: {"test_error": 100 * float((model(tests).argmax(1) != test_labels).float().mean())},
        optimizer=torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9),
        epochs=3,
    )


def main():
    for words, bias in (("with the fault", -50.0), ("mended", 0.0)):
        torch.manual_seed(0)
        parts = task(0, bias)
        monitor = layerwise.Monitor(parts.optimizer, parts.model, every=50)
        for batch in parts.batches(1)[:50]:
            parts.optimizer.zero_grad()
            parts.loss(parts.model, batch).backward()
            parts.optimizer.step()
        record = monitor.get_last_record()
        print(f"{words}, update {record.step}:")
        for layer, gradient, ratio in zip(record.layers, record.gradient_norm, record.update_ratio, strict=True):
            print(f"  layer {layer}: gradient norm {gradient:.2g}, update/weight {ratio:.2g}")


if __name__ == "__main__":
    main()
