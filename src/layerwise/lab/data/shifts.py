"""Images and classes that differ from those a network was trained on, in the manner of Lee et al. 2023."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from layerwise.lab.data import Dataset
from layerwise.lab.errors import UsageError

MIXING = ((0.1, 0.2, 0.7), (0.6, 0.1, 0.3), (0.2, 0.7, 0.1))
"""Row i: the shares of red, green and blue in channel i of a mixed image. Each row sums to 1, so grey stays grey."""

CHUNK = 5000
"""Images that are mixed at a time, in float32."""


def _mixed(images: Tensor) -> Tensor:
    """Give each channel a mean of all three; the nearest whole number."""
    if images.shape[1] != len(MIXING):
        raise UsageError(
            f"shift='mixed-colours' of images with {images.shape[1]} channel: it takes 3; use 'inverted' or "
            "'permuted-labels'"
        )
    mixing = torch.tensor(MIXING)
    chunks = (torch.einsum("ij,njhw->nihw", mixing, part.float()) for part in images.split(CHUNK))
    return torch.cat([chunk.round_().byte() for chunk in chunks])


SHIFTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, int], Tensor]]] = {
    "mixed-colours": (_mixed, lambda labels, classes: labels),
    "inverted": (lambda images: 255 - images, lambda labels, classes: labels),
    "permuted-labels": (lambda images: images, lambda labels, classes: classes - 1 - labels),
}
"""Name -> what becomes of images, uint8, and of their labels of so many classes: the last one is y -> 9 - y of ten."""


def check(name: str | None) -> None:
    """Refuse a shift that is not known; None is none."""
    if name is not None and name not in SHIFTS:
        raise UsageError(f"shift={name!r}: use one of {', '.join(SHIFTS)}, or leave it out")


def shifted(dataset: Dataset, name: str | None, classes: int) -> Dataset:
    """Shift a data set of so many classes, its test images too."""
    check(name)
    if name is None:
        return dataset
    images, labels = SHIFTS[name]
    return replace(
        dataset,
        train_images=images(dataset.train_images),
        train_labels=labels(dataset.train_labels, classes),
        test_images=images(dataset.test_images),
        test_labels=labels(dataset.test_labels, classes),
    )
