"""What is known of the images of a folder: a checksum of each, taken when it is first read and compared ever after.

A JPEG in which a bit has turned decodes to other pixels without a word: the format has no checksum.
"""

from __future__ import annotations

import warnings
import zlib
from pathlib import Path

import numpy as np

from layerwise.lab.errors import UsageError
from layerwise.lab.runs.plain_files import kind_of
from layerwise.lab.runs.store import write_whole


class Contents:
    """Checksums of the files of a part of a folder, in a file that all processes share.

    Each is four bytes, CRC-32, which are 0 until the image is read for the first time. They are written in one piece,
    so no process needs to wait for another. Where the file cannot be written, each process knows what it has read.

    Args:
        path: of the file.
        count: number of images.
    """

    def __init__(self, path: Path, count: int) -> None:
        self.path = path
        self._known = _opened(path, count)

    def check(self, number: int, image: Path, content: bytes) -> None:
        """Compare an image with what was read of it before; may be called by several threads.

        Args:
            number: of the image, from 0.
            image: its file, for the message.
            content: of the file.

        Raises:
            UsageError: it was another one.
        """
        found = zlib.crc32(content) or 1  # 0 says that it is not known
        before = int(self._known[number])
        if before == 0:
            self._known[number] = found
        elif before != found:
            raise UsageError(
                f"{image}: its content has changed since it was first read, and neither its name nor its size: put "
                f"back what it was; if the new one is meant, remove {self.path} and the runs on this folder"
            )


def _opened(path: Path, count: int) -> np.ndarray:
    """Open the file, or begin it; one of another length is begun anew."""
    size = 4 * count
    try:
        if kind_of(path) is not None or not path.exists() or path.stat().st_size != size:  # no link is written into
            write_whole(path, bytes(size))
        return np.memmap(path, dtype=np.uint32, mode="r+", shape=(count,))
    except OSError as error:
        warnings.warn(
            f"{path}: cannot be written ({error.strerror or error}), so that an image that is damaged between two runs "
            "is not noticed: give a cache folder that can be written, cache=...",
            stacklevel=2,
        )
        return np.zeros(count, dtype=np.uint32)
