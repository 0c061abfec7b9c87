"""The images of the amplification demo: a slice of CIFAR-10, or digits padded to its size."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch.nn import functional

from layerwise.lab.data import Dataset, augmentation, cifar, digits

DIGITS_MEAN, DIGITS_STD = (0.1000,), (0.2752,)
"""Of padded MNIST on [0, 1]: MNIST's own 0.1307 and 0.3081 with a frame of two black pixels."""


def choose(data_dir: Path | None) -> str:
    """Say which images the demo uses: CIFAR-10 where its files are, else the digits of the package.

    Args:
        data_dir: folder that may hold CIFAR-10, or None.

    Returns:
        ``"cifar10"`` or ``"digits5k"``.

    Raises:
        UsageError: the folder does not exist.
    """
    return "cifar10" if data_dir is not None and cifar.find("cifar10", data_dir) is not None else "digits5k"


@lru_cache(maxsize=1)
def load(name: str, data_dir: Path | None, train_count: int, test_count: int) -> Dataset:
    """Read the first images of a data set.

    Args:
        name: ``"cifar10"`` or ``"digits5k"``.
        data_dir: folder that holds CIFAR-10; not used by ``"digits5k"``.
        train_count: training images, the first in file order.
        test_count: test images, likewise.

    Returns:
        Images of 32 x 32 pixels, uint8.

    Raises:
        UsageError: files missing or damaged.
    """
    if name == "cifar10" and data_dir is not None:
        whole = cifar.load(name, data_dir)
        cifar.load.cache_clear()  # 180 MB that no one reads again
        title = f"CIFAR-10, the first {train_count:,} photographs to train, the first {test_count:,} test photographs"
    else:
        whole = digits.load()
        frame = (2, 2, 2, 2)
        whole = replace(
            whole,
            train_images=functional.pad(whole.train_images, frame),
            test_images=functional.pad(whole.test_images, frame),
        )
        title = f"MNIST digits in frames of 32 x 32 pixels, {train_count:,} to train, {test_count:,} to test"
    return Dataset(
        name=name,
        title=title,
        train_images=whole.train_images[:train_count].clone(),
        train_labels=whole.train_labels[:train_count].clone(),
        test_images=whole.test_images[:test_count].clone(),
        test_labels=whole.test_labels[:test_count].clone(),
    )


def to_train(dataset: Dataset, index: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Make the input of a training batch; photographs are cropped and mirrored at random, digits are not.

    Args:
        dataset: the data.
        index: of the images.
        generator: source of the random numbers.

    Returns:
        float32, shape (n, channels, 32, 32).
    """
    images = dataset.train_images[index]
    if dataset.name == "cifar10":
        return augmentation.training_images(images, generator, augmentation.CIFAR10_MEAN, augmentation.CIFAR10_STD)
    return to_test(dataset, images)  # a mirrored digit is another sign


def to_test(dataset: Dataset, images: torch.Tensor) -> torch.Tensor:
    """Make the input of a test batch.

    Args:
        dataset: the data.
        images: uint8.

    Returns:
        float32 of the same shape, normalised.
    """
    if dataset.name == "cifar10":
        return augmentation.test_images(images, augmentation.CIFAR10_MEAN, augmentation.CIFAR10_STD)
    return augmentation.test_images(images, DIGITS_MEAN, DIGITS_STD)
