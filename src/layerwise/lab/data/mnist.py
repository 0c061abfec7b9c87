"""The full MNIST from its publisher's four files.

Layout: ``<folder>/mnist/train-images-idx3-ubyte.gz`` and its three companions, or the four files in
``<folder>`` itself. The format is idx: a big-endian header (magic number, sizes), then the bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from layerwise.lab.data import Dataset
from layerwise.lab.errors import UsageError

FILES = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
"""MD5 of the files published by LeCun, Cortes and Burges."""


def find(folder: Path) -> Path | None:
    """Look for MNIST in a folder.

    Args:
        folder: where to look; its subfolder ``mnist`` is looked at first.

    Returns:
        The folder with at least one of the four files, or None.

    Raises:
        UsageError: the folder does not exist.
    """
    if not folder.is_dir():
        raise UsageError(
            f"data-dir={str(folder)!r} is not a folder: give an existing one that holds "
            "mnist/train-images-idx3-ubyte.gz and its companions, or leave it out to use digits5k"
        )
    for candidate in (folder / "mnist", folder):
        if any((candidate / name).is_file() for name in FILES):
            return candidate
    return None


def _payload(path: Path) -> bytes:
    """Read one file, check it, and return its decompressed bytes."""
    remedy = "fetch it again from a mirror of MNIST, or leave --data-dir and LAYERWISE_DATA out to use digits5k"
    expected = FILES[path.name]
    try:
        packed = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"{path}: {reason}; expected the MNIST file with MD5 {expected}; {remedy}") from error
    found = hashlib.md5(packed, usedforsecurity=False).hexdigest()
    if found != expected:
        raise UsageError(f"{path}: damaged: MD5 is {found} ({len(packed)} bytes), expected {expected}; {remedy}")
    try:
        return gzip.decompress(packed)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path}: cannot be decompressed ({error}); {remedy}") from error


def _images(path: Path) -> torch.Tensor:
    """Read an image file (header of 16 bytes: magic number, count, rows, columns)."""
    data = _payload(path)
    _, count, rows, columns = np.frombuffer(data, dtype=">i4", count=4).tolist()
    values = np.frombuffer(data, dtype=np.uint8, offset=16).reshape(count, 1, rows, columns)
    return torch.from_numpy(values.copy())


def _labels(path: Path) -> torch.Tensor:
    """Read a label file (header of 8 bytes: magic number, count)."""
    return torch.from_numpy(np.frombuffer(_payload(path), dtype=np.uint8, offset=8).astype(np.int64))


@lru_cache(maxsize=1)
def load(folder: Path) -> Dataset:
    """Read MNIST.

    Args:
        folder: the folder of the files, or the one above.

    Returns:
        60,000 training and 10,000 test digits of 28 x 28 pixels, uint8, in file order.

    Raises:
        UsageError: a file is missing or its MD5 is not the published one.
    """
    place = find(folder)
    if place is None:
        raise UsageError(f"data-dir={str(folder)!r} holds no MNIST file: expected {', '.join(FILES)}")
    return Dataset(
        name="mnist",
        title="MNIST: 60,000 digits to train, 10,000 to test",
        train_images=_images(place / "train-images-idx3-ubyte.gz"),
        train_labels=_labels(place / "train-labels-idx1-ubyte.gz"),
        test_images=_images(place / "t10k-images-idx3-ubyte.gz"),
        test_labels=_labels(place / "t10k-labels-idx1-ubyte.gz"),
    )
