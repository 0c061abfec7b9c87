"""Image folders in ImageNet's layout, as Caffe feeds them to AlexNet.

Layout: ``<root>/train/<class>/*.JPEG`` and ``<root>/val/<class>/*.JPEG``; the classes, sorted by name, are numbered
from 0. ``photographs.py`` says how an image is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from platformdirs import user_cache_path

from layerwise.lab.data.mean_image import read_mean, write_mean
from layerwise.lab.data.photographs import Part, scan
from layerwise.lab.errors import UsageError

TRAIN, VALIDATION = "train", "val"
"""Names of ImageNet's folders."""

CHUNK = 256
"""Images that are decoded between two calls of a progress function."""


class Job(NamedTuple):
    """A batch that is to be decoded.

    Attributes:
        training: whether its images are training images.
        numbers: of the images.
        places: for each image, top and left of its crop, and whether it is mirrored.
    """

    training: bool
    numbers: list[int]
    places: list[tuple[int, int, bool]]


Progress = Callable[[int, int], object]
"""Called with the number of images that are done and of all."""


def find(data_dir: Path) -> Path | None:
    """Look for an image folder.

    Args:
        data_dir: where to look; its subfolder ``imagenet`` is looked at first.

    Returns:
        The folder that holds ``train`` and ``val``, or None.
    """
    for place in (data_dir / "imagenet", data_dir):
        if (place / TRAIN).is_dir() and (place / VALIDATION).is_dir():
            return place
    return None


def locate(data_dir: Path | None) -> Path:
    """Give the image folder that must be there.

    Args:
        data_dir: where to look; see ``find``.

    Returns:
        The folder that holds ``train`` and ``val``.

    Raises:
        UsageError: there is none.
    """
    found = find(data_dir) if data_dir is not None else None
    if found is None:
        where = None if data_dir is None else str(data_dir)
        raise UsageError(
            f"data-dir={where!r} holds no image folder: give one with {TRAIN}/<class>/*.JPEG and "
            f"{VALIDATION}/<class>/*.JPEG, or with these in imagenet/"
        )
    return found


