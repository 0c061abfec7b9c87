"""Batches in the order that a run's configuration decides, from any batch on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from layerwise.lab.data import Dataset, training_batch
from layerwise.lab.data.augmentation import shuffled_batches
from layerwise.lab.training import inputs as lab_inputs

Batch = tuple[torch.Tensor, torch.Tensor]
"""Inputs, float32, and labels, int64."""


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Make the source of an epoch's random numbers: another one for each seed and epoch, on any machine.

    Args:
        seed: of the run.
        epoch: from 1.

    Returns:
        A generator on the CPU.
    """
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class MemoryStream:
    """Batches of a data set in memory.

    Every epoch draws from a generator of its own, so that a run goes on in the middle of an epoch by drawing once
    more, without making them, for the batches that it has done.

    Args:
        dataset: the data.
        inputs: a key of ``inputs.INPUTS``.
        order: ``"sequential"`` or ``"shuffled"``.
        classes: of the whole data set, which a slice may not hold.
        batch_size: images of a training batch.
        test_batch_size: images of a test batch.
        seed: of the shuffling and of the augmentation.
    """

    def __init__(
        self,
        dataset: Dataset,
        inputs: str,
        order: str,
        *,
        classes: int,
        batch_size: int,
        test_batch_size: int,
        seed: int,
    ) -> None:
        self.dataset, self.order, self.seed = dataset, order, seed
        self.batch_size, self.test_batch_size = batch_size, test_batch_size
        self.inputs = lab_inputs.make(inputs, dataset)
        self.channels = self.inputs.channels
        self.classes = classes

    @property
    def epoch_length(self) -> int | None:
        """Batches of an epoch; None where the order has no epochs."""
        return None if self.order == "sequential" else -(-len(self.dataset.train_labels) // self.batch_size)

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """Give the batches of an epoch.

        Args:
            epoch: from 1; a sequential stream has one, without end.
            skip: batches at the beginning that are left out.

        Yields:
            Inputs and labels.
        """
        dataset, inputs = self.dataset, self.inputs
        generator = epoch_generator(self.seed, epoch)
        if self.order == "sequential":
            for _ in range(skip):
                inputs.skip(self.batch_size, generator)
            while True:
                images, labels = training_batch(dataset, skip, self.batch_size)
                yield inputs.train(images, generator), labels
                skip += 1
        for number, index in enumerate(shuffled_batches(len(dataset.train_labels), self.batch_size, generator)):
            if number < skip:
                inputs.skip(len(index), generator)
            else:
                yield inputs.train(dataset.train_images[index], generator), dataset.train_labels[index]

    def tests(self) -> Iterator[Batch]:
        """Give all test images, in order."""
        images = self.dataset.test_images.split(self.test_batch_size)
        for part, labels in zip(images, self.dataset.test_labels.split(self.test_batch_size), strict=True):
            yield self.inputs.test(part), labels


class FolderStream:
    """Batches of an image folder, read as they are needed.

    Args:
        folder: an ``ImageFolder``.
        batch_size: images of a training batch.
        test_batch_size: images of a test batch.
        seed: of the shuffling and of the crops.
    """

    channels = 3

    def __init__(self, folder: Any, *, batch_size: int, test_batch_size: int, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.batch_size, self.test_batch_size = batch_size, test_batch_size
        self.classes = folder.classes

    @property
    def epoch_length(self) -> int:
        """Batches of an epoch."""
        return -(-self.folder.train_count // self.batch_size)

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """Give the batches of an epoch, shuffled; see ``MemoryStream.batches``."""
        generator = epoch_generator(self.seed, epoch)
        for number, index in enumerate(shuffled_batches(self.folder.train_count, self.batch_size, generator)):
            if number < skip:
                self.folder.skip_batch(len(index), generator)
            else:
                yield self.folder.train_batch(index, generator)

    def tests(self) -> Iterator[Batch]:
        """Give all test images, in order."""
        yield from self.folder.test_batches(self.test_batch_size)


def shortened(dataset: Dataset, train_count: int | None, test_count: int | None) -> Dataset:
    """Keep the first images of a data set only; None keeps all."""
    return replace(
        dataset,
        train_images=dataset.train_images[:train_count],
        train_labels=dataset.train_labels[:train_count],
        test_images=dataset.test_images[:test_count],
        test_labels=dataset.test_labels[:test_count],
    )
