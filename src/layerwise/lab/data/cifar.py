"""CIFAR-10 and CIFAR-100 from their publisher's files: an archive, which is read in memory, or what comes out of it.

A binary record is the class (CIFAR-100: coarse, then fine), a byte each, then the red, green and blue plane of 32 x 32
bytes. An archive is checked by its MD5, a pickle by its MD5 before it is unpickled, CIFAR-10 in whatever form by the
SHA-256 of pixels and classes. Unpacked files of CIFAR-100's binary version have no known checksum and are not read.
"""

from __future__ import annotations

import hashlib
import pickle
import tarfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerwise.lab.data import Dataset
from layerwise.lab.errors import UsageError
from layerwise.lab.runs.store import read_bytes

LARGEST = 1 << 28  # bytes of a file
CHANNELS, SIDE = 3, 32
PIXELS = CHANNELS * SIDE * SIDE


@dataclass(frozen=True)
class Form:
    """One of the published forms of a data set; ``md5`` is that of the archive, ``folder`` is in it."""

    archive: str
    md5: str
    folder: str
    train_files: dict[str, int]  # file -> number of images, in the order of the data set
    test_files: dict[str, int]
    label_bytes: int = 0  # before the pixels of a record, the class in the last of them; 0 in the python version
    label_key: bytes = b""  # of the classes in the python version
    file_md5s: dict[str, str] = field(default_factory=dict)  # of the python version: a pickle is a program

    @property
    def files(self) -> dict[str, int]:
        """All files that are read, with their numbers of images."""
        return self.train_files | self.test_files

    @property
    def remedy(self) -> str:
        """What to do about a file that cannot be used."""
        return f"fetch {self.archive} (MD5 {self.md5}) again from www.cs.toronto.edu/~kriz/cifar.html"


