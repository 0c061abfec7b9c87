"""Batches in the order that a run's configuration decides, from any batch on."""

from __future__ import annotations

import hashlib
import math
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, cast

import torch
from torch.utils.data import DataLoader, get_worker_info

from layerwise.lab.data import Dataset, training_batch
from layerwise.lab.data.augmentation import shuffled_batches
from layerwise.lab.data.folder import ImageFolder, Job
from layerwise.lab.errors import UsageError
from layerwise.lab.training import inputs as lab_inputs

Batch = tuple[torch.Tensor, torch.Tensor]
"""Inputs, float32, and labels, int64."""


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Make the source of an epoch's random numbers: another one for each seed and epoch, on any machine."""
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@dataclass(kw_only=True)
class MemoryStream:
    """Batches of a data set in memory; ``classes`` are those of the whole data set, which a slice may not hold.

    Every epoch draws from a generator of its own, so that a run goes on in the middle of an epoch by drawing once
    more, without making them, for the batches that it has done.
    """

    dataset: Dataset
    form: str  # a key of ``inputs.INPUTS``
    order: str  # "sequential" or "shuffled"
    classes: int
    batch_size: int
    test_batch_size: int
    seed: int

    def __post_init__(self) -> None:
        self.inputs = lab_inputs.make(self.form, self.dataset)
        self.channels = self.inputs.channels
        length = math.ceil(len(self.dataset.train_labels) / self.batch_size)
        self.epoch_length = None if self.order == "sequential" else length  # in batches
        self.test_length = math.ceil(len(self.dataset.test_labels) / self.test_batch_size)

    def whole(self, number: int) -> None:
        """Give nothing: every process that shares the run has whole batches."""

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """Give the batches of an epoch, from 1, without the first ``skip``; a sequential one has no end."""
        dataset, inputs, generator = self.dataset, self.inputs, epoch_generator(self.seed, epoch)
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


AHEAD = 4
"""Batches that are decoded ahead, at least."""


@dataclass
class _Decoder:
    """What a worker process of a loader has: it decodes batches, each by one thread."""

    folder: ImageFolder

    def __getitem__(self, job: Job) -> Any:
        try:
            return self.folder.decoded(job)
        except UsageError as error:  # raised in the worker it would arrive as a traceback
            return error


