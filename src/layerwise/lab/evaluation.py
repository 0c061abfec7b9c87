"""What all training runs share: how they stop, and how a network is tested."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from layerwise.lab.data import Dataset

CHANCE_ERROR = 90.0
"""Test error in % of a network that says nothing about ten classes; what a diverged run counts as."""

MEMORY_FORMAT = torch.channels_last
"""Layout of the convolutions. On one thread an iteration of LeNet takes 11 ms so, 20 ms in the default layout; one of
ResNet-10 at width 8 with 32 images 23 ms against 34 ms."""

EVALUATION_CHUNK = 500
"""Test images in one forward pass; a stop is looked for between two of them."""


class StoppedError(Exception):
    """The run was told to stop and has no result."""


def measure_error(
    model: nn.Module,
    dataset: Dataset,
    inputs: Callable[[torch.Tensor], torch.Tensor],
    stop: Callable[[], bool] = lambda: False,
) -> float:
    """Measure the error on all test images, in evaluation mode.

    Args:
        model: the network; left in training mode.
        dataset: the data.
        inputs: turns raw bytes into what the network reads.
        stop: asked between chunks.

    Returns:
        Wrong classifications in %.

    Raises:
        StoppedError: ``stop`` said so.
    """
    wrong = 0
    model.eval()
    with torch.no_grad():
        for images, labels in zip(
            dataset.test_images.split(EVALUATION_CHUNK),
            dataset.test_labels.split(EVALUATION_CHUNK),
            strict=True,
        ):
            if stop():
                raise StoppedError
            wrong += int((model(inputs(images)).argmax(1) != labels).sum())
    model.train()
    return 100.0 * wrong / len(dataset.test_labels)