FORMS = {
    "cifar10": (
        Form(
            "cifar-10-python.tar.gz",
            "c58f30108f718f92721af3b95e74349a",
            "cifar-10-batches-py",
            {f"data_batch_{number}": 10_000 for number in range(1, 6)},
            {"test_batch": 10_000},
            label_key=b"labels",
            file_md5s={
                "data_batch_1": "c99cafc152244af753f735de768cd75f",
                "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                "data_batch_4": "634d18415352ddfa80567beed471001a",
                "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
                "test_batch": "40351d587109b95175f43aff81a1287e",
            },
        ),
        Form(
            "cifar-10-binary.tar.gz",
            "c32a1d4ab5d03f1284b67883e8d87530",
            "cifar-10-batches-bin",
            {f"data_batch_{number}.bin": 10_000 for number in range(1, 6)},
            {"test_batch.bin": 10_000},
            label_bytes=1,
        ),
    ),
    "cifar100": (
        Form(
            "cifar-100-python.tar.gz",
            "eb9058c3a382ffc7106e4002c42a8d85",
            "cifar-100-python",
            {"train": 50_000},
            {"test": 10_000},
            label_key=b"fine_labels",
            file_md5s={"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        ),
        Form(
            "cifar-100-binary.tar.gz",
            "03b5dce01913d631647c71ecec9e9cb8",
            "cifar-100-binary",
            {"train.bin": 50_000},
            {"test.bin": 10_000},
            label_bytes=2,
        ),
    ),
}
"""Data set -> its forms, the one looked for first before the other. MD5 of the archives as published by Krizhevsky, of
the files as in torchvision/datasets/cifar.py."""

CONTENTS = {
    "cifar10": {
        "training": "1e91790dbaf241617ca1f29a9aba08eb9a62df84cc90676b47edd05ad2ab3c94",
        "test": "9a4c74f5c8b6f2c4e13d3a1dfb43a5a8cda8a9da515e99fd620d2013a1a6287a",
    },
}
"""Data set -> SHA-256 of the pixels of its images, then of their classes, a byte each, in file order: the same in every
form. Computed from the python version, whose files had the MD5s of torchvision/datasets/cifar.py."""

TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}


def find(name: str, folder: Path) -> tuple[Form, Path] | None:
    """Give the form of a data set and where it is: the archive, or the folder with at least one of the files.

    A subfolder comes before the folder, the python version before the binary one, what is unpacked before the archive.
    """
    for place in (folder / name, folder):
        for form in FORMS[name]:
            for candidate in (place / form.folder, place) if name in CONTENTS or form.file_md5s else ():
                if any((candidate / file).is_file() for file in form.files):
                    return form, candidate
            if (place / form.archive).is_file():
                return form, place / form.archive
    return None


def _check_file(form: Form, name: str, source: str, content: bytes) -> None:
    """Refuse a file that is not the published one: by its MD5, or by its size where ``_check_content`` follows."""
    if expected := form.file_md5s.get(name):
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != expected:
            raise UsageError(f"{source}: damaged: MD5 is {found}, expected {expected}; {form.remedy}")
    elif len(content) != (size := form.files[name] * (form.label_bytes + PIXELS)):
        raise UsageError(
            f"{source}: damaged or incomplete: {len(content)} bytes, expected {size} for {form.files[name]} images; "
            f"{form.remedy}"
        )


def _check_content(name: str, form: Form, place: Path, part: str, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Refuse pixels and classes that were not published, where their checksum is known."""
    expected = CONTENTS.get(name, {}).get(part)
    if expected is None:
        return
    digest = hashlib.sha256(images.numpy().data)
    digest.update(labels.numpy().astype(np.uint8).data)
    if digest.hexdigest() != expected:
        raise UsageError(
            f"{place}: the {part} images are not those of {TITLES[name]}: SHA-256 of pixels and classes is "
            f"{digest.hexdigest()}, expected {expected}; {form.remedy}"
        )


def _from_folder(form: Form, folder: Path) -> Iterator[tuple[str, str, bytes]]:
    """Read the files of a folder, one at a time: name, where it is, content."""
    for name, count in form.files.items():
        path = folder / name
        try:
            yield name, str(path), read_bytes(path, LARGEST, links=True)
        except OSError as error:
            reason = error.strerror or str(error)
            raise UsageError(f"{path}: {reason}; expected a file of {count} images; {form.remedy}") from error


def _from_archive(form: Form, path: Path) -> Iterator[tuple[str, str, bytes]]:
    """Check the archive, then read its files, one at a time: name, where it is, content."""
    try:
        with path.open("rb") as stream:
            digest = hashlib.md5(usedforsecurity=False)
            while block := stream.read(1 << 20):
                digest.update(block)
            if digest.hexdigest() != form.md5:
                raise UsageError(
                    f"{path}: damaged: MD5 is {digest.hexdigest()} ({stream.tell()} bytes), expected {form.md5}; "
                    f"{form.remedy}"
                )
            stream.seek(0)
            with tarfile.open(fileobj=stream, mode="r:gz") as archive:
                for member in archive:
                    name = member.name.removeprefix(f"{form.folder}/")
                    if member.isfile() and name in form.files and (content := archive.extractfile(member)):
                        yield name, f"{path}:{member.name}", content.read()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error}); {form.remedy}") from error


def _decode(form: Form, content: bytes) -> tuple[np.ndarray, Any]:
    """Give the pixels of a file, shape (n, 3072), and its classes, from 0."""
    if form.label_bytes:
        records = np.frombuffer(content, dtype=np.uint8).reshape(-1, form.label_bytes + PIXELS)
        return records[:, form.label_bytes :], records[:, form.label_bytes - 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how NumPy's types were described when the files were written
        table = pickle.loads(content, encoding="bytes")
    return table[b"data"], table[form.label_key]


@lru_cache(maxsize=1)
def load(name: str, folder: Path) -> Dataset:
    """Read CIFAR-10, or CIFAR-100 with its fine classes, from a folder as ``find`` takes it."""
    found = find(name, folder)
    if found is None:
        first, second = FORMS[name]
        raise UsageError(
            f"data-dir={str(folder)!r} holds no {TITLES[name]} file: expected {first.archive} or {first.folder}/, or "
            f"{second.archive}{f' or {second.folder}/' if name in CONTENTS else ', not unpacked'}; fetch it with  "
            f"layerwise data {name}"
        )
    form, place = found
    counts = list(form.files.values())
    images = torch.empty((sum(counts), CHANNELS, SIDE, SIDE), dtype=torch.uint8)
    labels = torch.empty(sum(counts), dtype=torch.int64)
    room = dict(zip(form.files, zip(images.split(counts), labels.split(counts), strict=True), strict=True))
    for file, source, content in (_from_folder if place.is_dir() else _from_archive)(form, place):
        _check_file(form, file, source, content)
        image_room, label_room = room[file]
        image_room.flatten(1).numpy()[...], label_room.numpy()[...] = _decode(form, content)
    count = sum(form.train_files.values())
    train, test = slice(count), slice(count, None)
    _check_content(name, form, place, "training", images[train], labels[train])
    _check_content(name, form, place, "test", images[test], labels[test])
    title = f"{TITLES[name]}: {count:,} photographs to train, {len(labels) - count:,} to test"
    return Dataset(name, title, images[train], labels[train], images[test], labels[test])
