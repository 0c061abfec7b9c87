"""Data sets of the lab, held in memory as uint8."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

BATCH_SIZE = 64
"""Images of one training batch. Caffe lenet_train_test.prototxt."""

PIXEL_SCALE = 0.00390625
"""1/256: the only preprocessing of Caffe's LeNet; no mean is subtracted. Caffe lenet_train_test.prototxt."""


@dataclass(frozen=True)
class Dataset:
    """Grey or coloured images with their classes, in the order of the file.

    Attributes:
        name: short name, as recorded with each run.
        title: what it is, in words.
        train_images: uint8, shape (n, channels, height, width).
        train_labels: int64, shape (n,).
        test_images: uint8, shape (m, channels, height, width).
        test_labels: int64, shape (m,).
    """

    name: str
    title: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def pixels(images: torch.Tensor) -> torch.Tensor:
    """Turn raw bytes into the input of Caffe's LeNet.

    Args:
        images: uint8, shape (n, 1, height, width).

    Returns:
        float32 of the same shape, ``images / 256``.
    """
    return images.to(torch.float32).mul_(PIXEL_SCALE)


def training_batch(dataset: Dataset, iteration: int, size: int = BATCH_SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the batch of one iteration as Caffe's data layer does: in file order, unshuffled, wrapping around.

    Every batch has ``size`` images; the one that reaches the end of the file goes on with its beginning. The
    order is part of the protocol: with shuffled data the errors of Singh et al. 2015, Table I, are missed.

    Args:
        dataset: the data.
        iteration: number of updates already done, from 0.
        size: images in a batch.

    Returns:
        Images (uint8, shape (size, 1, height, width)) and labels (int64, shape (size,)).
    """
    count = len(dataset.train_labels)
    start = iteration * size % count
    if start + size <= count:
        return dataset.train_images[start : start + size], dataset.train_labels[start : start + size]
    index = torch.arange(start, start + size) % count
    return dataset.train_images[index], dataset.train_labels[index]


def choose(data_dir: Path | None) -> str:
    """Say which data set a demo uses: full MNIST where its files are, else the digits of the package.

    Args:
        data_dir: folder that may hold MNIST, or None.

    Returns:
        ``"mnist"`` or ``"digits5k"``.

    Raises:
        UsageError: the folder does not exist.
    """
    from layerwise.lab.data import mnist

    return "mnist" if data_dir is not None and mnist.find(data_dir) is not None else "digits5k"


def load(name: str, data_dir: Path | None = None) -> Dataset:
    """Read a data set.

    Args:
        name: ``"digits5k"``, ``"mnist"``, ``"cifar10"`` or ``"cifar100"``.
        data_dir: folder that holds the files of the data set; not used by ``"digits5k"``.

    Returns:
        The data, uint8.

    Raises:
        UsageError: unknown name, or files missing or damaged.
    """
    from layerwise.lab.data import cifar, digits, mnist
    from layerwise.lab.errors import UsageError

    if name == "digits5k":
        return digits.load()
    if name == "mnist" and data_dir is not None:
        return mnist.load(data_dir)
    if name in cifar.FORMS and data_dir is not None:
        return cifar.load(name, data_dir)
    raise UsageError(
        f"name={name!r} with data_dir={str(data_dir)!r}: use 'digits5k', or 'mnist', 'cifar10' or 'cifar100' with "
        "its folder"
    )
