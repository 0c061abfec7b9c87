"""How raw images become the inputs of a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
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

Train = Callable[[torch.Tensor, torch.Generator], torch.Tensor]
Test = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Inputs:
    """Both ways from raw bytes, shape (n, channels, height, width), to float32 inputs.

    Attributes:
        train: of a training batch; may draw from the generator.
        test: of a test batch.
        channels: of the inputs.
        skip: draws from the generator what a training batch of so many images would draw, and makes nothing.
    """

    train: Train
    test: Test
    channels: int
    skip: Callable[[int, torch.Generator], object] = lambda count, generator: None


def scaled(dataset: Dataset) -> Inputs:
    """Give bytes / 256. Caffe lenet_train_test.prototxt: scale 0.00390625, no mean."""
    return Inputs(lambda images, generator: pixels(images), pixels, dataset.train_images.shape[1])


def mean_image(dataset: Dataset) -> Inputs:
    """Give bytes minus the mean of all training images, pixel by pixel. Caffe cifar10_full_train_test.prototxt."""
    # Sums of bytes in int64 are exact; in float32 the mean of 50,000 images would not be.
    total = torch.stack([chunk.to(torch.int64).sum(0) for chunk in dataset.train_images.split(5000)]).sum(0)
    mean = (total.double() / len(dataset.train_images)).float()

    def test(images: torch.Tensor) -> torch.Tensor:
        return images.float().sub_(mean)

    return Inputs(lambda images, generator: test(images), test, dataset.train_images.shape[1])


def augmented(dataset: Dataset) -> Inputs:
    """Give random crops, mirrored at random and normalised; see ``data/augmentation.py``."""
    if dataset.name not in STATISTICS:
        raise UsageError(f"inputs='augmented' with data={dataset.name!r}: use one of {', '.join(STATISTICS)}")
    mean, std = STATISTICS[dataset.name]
    side = dataset.train_images.shape[-1]

    def skip(count: int, generator: torch.Generator) -> object:
        blank = torch.zeros((count, 1, side, side), dtype=torch.uint8)
        return augmentation.cropped_and_mirrored(blank, generator)

    return Inputs(
        lambda images, generator: augmentation.training_images(images, generator, mean, std),
        lambda images: augmentation.normalised(images, mean, std),
        dataset.train_images.shape[1],
        skip,
    )


def framed(dataset: Dataset) -> Inputs:
    """Give digits in frames of 32 x 32 pixels, normalised: digits in the place of small photographs."""

    def test(images: torch.Tensor) -> torch.Tensor:
        return augmentation.normalised(functional.pad(images, (2, 2, 2, 2)), DIGITS_MEAN, DIGITS_STD)

    return Inputs(lambda images, generator: test(images), test, 1)


def coloured(dataset: Dataset) -> Inputs:
    """Give digits in frames of 32 x 32 pixels in three equal channels of bytes minus the mean image's mean."""

    def test(images: torch.Tensor) -> torch.Tensor:
        framed_images = functional.pad(images, (2, 2, 2, 2)).float().sub_(255.0 * DIGITS_MEAN[0])
        return framed_images.expand(-1, 3, -1, -1)

    return Inputs(lambda images, generator: test(images), test, 3)


def enlarged(dataset: Dataset) -> Inputs:
    """Give digits enlarged to 227 x 227 pixels in three equal channels: digits in the place of photographs."""

    def test(images: torch.Tensor) -> torch.Tensor:
        large = functional.interpolate(images.float(), size=(227, 227), mode="nearest")
        return large.sub_(255.0 * DIGITS_MEAN[0]).expand(-1, 3, -1, -1)

    return Inputs(lambda images, generator: test(images), test, 3)


INPUTS: dict[str, Callable[[Dataset], Inputs]] = {
    "scaled": scaled,
    "mean-image": mean_image,
    "augmented": augmented,
    "framed": framed,
    "coloured": coloured,
    "enlarged": enlarged,
}
"""Name -> how the inputs of a data set in memory are made. Image folders make their own: "crops"."""


def make(name: str, dataset: Dataset) -> Inputs:
    """Make the inputs of a data set.

    Args:
        name: a key of ``INPUTS``.
        dataset: the data, in memory.

    Returns:
        Both ways.

    Raises:
        UsageError: unknown name, or one that does not suit the data.
    """
    check(name)
    return INPUTS[name](dataset)


def check(name: str) -> None:
    """Refuse a form of inputs that is not known."""
    if name not in INPUTS:
        raise UsageError(f"inputs={name!r}: use one of {', '.join(INPUTS)}, or 'crops' of an image folder")
