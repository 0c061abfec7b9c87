"""A small network on 5,000 real digits: the pattern for a task of your own.

layerwise doctor examples/my_task.py:task
layerwise compare examples/my_task.py:task
layerwise compare examples/my_task.py:task --tune lr=0.02,0.05,0.1
"""

import torch
from torch import nn
from torch.nn import functional

from layerwise.lab import Task, data

VALIDATION = 500
"""Of the training digits, those that tuning looks at; no batch holds them."""


def task(seed, lr=0.05, weight_decay=5e-4, batch_size=64, epochs=3):
    """Give model, batches, loss and metric; the lab has seeded torch, Python and NumPy with `seed` before."""
    digits = data.load("digits5k")
    images, labels = data.pixels(digits.train_images), digits.train_labels
    held_out = images[-VALIDATION:], labels[-VALIDATION:]
    tests = data.pixels(digits.test_images), digits.test_labels
    images, labels = images[:-VALIDATION], labels[:-VALIDATION]

    model = nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 5, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )

    def batches(epoch):  # the order follows from seed and epoch, for the lab seeds the generators for each
        return [(images[rows], labels[rows]) for rows in torch.randperm(len(labels)).split(batch_size)]

    def loss(model, batch):
        return functional.cross_entropy(model(batch[0]), batch[1])

    def error_on(examples):
        device = next(model.parameters()).device
        return 100.0 * float((model(examples[0].to(device)).argmax(1).cpu() != examples[1]).float().mean())

    return Task(
        model=model,
        batches=batches,
        loss=loss,
        metric=lambda model: {"test_error": error_on(tests)},
        validation=lambda model: error_on(held_out),
        optimizer=torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay),
        epochs=epochs,
    )
