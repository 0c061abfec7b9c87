"""MNIST and Fashion-MNIST from their publishers' four files, in ``<folder>`` or in its subfolder.

The files of both data sets have the same names, sizes and headers, so only their checksums tell them apart. Files that
were compressed anew, as in Debian's ``dataset-fashion-mnist``, or not at all, are read too: what counts is the
checksum of what is in them.
"""

from __future__ import annotations

import hashlib
import zlib
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from layerwise.lab.data import Dataset
from layerwise.lab.errors import UsageError
from layerwise.lab.runs.store import read_bytes

SIDE = 28


@dataclass(frozen=True)
class Published:
    """Size and MD5 of a file as its publisher compressed it, and MD5 of what is in it."""

    size: int
    md5: str
    content_md5: str


CONTENT_SIZES = {
    "train-images-idx3-ubyte.gz": 16 + 60_000 * SIDE * SIDE,
    "train-labels-idx1-ubyte.gz": 8 + 60_000,
    "t10k-images-idx3-ubyte.gz": 16 + 10_000 * SIDE * SIDE,
    "t10k-labels-idx1-ubyte.gz": 8 + 10_000,
}
"""File -> bytes when decompressed, in both data sets: header, then one byte a pixel or a label."""

_MNIST = (
    Published(9_912_422, "f68b3c2dcbeaaa9fbdd348bbdeb94873", "6bbc9ace898e44ae57da46a324031adb"),
    Published(28_881, "d53e105ee54ea40749a09fcbcd1e9432", "a25bea736e30d166cdddb491f175f624"),
    Published(1_648_877, "9fb629c4189551a2d022fa330f9573f3", "2646ac647ad5339dbf082846283269ea"),
    Published(4_542, "ec29112dd5afa0611ce80d1b7f02629c", "27ae3e4e09519cfbb04c329615203637"),
)
_FASHION_MNIST = (
    Published(26_421_880, "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "f4a8712d7a061bf5bd6d2ca38dc4d50a"),
    Published(29_515, "25c81989df183df01b3e8a0aad5dffbe", "9018921c3c673c538a1fc5bad174d6f9"),
    Published(4_422_102, "bef4ecab320f06d8554ea6380940ec79", "8181f5470baa50b63fa0f6fddb340f0a"),
    Published(5_148, "bb300cfdad3c16e7a12a480ee83cd310", "15d484375f8d13e6eb1aabb0c3f46965"),
)
FILES = {
    "mnist": dict(zip(CONTENT_SIZES, _MNIST, strict=True)),
    "fashion-mnist": dict(zip(CONTENT_SIZES, _FASHION_MNIST, strict=True)),
}
"""Data set -> its files. LeCun, Cortes and Burges; github.com/zalandoresearch/fashion-mnist, README."""

FOLDERS = {"mnist": ("mnist",), "fashion-mnist": ("fashion-mnist", "fashion_mnist")}
"""Data set -> the subfolders it is looked for in."""

TITLES = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST"}

_THINGS = {"mnist": "digits", "fashion-mnist": "pictures of clothes"}
_LABELS_FIRST = sorted(CONTENT_SIZES, key=CONTENT_SIZES.__getitem__)


def _existing(place: Path, file: str) -> Path | None:
    """Give the file as it is in a folder, compressed before not compressed, or None."""
    for path in (place / file, place / file.removesuffix(".gz")):
        if path.is_file():
            return path
    return None


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _read(path: Path) -> tuple[str | None, bytes, bytes]:
    """Read a file: the data set that its checksum names, or None; its content, decompressed; its bytes."""
    file = path.name.removesuffix(".gz") + ".gz"
    size = CONTENT_SIZES[file]
    # No compression makes the content larger than by a thousandth.
    content = raw = read_bytes(path, size + size // 1000 + 1000, links=True)
    if path.suffix == ".gz":
        unpacker = zlib.decompressobj(wbits=31)
        with suppress(zlib.error):
            content = unpacker.decompress(raw, size + 1)
        if not unpacker.eof:
            content = b""
    found = _md5(content)
    return next((name for name, files in FILES.items() if files[file].content_md5 == found), None), content, raw


def recognise(path: Path) -> str | None:
    """Say which data set a file belongs to, by what is in it; None for any other file or one that cannot be read."""
    if path.name.removesuffix(".gz") + ".gz" not in CONTENT_SIZES:
        return None
    try:
        return _read(path)[0]
    except (OSError, UsageError):
        return None


def find(folder: Path, name: str = "mnist") -> Path | None:
    """Give the folder with at least one of the four files: the data set's subfolder or the folder itself, or None.

    Files in ``folder`` itself that are the other data set's do not count; unrecognised ones do, so that a damaged one
    is reported.
    """
    for candidate in FOLDERS[name]:
        if any(_existing(folder / candidate, file) for file in CONTENT_SIZES):
            return folder / candidate
    owner = None
    paths = [path for file in _LABELS_FIRST if (path := _existing(folder, file)) is not None]
    for path in paths:
        owner = recognise(path) or owner
        if owner == name:
            return folder
    return folder if paths and owner is None else None


def complete(folder: Path, name: str = "mnist") -> bool:
    """Tell whether all four files are there; of the labels alone the checksums are looked at."""
    place = find(folder, name)
    if place is None:
        return False
    paths = [_existing(place, file) for file in _LABELS_FIRST]
    return all(paths) and all(recognise(path) == name for path in paths[:2] if path is not None)


def _payload(place: Path, file: str, name: str) -> bytes:
    """Give what is in a file, or refuse one that is not the published one."""
    path, expected = _existing(place, file) or place / file, FILES[name][file]
    otherwise = ", or leave --data-dir and LAYERWISE_DATA out to use digits5k" if name == "mnist" else ""
    remedy = f"fetch it again with  layerwise data {name}{otherwise}"
    try:
        owner, content, raw = _read(path)
    except (OSError, UsageError) as error:
        reason = getattr(error, "strerror", None) or f"damaged: {str(error).removeprefix(f'{path}: ')}"
        raise UsageError(
            f"{path}: {reason}; expected the {TITLES[name]} file with MD5 {expected.md5}; {remedy}"
        ) from error
    if owner != name:
        problem = "damaged" if owner is None else f"is of {TITLES[owner]}, not of {TITLES[name]}"
        raise UsageError(
            f"{path}: {problem}: MD5 is {_md5(raw)} ({len(raw)} bytes), expected {expected.md5} ({expected.size} "
            f"bytes), or {expected.content_md5} when decompressed; {remedy}"
        )
    return content


def _array(place: Path, file: str, name: str) -> torch.Tensor:
    """Read an idx file: a magic number whose last byte counts the dimensions, their sizes, big-endian, the bytes."""
    data = _payload(place, file, name)
    sizes = np.frombuffer(data, dtype=">i4", count=data[3], offset=4).tolist()
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * data[3]).reshape(sizes).copy())


@lru_cache(maxsize=1)
def load(folder: Path, name: str = "mnist") -> Dataset:
    """Read MNIST or Fashion-MNIST from the folder of the files, or from the one above."""
    place = find(folder, name)
    if place is None:
        raise UsageError(
            f"data-dir={str(folder)!r} holds no {TITLES[name]} file: expected {', '.join(CONTENT_SIZES)}, there or in "
            f"{FOLDERS[name][0]}/; fetch them with  layerwise data {name}"
        )
    train_images, train_labels, test_images, test_labels = (_array(place, file, name) for file in CONTENT_SIZES)
    return Dataset(
        name=name,
        title=f"{TITLES[name]}: 60,000 {_THINGS[name]} to train, 10,000 to test",
        train_images=train_images.unsqueeze(1),
        train_labels=train_labels.long(),
        test_images=test_images.unsqueeze(1),
        test_labels=test_labels.long(),
    )
