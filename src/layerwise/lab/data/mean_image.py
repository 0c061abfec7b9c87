"""The mean image of an image folder, kept in a file with its checksum."""

from __future__ import annotations

import hashlib
import io
import warnings
from pathlib import Path

import numpy as np

from layerwise.lab.runs.store import read_bytes, write_whole

DIGEST_LENGTH = 32
"""Bytes of the checksum at the end of a mean image's file."""

LARGEST_HEADER = 1000
"""Bytes of such a file beside the image."""


def read_mean(path: Path, side: int) -> np.ndarray | None:
    """Read a mean image.

    Args:
        path: of the file.
        side: of the image.

    Returns:
        float32, shape (3, side, side); None if there is no file or it is not one of such an image.
    """
    try:
        content = read_bytes(path, 4 * 3 * side**2 + LARGEST_HEADER)
        if hashlib.sha256(content[:-DIGEST_LENGTH]).digest() != content[-DIGEST_LENGTH:]:
            return None
        mean = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    good = mean.shape == (3, side, side) and mean.dtype == np.float32 and 0 <= mean.min() <= 255
    return mean if good else None


def write_mean(path: Path, mean: np.ndarray) -> None:
    """Keep a mean image, its checksum behind it; a folder that cannot be written costs time the next time only.

    Args:
        path: of the file.
        mean: float32, shape (3, side, side).
    """
    buffer = io.BytesIO()
    np.save(buffer, mean)
    content = buffer.getvalue()
    try:
        write_whole(path, content + hashlib.sha256(content).digest())
    except OSError as error:
        warnings.warn(
            f"the mean image cannot be kept in {path.parent} ({error.strerror or error}) and is computed again next "
            "time: give a cache folder that can be written, cache=...",
            stacklevel=2,
        )
