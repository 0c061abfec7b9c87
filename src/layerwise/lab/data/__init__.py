"""Data sets of the lab: small ones held in memory as uint8, image folders read as they are needed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from layerwise.lab.errors import UsageError, nearest

if TYPE_CHECKING:
    from layerwise.lab.data.folder import ImageFolder

FOLDER = "imagenet"  # name of what is not held in memory: ImageNet, or any image folder in its layout
LIBRARY = "python-library"  # name of the only text; library.py reads it
IMAGENET_COUNTS = (1_000, 1_281_167, 50_000)
"""Classes, training and validation images of ImageNet itself (ILSVRC 2012), which the papers trained on."""


@dataclass(frozen=True)
class Dataset:
    """Images, uint8, shape (n, channels, height, width), with their classes, int64, in the order of the file."""

    name: str
    title: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def pixels(images: torch.Tensor) -> torch.Tensor:
    """Scale bytes by 1/256, the only preprocessing of Caffe's LeNet. Caffe lenet_train_test.prototxt."""
    return images.to(torch.float32).mul_(0.00390625)


def training_batch(dataset: Dataset, iteration: int, size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the batch of an iteration, from 0, as Caffe's data layer does: in file order, wrapping around.

    The order is part of the protocol: with shuffled data the errors of Singh et al. 2015, Table I, are missed.
    """
    index = torch.arange(iteration * size, (iteration + 1) * size) % len(dataset.train_labels)
    return dataset.train_images[index], dataset.train_labels[index]


@dataclass(frozen=True)
class Known:
    """A data set that the lab can read."""

    name: str
    title: str
    size: int  # bytes to be fetched; 0 where nothing is


@cache
def names() -> tuple[Known, ...]:
    """List all data sets, the one that comes with layerwise first."""
    from layerwise.lab.data import cifar, fetch, mnist

    titles = mnist.TITLES | cifar.TITLES
    sizes = {name: sum(file.size for file in files) for name, files in fetch.FILES.items()}
    return (
        Known("digits5k", "5,000 MNIST digits, which come with layerwise", 0),
        *(Known(name, titles[name], size) for name, size in sizes.items()),
        Known(FOLDER, "ImageNet, or any image folder in its layout", 0),
        Known(LIBRARY, "Python's own library as text, which comes with Python", 0),
    )


def known(name: str) -> Known:
    """Give what is known of a data set, or refuse an unknown name."""
    entries = {entry.name: entry for entry in names()}
    if name not in entries:
        raise UsageError(f"name={name!r}: use one of {', '.join(map(repr, entries))}.{nearest(name, entries)}")
    return entries[name]


def present(name: str, data_dir: Path | None) -> bool:
    """Tell whether no file of a data set is missing; only ``load`` reads and checks all of it."""
    from layerwise.lab.data import cifar, folder, mnist

    known(name)
    if name in ("digits5k", LIBRARY):
        return True
    if data_dir is None or not data_dir.is_dir():
        return False
    if name in mnist.FILES:
        return mnist.complete(data_dir, name)
    if name == FOLDER:
        return folder.find(data_dir) is not None
    found = cifar.find(name, data_dir)
    if found is None:
        return False
    form, place = found
    return place.is_file() or all((place / file).is_file() for file in form.files)


def open_folder(data_dir: Path | None, **options: Any) -> ImageFolder:
    """Open photographs in ImageNet's layout, in a folder or in its subfolder ``imagenet``."""
    from layerwise.lab.data import folder

    found = None if data_dir is None else folder.find(data_dir)
    if found is None:
        where = None if data_dir is None else str(data_dir)
        raise UsageError(
            f"data-dir={where!r} holds no image folder: give one with train/<class>/*.JPEG and val/<class>/*.JPEG, or "
            "with these in imagenet/"
        )
    return folder.ImageFolder(found, **options)


def load(name: str, data_dir: Path | None = None) -> Dataset:
    """Read a data set; ``"digits5k"`` needs no folder."""
    from layerwise.lab.data import cifar, digits, mnist

    if name == "digits5k":
        return digits.load()
    if name in mnist.FILES and data_dir is not None:
        return mnist.load(data_dir, name)
    if name in cifar.FORMS and data_dir is not None:
        return cifar.load(name, data_dir)
    raise UsageError(
        f"name={name!r} with data_dir={str(data_dir)!r}: use 'digits5k', or 'mnist', 'fashion-mnist', 'cifar10' or "
        f"'cifar100' with its folder; {FOLDER!r} does not fit into the memory: use open_folder; {LIBRARY!r} has no "
        "images: use library.load"
    )
