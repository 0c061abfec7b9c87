"""Data sets of the lab: small ones held in memory as uint8, image folders read as they are needed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from layerwise.lab.data.folder import ImageFolder

BATCH_SIZE = 64
"""Images of one training batch. Caffe lenet_train_test.prototxt."""

PIXEL_SCALE = 0.00390625
"""1/256: the only preprocessing of Caffe's LeNet; no mean is subtracted. Caffe lenet_train_test.prototxt."""

FOLDER = "imagenet"
"""Name of what is not held in memory: ImageNet, or any image folder in its layout."""

IMAGENET_COUNTS = (1_000, 1_281_167, 50_000)
"""Classes, training and validation images of ImageNet itself (ILSVRC 2012), which the papers trained on."""


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


@dataclass(frozen=True)
class Known:
    """A data set that the lab can read.

    Attributes:
        name: what ``load`` and ``fetch`` take.
        title: as it is called.
        size: bytes to be fetched; 0 where nothing is.
    """

    name: str
    title: str
    size: int


@cache
def names() -> tuple[Known, ...]:
    """List all data sets, the one that comes with layerwise first.

    Returns:
        Name, title and size of each; ``present`` says whether a folder holds it.
    """
    from layerwise.lab.data import cifar, fetch, mnist

    titles = mnist.TITLES | cifar.TITLES
    sizes = {name: sum(file.size for file in files) for name, files in fetch.FILES.items()}
    return (
        Known("digits5k", "5,000 MNIST digits, which come with layerwise", 0),
        *(Known(name, titles[name], size) for name, size in sizes.items()),
        Known(FOLDER, "ImageNet, or any image folder in its layout", 0),
    )


def known(name: str) -> Known:
    """Give what is known of one data set.

    Args:
        name: of the data set.

    Returns:
        Name, title and size.

    Raises:
        UsageError: unknown name.
    """
    from layerwise.lab.errors import UsageError, nearest

    entries = {entry.name: entry for entry in names()}
    if name not in entries:
        raise UsageError(f"name={name!r}: use one of {', '.join(map(repr, entries))}.{nearest(name, entries)}")
    return entries[name]


def present(name: str, data_dir: Path | None) -> bool:
    """Say whether a data set is there, without reading all of it: only ``load`` checks everything.

    Args:
        name: of the data set.
        data_dir: folder to look in; one that does not exist holds nothing.

    Returns:
        True if no file is missing; of files whose names do not tell, the small ones have been checked.

    Raises:
        UsageError: unknown name.
    """
    from layerwise.lab.data import cifar, folder, mnist

    known(name)
    if name == "digits5k":
        return True
    if data_dir is None or not data_dir.is_dir():
        return False
    if name in mnist.FILES:
        return mnist.complete(data_dir, name)
    if name == FOLDER:
        return folder.find(data_dir) is not None
    place = cifar.find(name, data_dir)
    if place is None or place.is_file():
        return place is not None
    return any(all((place / file).is_file() for file in form.files) for form in cifar.FORMS[name])


def open_folder(data_dir: Path | None, **options: Any) -> ImageFolder:
    """Open photographs in ImageNet's layout, which are read as they are needed.

    Args:
        data_dir: the folder that holds ``train`` and ``val``, or the one above ``imagenet``, which does.
        **options: of ``ImageFolder``.

    Returns:
        The open folder.

    Raises:
        UsageError: no such folder, or it is not laid out like that.
    """
    from layerwise.lab.data import folder

    return folder.ImageFolder(folder.locate(data_dir), **options)


def load(name: str, data_dir: Path | None = None) -> Dataset:
    """Read a data set.

    Args:
        name: ``"digits5k"``, ``"mnist"``, ``"fashion-mnist"``, ``"cifar10"`` or ``"cifar100"``.
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
    if name in mnist.FILES and data_dir is not None:
        return mnist.load(data_dir, name)
    if name in cifar.FORMS and data_dir is not None:
        return cifar.load(name, data_dir)
    raise UsageError(
        f"name={name!r} with data_dir={str(data_dir)!r}: use 'digits5k', or 'mnist', 'fashion-mnist', 'cifar10' or "
        f"'cifar100' with its folder; {FOLDER!r} does not fit into the memory: use open_folder"
    )
