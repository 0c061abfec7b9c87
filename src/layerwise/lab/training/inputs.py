"""How raw images become the inputs of a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from layerwise.lab.data import Dataset, augmentation, pixels
from layerwise.lab.errors import UsageError

DIGITS_MEAN, DIGITS_STD = (0.1000,), (0.2752,)
"""Of MNIST digits in a frame of two black pixels, on [0, 1]: MNIST's own 0.1307 and 0.3081 with the frame."""

STATISTICS = {
    "cifar10": (augmentation.CIFAR10_MEAN, augmentation.CIFAR10_STD),
    "cifar100": (augmentation.CIFAR100_MEAN, augmentation.CIFAR100_STD),
}
"""Data set -> mean and divisor of its channels."""


@dataclass(frozen=True)
class Inputs:
    """The way from raw bytes, shape (n, channels, height, width), to float32 inputs."""

    test: Callable[[Tensor], Tensor]
    channels: int
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None  # raw training images -> raw training images

    def train(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Make the inputs of a training batch."""
        return self.test(images if self.augment is None else self.augment(images, generator))

    def skip(self, count: int, generator: torch.Generator) -> None:
        """Draw what a training batch of so many images would draw."""
        if self.augment is not None:
            self.augment(torch.zeros((count, 1, 1, 1), dtype=torch.uint8), generator)


def _mean_image(dataset: Dataset) -> Inputs:
    # Sums of bytes in int64 are exact; in float32 the mean of 50,000 images would not be.
    total = torch.stack([chunk.to(torch.int64).sum(0) for chunk in dataset.train_images.split(5000)]).sum(0)
    mean = (total.double() / len(dataset.train_images)).float()
    return Inputs(lambda images: images.float().sub_(mean), dataset.train_images.shape[1])


def _augmented(dataset: Dataset) -> Inputs:
    if dataset.name not in STATISTICS:
        raise UsageError(f"inputs='augmented' with data={dataset.name!r}: use one of {', '.join(STATISTICS)}")
    mean, std = STATISTICS[dataset.name]
    channels = dataset.train_images.shape[1]
    return Inputs(
        lambda images: augmentation.normalised(images, mean, std), channels, augmentation.cropped_and_mirrored
    )


def _in_frame(images: Tensor) -> Tensor:
    return functional.pad(images, (2, 2, 2, 2))


def _in_colour(images: Tensor) -> Tensor:
    """Give three equal channels of pixels minus the mean pixel."""
    return images.float().sub_(255.0 * DIGITS_MEAN[0]).expand(-1, 3, -1, -1)


def _enlarged(images: Tensor) -> Tensor:
    return functional.interpolate(images.float(), size=(227, 227), mode="nearest")


INPUTS: dict[str, Callable[[Dataset], Inputs]] = {
    # Bytes / 256. Caffe lenet_train_test.prototxt: scale 0.00390625, no mean.
    "scaled": lambda dataset: Inputs(pixels, dataset.train_images.shape[1]),
    # Bytes minus the mean of all training images, pixel by pixel. Caffe cifar10_full_train_test.prototxt.
    "mean-image": _mean_image,
    # Random crops, mirrored at random and normalised; see data/augmentation.py.
    "augmented": _augmented,
    # Digits in frames of 32 x 32 pixels, normalised, in the place of small photographs.
    "framed": lambda dataset: Inputs(
        lambda images: augmentation.normalised(_in_frame(images), DIGITS_MEAN, DIGITS_STD), 1
    ),
    # The same in three channels of bytes minus their mean.
    "coloured": lambda dataset: Inputs(lambda images: _in_colour(_in_frame(images)), 3),
    # Digits of 227 x 227 pixels in three channels, in the place of photographs.
    "enlarged": lambda dataset: Inputs(lambda images: _in_colour(_enlarged(images)), 3),
}
"""Name -> how the inputs of a data set in memory are made. Image folders make their own: "crops"."""


def make(name: str, dataset: Dataset) -> Inputs:
    """Make the inputs of a data set; the name may not suit it."""
    check(name)
    return INPUTS[name](dataset)


SYMBOLS = "symbols"
"""What the inputs of a text are called."""


def check(name: str) -> None:
    """Refuse a form of inputs that is not known."""
    if name not in INPUTS:
        raise UsageError(
            f"inputs={name!r}: use one of {', '.join(INPUTS)}, or 'crops' of an image folder, or 'symbols' of a text"
        )
