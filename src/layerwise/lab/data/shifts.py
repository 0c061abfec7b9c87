"""Shifts: the same images in other colours, or with other classes, for a network that was trained on them as they are.

After Lee et al. 2022, arXiv 2210.11466 ("surgical fine-tuning"), who shift the input, or the output by y -> 9 - y.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from layerwise.lab.data import Dataset
from layerwise.lab.errors import UsageError

MIXTURE = ((0.2, 0.8, 0.0), (0.0, 0.2, 0.8), (0.8, 0.0, 0.2))
"""Red, green and blue of an image with mixed colours, each of the red, green and blue that it had."""

Change = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


def _mixed(images: torch.Tensor, labels: torch.Tensor, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    if images.shape[1] != 3:
        raise UsageError(f"shift='mixed-colours' of images with {images.shape[1]} channel: use 'inverted'")
    parts = images.split(5000)  # in float32 all of them would take four times the memory
    mixed = [torch.einsum("ij,njhw->nihw", torch.tensor(MIXTURE), part.float()).round().byte() for part in parts]
    return torch.cat(mixed), labels


SHIFTS: dict[str, Change] = {
    "mixed-colours": _mixed,
    "inverted": lambda images, labels, classes: (255 - images, labels),
    "flipped-classes": lambda images, labels, classes: (images, classes - 1 - labels),
}
"""Name -> images, as bytes, their classes, and the number of classes -> images and classes after the shift."""


def check(name: str | None) -> None:
    """Refuse a shift that is not known."""
    if name is not None and name not in SHIFTS:
        raise UsageError(f"shift={name!r}: use one of {', '.join(SHIFTS)}, or leave it out")


def shifted(dataset: Dataset, name: str | None, classes: int) -> Dataset:
    """Shift training and test images, or their classes."""
    check(name)
    if name is None:
        return dataset
    train, test = (dataset.train_images, dataset.train_labels), (dataset.test_images, dataset.test_labels)
    (train_images, train_labels), (test_images, test_labels) = (
        SHIFTS[name](*train, classes),
        SHIFTS[name](*test, classes),
    )
    return replace(
        dataset,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
    )
