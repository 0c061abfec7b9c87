"""Image folders in ImageNet's layout, as Caffe feeds them to AlexNet.

Layout: ``<root>/train/<class>/*.JPEG`` and ``<root>/val/<class>/*.JPEG``; the classes, sorted by name, are numbered
from 0. ``photographs.py`` says how an image is read.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from platformdirs import user_cache_path

from layerwise.lab.data.photographs import Part, scan
from layerwise.lab.errors import UsageError
from layerwise.lab.runs.store import read_bytes, write_whole

TRAIN, VALIDATION = "train", "val"  # names of ImageNet's folders
CHUNK = 256  # images of the mean that are handed to threads at a time
DIGEST_LENGTH = 32  # bytes of the checksum at the end of a mean image's file
LARGEST_HEADER = 1000  # bytes of such a file beside the image


class Job(NamedTuple):
    """A batch that is to be decoded: for each image its number, top and left of its crop, and if it is mirrored."""

    training: bool
    numbers: list[int]
    places: list[tuple[int, int, bool]]


def find(data_dir: Path) -> Path | None:
    """Give the folder that holds ``train`` and ``val``: the subfolder ``imagenet``, the folder itself, or None."""
    for place in (data_dir / "imagenet", data_dir):
        if (place / TRAIN).is_dir() and (place / VALIDATION).is_dir():
            return place
    return None


class ImageFolder:
    """Photographs of many classes, cropped and mirrored at random for training.

    x = mirror(crop(image - mean)), pixels from 0 to 255 and not scaled. The mean image is cropped where the image is
    and mirrored with it. Caffe bvlc_alexnet/train_val.prototxt; src/caffe/data_transformer.cpp. Images are resized to
    ``side`` before they are cropped; ``workers`` threads decode them. Decoded training images stay in memory if all
    fit into ``memory_bytes``, the test images if they fit into what is left.
    """

    def __init__(
        self,
        root: Path,
        *,
        side: int = 256,
        crop: int = 227,
        workers: int = 4,
        memory_bytes: int = 2 << 30,
        cache: Path | None = None,
    ) -> None:
        found, tested = scan(root / TRAIN), scan(root / VALIDATION)
        single = sorted(found.keys() ^ tested.keys())
        if single:
            where, other = (TRAIN, VALIDATION) if single[0] in found else (VALIDATION, TRAIN)
            raise UsageError(
                f"{root}: the class {single[0]!r} is in {where}/ and not in {other}/ ({len(single)} such classes): "
                "both need folders of the same names, or the labels would not agree"
            )
        self.side, self.crop, self.workers = side, crop, workers
        self.shared = False
        """Whether batches are made in memory that processes share, as a loader's workers need it."""
        self._cache = user_cache_path("layerwise") if cache is None else cache
        self._train = Part(root / TRAIN, found, side)
        self._test = Part(root / VALIDATION, tested, side)
        room = self._train.keep(memory_bytes)
        if self.kept:
            self._test.keep(room)
        self.class_names = tuple(found)
        self.classes = len(found)
        self.train_labels, self.test_labels = self._train.labels, self._test.labels
        self.train_count, self.test_count = len(self.train_labels), len(self.test_labels)
        self.name = root.resolve().name
        self.title = (
            f"an image folder: {self.classes:,} classes, {self.train_count:,} photographs to train, "
            f"{self.test_count:,} to test"
        )

    @property
    def kept(self) -> bool:
        """Whether decoded training images stay in memory, so that each is decoded once."""
        return self._train.kept is not None

    @cached_property
    def digest(self) -> str:
        """A checksum of names, classes and sizes of all images; reading them would take as long as some epochs."""
        digest = hashlib.sha256(b"image folder 1\n")
        for name, part in ((b"to train\n", self._train), (b"to test\n", self._test)):
            digest.update(name)
            part.add_to(digest)
        return digest.hexdigest()

    def drawn(self, index: torch.Tensor, generator: torch.Generator) -> Job:
        """Draw the random numbers of a training batch, before an image is read: each crop as likely as any other."""
        options = {"generator": generator, "device": generator.device}
        left, top = torch.randint(0, self.side - self.crop + 1, (2, len(index)), **options).tolist()
        mirrored = torch.randint(0, 2, (len(index),), **options).bool().tolist()
        return Job(True, index.tolist(), list(zip(top, left, mirrored, strict=True)))

    def test_jobs(self, size: int) -> list[Job]:
        """Give all test images in order: the crop in the middle of each, not mirrored."""
        middle = (self.side - self.crop) // 2
        numbers = torch.arange(self.test_count).split(size)
        return [Job(False, each.tolist(), [(middle, middle, False)] * len(each)) for each in numbers]

    def decoded(self, job: Job) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode a batch, in any process: inputs, float32, shape (n, 3, crop, crop), and labels, int64, shape (n,)."""
        part, mean = self._train if job.training else self._test, self.mean
        made = torch.empty(len(job.numbers), 3, self.crop, self.crop)
        if self.shared:  # by PyTorch's queues it would be copied into such memory
            made.share_memory_()
        # NumPy and not torch: it uses one thread a call, and these calls are in threads already.
        batch = made.numpy()

        def make(position: int) -> None:
            top, left, mirror = job.places[position]
            window = (slice(None), slice(top, top + self.crop), slice(left, left + self.crop))
            room = batch[position, :, :, ::-1] if mirror else batch[position]
            np.subtract(part.image(job.numbers[position])[window], mean[window], out=room)

        with ThreadPoolExecutor(self.workers) as pool:
            for _ in pool.map(make, range(len(job.numbers))):
                pass
        return made, part.labels[job.numbers]

    @cached_property
    def mean(self) -> np.ndarray:
        """Mean of all training images, float32, shape (3, side, side), kept in a file of the cache folder.

        Caffe tools/compute_image_mean.cpp. All training images are decoded for it, some hundred a second.
        """
        path = self._cache / f"mean-{self._train.digest[:32]}.npy"
        kept = _read_mean(path, self.side)
        if kept is not None:
            return kept
        # Sums of bytes in int64 are exact, and so do not depend on the order.
        total = np.zeros((3, self.side, self.side), dtype=np.int64)
        with ThreadPoolExecutor(self.workers) as pool:
            for start in range(0, self.train_count, CHUNK):
                for image in pool.map(self._train.image, range(start, min(start + CHUNK, self.train_count))):
                    total += image
        mean = (total / self.train_count).astype(np.float32)
        _write_mean(path, mean)
        return mean


def _read_mean(path: Path, side: int) -> np.ndarray | None:
    """Read a mean image; None if there is no file or it is not one of such an image."""
    try:
        content = read_bytes(path, 4 * 3 * side**2 + LARGEST_HEADER)
        if hashlib.sha256(content[:-DIGEST_LENGTH]).digest() != content[-DIGEST_LENGTH:]:
            return None
        mean = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return mean if mean.shape == (3, side, side) and mean.dtype == np.float32 and 0 <= mean.min() <= 255 else None


def _write_mean(path: Path, mean: np.ndarray) -> None:
    """Keep a mean image, its checksum behind it."""
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