def _begin_worker(number: int) -> None:
    """Let the process that trains decide what an interrupt means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    folder = cast(Any, get_worker_info()).dataset.folder
    folder.workers, folder.shared = 1, True


class Loader:
    """Worker processes that decode batches of an image folder ahead, in order.

    They are spawned: PyTorch, a GPU and the threads of the process that trains do not survive a fork. With ``pin``
    batches are put into memory from which a GPU copies while it computes; with ``stay`` the processes stay from one
    series of batches to the next.
    """

    def __init__(self, folder: ImageFolder, count: int, *, pin: bool, stay: bool) -> None:
        _ = folder.mean  # computed once, and not in every worker
        self._jobs: Iterable[Job] = ()
        self._loader = DataLoader(
            cast(Any, _Decoder(folder)),
            batch_size=None,
            sampler=self,
            num_workers=count,
            prefetch_factor=max(2, math.ceil(AHEAD / count)),
            pin_memory=pin,
            persistent_workers=stay,
            multiprocessing_context="spawn",
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # else it draws from the generator that dropout draws from
        )

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs)

    def batches(self, jobs: Iterable[Job]) -> Iterator[Batch]:
        """Decode batches; what was asked for before and not taken is dropped."""
        self._jobs = jobs
        try:
            for batch in self._loader:
                if isinstance(batch, UsageError):
                    raise batch
                yield batch
        except RuntimeError:  # a worker has died, and would be missing in the next run too
            _staying.cache_clear()
            raise


@lru_cache(maxsize=1)
def _staying(folder: ImageFolder, count: int, pin: bool) -> Loader:
    """Give the loader of training batches, which all runs of this process share."""
    return Loader(folder, count, pin=pin, stay=True)


@dataclass(kw_only=True)
class FolderStream:
    """Batches of an image folder, decoded ahead by ``loaders`` processes, or with 0 by this one as they are needed.

    ``share`` is the rank and number of the processes that share the run. Each decodes its part of a training batch,
    or all of one that cannot be divided.
    """

    folder: ImageFolder
    batch_size: int
    test_batch_size: int
    seed: int
    loaders: int = 0
    pin: bool = False
    share: tuple[int, int] = (0, 1)
    channels: ClassVar[int] = 3

    def __post_init__(self) -> None:
        self.classes = self.folder.classes
        if self.folder.kept:
            self.loaders = 0
        self.epoch_length = math.ceil(self.folder.train_count / self.batch_size)  # in batches
        self.test_length = math.ceil(self.folder.test_count / self.test_batch_size)

    def whole(self, number: int) -> int:
        """Give the images of a training batch of an epoch, from 0, in all processes together."""
        return min(self.batch_size, self.folder.train_count - number * self.batch_size)

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """Give the batches of an epoch, shuffled; see ``MemoryStream.batches``."""
        if not self.loaders:
            return map(self.folder.decoded, self._jobs(epoch, skip))
        return _staying(self.folder, self.loaders, self.pin).batches(self._jobs(epoch, skip))

    def _jobs(self, epoch: int, skip: int) -> Iterator[Job]:
        generator, (rank, count) = epoch_generator(self.seed, epoch), self.share
        for number, index in enumerate(shuffled_batches(self.folder.train_count, self.batch_size, generator)):
            job, size = self.folder.drawn(index, generator), len(index)
            if number < skip:
                continue
            if size % count == 0:
                own = slice(rank * size // count, (rank + 1) * size // count)
                job = job._replace(numbers=job.numbers[own], places=job.places[own])
            yield job

    def tests(self) -> Iterator[Batch]:
        """Give all test images, in order."""
        jobs = self.folder.test_jobs(self.test_batch_size)
        if not self.loaders:
            return map(self.folder.decoded, jobs)
        return Loader(self.folder, min(self.loaders, len(jobs)), pin=self.pin, stay=False).batches(jobs)


def with_validation(dataset: Dataset, count: int | None, train_count: int | None, *, measure: bool) -> Dataset:
    """Take the last ``count`` training images out; to ``measure`` on them, put them in the place of the test images.

    The test images are then not even looked at. Training images before them are kept, ``train_count`` at most.
    """
    if count is None:
        return dataset
    left = len(dataset.train_labels) - count
    if left < max(1, train_count or 1):
        raise UsageError(
            f"validation_count={count!r} of {len(dataset.train_labels):,} training images leaves {max(0, left):,}, and "
            f"train_count={train_count!r} takes more: give fewer images of validation or of training"
        )
    images, labels = dataset.train_images, dataset.train_labels
    kept = replace(dataset, train_images=images[:left], train_labels=labels[:left])
    return replace(kept, test_images=images[left:], test_labels=labels[left:]) if measure else kept


def without_first(dataset: Dataset, count: int, wanted: int) -> Dataset:
    """Leave the first ``count`` training images out, which weights were trained on; ``wanted`` must be left."""
    left = len(dataset.train_labels) - count
    if left < max(1, wanted):
        raise UsageError(
            f"train_count={count!r} of pretrained leaves {max(0, left):,} images that are neither for validation nor "
            f"trained on before, and {wanted:,} are wanted: give fewer"
        )
    return replace(dataset, train_images=dataset.train_images[count:], train_labels=dataset.train_labels[count:])


def drawn(dataset: Dataset, count: int | None, seed: int) -> Dataset:
    """Keep so many training images, which a seed draws; None keeps all."""
    if count is None:
        return dataset
    if count > len(dataset.train_labels):
        raise UsageError(f"drawn_count={count!r} of {len(dataset.train_labels):,} training images: draw fewer")
    # Epochs count from 1, so that the generator of epoch 0 is used for nothing else.
    index = torch.randperm(len(dataset.train_labels), generator=epoch_generator(seed, 0))[:count]
    return replace(dataset, train_images=dataset.train_images[index], train_labels=dataset.train_labels[index])


def shortened(dataset: Dataset, train_count: int | None, test_count: int | None) -> Dataset:
    """Keep the first images of a data set only; None keeps all."""
    return replace(
        dataset,
        train_images=dataset.train_images[:train_count],
        train_labels=dataset.train_labels[:train_count],
        test_images=dataset.test_images[:test_count],
        test_labels=dataset.test_labels[:test_count],
    )