class ImageFolder:
    """Photographs of many classes, cropped and mirrored at random for training.

    x = mirror(crop(image - mean)), pixels from 0 to 255 and not scaled. The mean image is cropped where the image is
    and mirrored with it. Caffe bvlc_alexnet/train_val.prototxt; src/caffe/data_transformer.cpp.

    Args:
        root: folder that holds the two parts.
        side: images are resized to ``side`` x ``side``.
        crop: side of the square that the network sees, 1 to ``side``.
        train: name of the folder of the training images.
        validation: name of the folder of the images that are tested on.
        workers: threads that decode.
        memory_bytes: decoded images stay in memory if all training images fit in so much; the test images too if they
            fit in what is left. 0 keeps none.
        cache: folder of the mean images; None for the user's folder of cached files.

    Attributes:
        name: of the folder.
        title: what it is, in words.
        classes: number of classes.
        class_names: of the labels, in order.
        train_count: number of training images.
        test_count: number of test images.
        train_labels: int64, shape (train_count,), sorted.
        test_labels: int64, shape (test_count,), sorted.

    Raises:
        UsageError: a value out of range; a folder is missing or empty; or the parts do not have the same classes.
    """

    def __init__(
        self,
        root: Path,
        *,
        side: int = 256,
        crop: int = 227,
        train: str = TRAIN,
        validation: str = VALIDATION,
        workers: int = 4,
        memory_bytes: int = 2 << 30,
        cache: Path | None = None,
    ) -> None:
        for name, value, least in (("crop", crop, 1), ("workers", workers, 1), ("memory_bytes", memory_bytes, 0)):
            if value < least:
                raise UsageError(f"{name}={value!r}: use a whole number from {least}")
        if side < crop:
            raise UsageError(f"side={side!r}, crop={crop!r}: the crop is cut from the image; use a side from {crop}")
        found, tested = scan(root / train), scan(root / validation)
        single = sorted(found.keys() ^ tested.keys())
        if single:
            where, other = (train, validation) if single[0] in found else (validation, train)
            raise UsageError(
                f"{root}: the class {single[0]!r} is in {where}/ and not in {other}/ ({len(single)} such classes): "
                "both need folders of the same names, or the labels would not agree"
            )
        self.side, self.crop, self.workers = side, crop, workers
        self.shared = False
        """Whether batches are made in memory that processes share, as a loader's workers need it."""
        self._cache = user_cache_path("layerwise") if cache is None else cache
        self._train = Part(root / train, found, side)
        self._test = Part(root / validation, tested, side)
        room = self._train.keep(memory_bytes)
        if self._train.kept is not None:
            self._test.keep(room)
        self._mean: np.ndarray | None = None
        self.class_names = tuple(found)
        self.classes = len(found)
        self.train_labels, self.test_labels = self._train.labels, self._test.labels
        self.train_count, self.test_count = len(self.train_labels), len(self.test_labels)
        self.name = root.resolve().name
        self.title = (
            f"an image folder: {self.classes:,} classes, {self.train_count:,} photographs to train, "
            f"{self.test_count:,} to test"
        )

    @cached_property
    def digest(self) -> str:
        """What tells the folder from others: a checksum of the names, classes and sizes of all images of both parts.

        Their content is not read, which would take as long as some epochs.
        """
        digest = hashlib.sha256(b"image folder 1\n")
        for name, part in ((b"to train\n", self._train), (b"to test\n", self._test)):
            digest.update(name)
            for line in part.listing():
                digest.update(line)
        return digest.hexdigest()

    def _draw(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw where each image is cropped, shape (2, count), and which ones are mirrored."""
        drawn = {"generator": generator, "device": generator.device}
        corner = torch.randint(0, self.side - self.crop + 1, (2, count), **drawn)
        return corner.cpu(), torch.randint(0, 2, (count,), **drawn).cpu().bool()

    def skip_batch(self, count: int, generator: torch.Generator) -> None:
        """Draw the random numbers of a training batch without reading an image.

        A run that goes on after a batch makes the same batches after it as one that was not interrupted.

        Args:
            count: images of the batch.
            generator: source of the random numbers.
        """
        self._draw(count, generator)

    def train_batch(self, index: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Make a training batch: a random crop of each image, mirrored with probability 1/2.

        x = mirror(crop(image - mean)). The first batch needs the mean image; see ``mean_image``.

        Args:
            index: numbers of the images, int64, shape (n,), each from 0 to train_count - 1.
            generator: source of the random numbers.

        Returns:
            float32, shape (n, 3, crop, crop), and labels, int64, shape (n,).

        Raises:
            UsageError: not such numbers; or an image is damaged.
        """
        return self.decoded(self.drawn(index, generator))

    def drawn(self, index: torch.Tensor, generator: torch.Generator) -> Job:
        """Draw the random numbers of a training batch, before an image is read: they depend on the number alone.

        Arguments and errors are those of ``train_batch``.
        """
        if index.dtype != torch.int64 or index.ndim != 1:
            raise UsageError(f"index of {index.dtype} and shape {tuple(index.shape)}: give torch.int64 of shape (n,)")
        wrong = index[(index < 0) | (index >= self.train_count)]
        if len(wrong):
            raise UsageError(f"index={int(wrong[0])!r}: use numbers of images from 0 to {self.train_count - 1}")
        (left, top), mirrored = self._draw(len(index), generator)
        return Job(True, index.tolist(), list(zip(top.tolist(), left.tolist(), mirrored.tolist(), strict=True)))

    def decoded(self, job: Job) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode a batch, in any process: inputs, float32, shape (n, 3, crop, crop), and labels, int64, shape (n,)."""
        part = self._train if job.training else self._test
        return self._batch(part, job.numbers, job.places, self._mean_values(None)), part.labels[job.numbers]

    def test_batches(self, size: int = 50) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Give all test images in order: the crop in the middle of each, not mirrored.

        Args:
            size: images of a batch; the last one may be smaller. 50 in Caffe bvlc_alexnet/train_val.prototxt.

        Returns:
            An iterator of float32, shape (n, 3, crop, crop), and labels, int64, shape (n,). An image that is damaged
            raises a UsageError when its batch is made.

        Raises:
            UsageError: size below 1.
        """
        return map(self.decoded, self.test_jobs(size))

    def test_jobs(self, size: int) -> list[Job]:
        """Give what ``test_batches`` decodes."""
        if size < 1:
            raise UsageError(f"size={size!r}: use a whole number from 1")
        middle = (self.side - self.crop) // 2
        numbers = torch.arange(self.test_count).split(size)
        return [Job(False, each.tolist(), [(middle, middle, False)] * len(each)) for each in numbers]

    @property
    def kept(self) -> bool:
        """Whether decoded images stay in memory, so that each is decoded once."""
        return self._train.kept is not None

    def _batch(
        self, part: Part, numbers: list[int], places: list[tuple[int, int, bool]], mean: np.ndarray
    ) -> torch.Tensor:
        """Decode images, subtract the mean image, crop and mirror, several at a time."""
        # NumPy and not torch: it uses one thread a call, and these calls are in threads already.
        shape = (len(numbers), 3, self.crop, self.crop)
        made = torch.empty(shape)
        if self.shared:  # by PyTorch's queues it would be copied into such memory
            made.share_memory_()
        batch = made.numpy()

        def make(position: int) -> None:
            top, left, mirror = places[position]
            window = (slice(None), slice(top, top + self.crop), slice(left, left + self.crop))
            room = batch[position, :, :, ::-1] if mirror else batch[position]
            np.subtract(part.image(numbers[position])[window], mean[window], out=room)

        with ThreadPoolExecutor(self.workers) as pool:
            for _ in pool.map(make, range(len(numbers))):
                pass
        return made

    def mean_image(self, progress: Progress | None = None) -> torch.Tensor:
        """Give the mean of all training images, pixel by pixel; computed once and kept in the folder of the cache.

        mean = sum of images / number of images. Caffe tools/compute_image_mean.cpp. All training images are decoded
        for it, some hundred a second; a set whose files have the same names and sizes finds it done.

        Args:
            progress: called as images are decoded; not at all where the mean is known.

        Returns:
            float32, shape (3, side, side), red, green and blue from 0 to 255.

        Raises:
            UsageError: an image is damaged.
        """
        return torch.from_numpy(self._mean_values(progress).copy())

    def _mean_values(self, progress: Progress | None) -> np.ndarray:
        """Give the mean image from memory, from the cache, or computed."""
        if self._mean is None:
            path = self._cache / f"mean-{self._train.digest[:32]}.npy"
            self._mean = read_mean(path, self.side)
            if self._mean is None:
                self._mean = self._compute_mean(progress)
                write_mean(path, self._mean)
        return self._mean

    def _compute_mean(self, progress: Progress | None) -> np.ndarray:
        """Decode all training images and take their mean."""
        # Sums of bytes in int64 are exact, and so do not depend on the order.
        total = np.zeros((3, self.side, self.side), dtype=np.int64)
        with ThreadPoolExecutor(self.workers) as pool:
            for start in range(0, self.train_count, CHUNK):
                stop = min(start + CHUNK, self.train_count)
                for image in pool.map(self._train.image, range(start, stop)):
                    total += image
                if progress is not None:
                    progress(stop, self.train_count)
        return (total / self.train_count).astype(np.float32)
