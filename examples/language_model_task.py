"""The language model as a task of its own, for a whole comparison with controls and intervals.

layerwise doctor examples/language_model_task.py:task
layerwise compare examples/language_model_task.py:task
layerwise compare examples/language_model_task.py:task --tune lr=0.001,0.003,0.01
"""

import torch
from torch.nn import functional

from layerwise.lab import Task
from layerwise.lab.data import text
from layerwise.lab.models.transformer import TransformerLanguageModel

LENGTH = 65
"""Bytes of a window: a context of 64 and the byte after it."""


def task(seed, lr=1e-3, weight_decay=0.01, batch_size=8, width=32, steps=100, epochs=3):
    """Give model, batches, loss and metric; an epoch is so many steps on windows at random places."""
    reference = text.load()
    held_out, words = reference.train[-len(reference.test) :], reference.train[: -len(reference.test)]
    fixed = torch.Generator().manual_seed(1)
    tests = text.windows(reference.test, 64, LENGTH, fixed)
    validation = text.windows(held_out, 64, LENGTH, fixed)
    model = TransformerLanguageModel(seed, context=LENGTH - 1, width=width)

    def batches(epoch):  # the places follow from seed and epoch, for the lab seeds the global generator for each
        return text.windows(words, steps * batch_size, LENGTH, torch.default_generator).split(batch_size)

    def loss(model, windows):
        return functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    def loss_on(model, windows):
        return float(loss(model, windows.to(next(model.parameters()).device)))

    return Task(
        model=model,
        batches=batches,
        loss=loss,
        metric=lambda model: {"test_loss": loss_on(model, tests)},
        validation=lambda model: loss_on(model, validation),
        optimizer=torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay),
        epochs=epochs,
    )
