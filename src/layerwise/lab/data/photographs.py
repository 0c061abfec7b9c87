"""Reading photographs from folders, one folder a class.

An image is resized to a square whatever its proportions, by bilinear interpolation between the four nearest pixels, as
Caffe's ``convert_imageset --resize_height=256 --resize_width=256`` does; unlike Pillow's resizing it smooths nothing.
The channels are red, green and blue, not Caffe's blue, green and red, which to random weights makes no difference.
"""

from __future__ import annotations

import hashlib
import io
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from layerwise.lab.errors import UsageError
from layerwise.lab.runs.store import read_bytes

SUFFIXES = (".jpeg", ".jpg", ".png")  # of the files that count as images, in upper or lower case
LARGEST_FILE = 1 << 30  # bytes of a photograph
FORMATS = ("JPEG", "PNG")  # what an image may be, whatever its name says


def scan(folder: Path) -> dict[str, list[str]]:
    """List the images of each class, both sorted; hidden files and folders are not looked at."""
    try:
        classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
        found = {
            name: sorted(
                entry.name
                for entry in os.scandir(folder / name)
                if entry.name.lower().endswith(SUFFIXES) and entry.name[0] != "." and entry.is_file()
            )
            for name in classes
        }
    except OSError as error:
        raise UsageError(
            f"{error.filename or folder}: {error.strerror or error}; expected folders of images, one a class"
        ) from error
    if not found:
        raise UsageError(
            f"{folder} holds no folder of a class: sort the images into {folder.name}/<class>/*.JPEG (ImageNet's "
            "validation images come in one folder; its development kit says which class each is of)"
        )
    empty = [name for name, files in found.items() if not files]
    if empty:
        raise UsageError(
            f"{folder / empty[0]} holds no image ({len(empty)} such folders): put {', '.join(SUFFIXES)} files "
            "there, or remove the class from both parts"
        )
    return found


def _along(count: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give both neighbours of each of ``side`` places on ``count`` pixels, and the weight of the second."""
    place = np.clip((np.arange(side) + 0.5) * (count / side) - 0.5, 0, count - 1)
    first = place.astype(np.int64)
    return first, np.minimum(first + 1, count - 1), (place - first).astype(np.float32)


def resized(pixels: np.ndarray, side: int) -> np.ndarray:
    """Resize uint8 of shape (height, width, 3) to (side, side, 3), rounded to the nearest.

    Pixel i of the result is at (i + 1/2) n / side - 1/2 of the n pixels of the image, at its border at most. Caffe
    src/caffe/util/io.cpp, ReadImageToCVMat: ``cv::resize`` with its default INTER_LINEAR.
    """
    if pixels.shape[:2] == (side, side):
        return pixels
    top, bottom, down = _along(pixels.shape[0], side)
    left, right, across = _along(pixels.shape[1], side)
    down, across = down[:, None, None], across[:, None]
    rows = pixels[top] * (1 - down) + pixels[bottom] * down
    values = rows[:, left] * (1 - across) + rows[:, right] * across
    return (values + 0.5).astype(np.uint8)


def decoded(path: Path, side: int) -> np.ndarray:
    """Read a JPEG or PNG file of any kind of colours into uint8 of shape (3, side, side)."""
    try:
        content = read_bytes(path, LARGEST_FILE, links=True)
        # By its content another form would be taken too, as PostScript, for which Pillow starts an interpreter.
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.format == "JPEG":
                pixels = np.asarray(image.convert("RGB"))
            else:
                image.verify()  # its checksums, which decoding does not look at; it must be opened again then
                with Image.open(io.BytesIO(content), formats=FORMATS) as again:
                    pixels = np.asarray(again.convert("RGB"))
    except UsageError:
        raise
    except Exception as error:  # damaged files raise nearly everything
        reason = (str(error) or type(error).__name__).partition("\n")[0]
        raise UsageError(f"{path}: cannot be read as an image ({reason}); replace it, or remove it") from error
    return resized(pixels, side).transpose(2, 0, 1)


class Part:
    """The training or the validation images: where they are, their labels, and those that stay in memory."""

    def __init__(self, folder: Path, found: dict[str, list[str]], side: int) -> None:
        self.folder, self.side = folder, side
        self.files = [f"{name}/{file}" for name, files in found.items() for file in files]
        counts = torch.tensor([len(files) for files in found.values()])
        self.labels = torch.arange(len(found)).repeat_interleave(counts)
        self.kept: np.ndarray | None = None
        self.known = np.zeros(len(self.files), dtype=bool)

    def keep(self, room: int) -> int:
        """Keep decoded images from now on, if all of them fit into so many bytes; give the bytes that are left."""
        size = len(self.files) * 3 * self.side**2
        if size > room:
            return room
        # The system gives the memory when an image is written.
        self.kept = np.empty((len(self.files), 3, self.side, self.side), dtype=np.uint8)
        return room - size

    def image(self, number: int) -> np.ndarray:
        """Give one image, uint8, shape (3, side, side); may be called by several threads."""
        if self.kept is None:
            return decoded(self.folder / self.files[number], self.side)
        if not self.known[number]:
            self.kept[number] = decoded(self.folder / self.files[number], self.side)
            self.known[number] = True  # last, so that another thread never sees an image half written
        return self.kept[number]

    @cached_property
    def digest(self) -> str:
        """A checksum of what decides the mean image: names and sizes of the files, and the side."""
        digest = hashlib.sha256(f"mean image 1, side {self.side}\n".encode())
        self.add_to(digest)
        return digest.hexdigest()

    def add_to(self, digest: Any) -> None:
        """Add class, name and size of each file to a checksum."""
        for file in self.files:
            path = self.folder / file
            try:
                size = path.stat().st_size
            except OSError as error:
                raise UsageError(f"{path}: {error.strerror or error}; replace it, or open the folder again") from error
            digest.update(f"{file}\0{size}\n".encode("utf-8", "surrogateescape"))
