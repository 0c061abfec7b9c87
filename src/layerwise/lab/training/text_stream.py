"""Batches of windows of a text, each with the symbols that follow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.lab.data.text import windows
from layerwise.lab.errors import UsageError
from layerwise.lab.training.streams import Batch, epoch_generator


@dataclass(kw_only=True)
class TextStream:
    """Windows at random places of one text to train on, and ``test_count`` of another, evenly spread, to test.

    An epoch has as many symbols as the text; see ``MemoryStream`` for its order.
    """

    train: Tensor
    test: Tensor
    context: int  # symbols of a window
    batch_size: int
    test_batch_size: int
    test_count: int | None  # None for as many as there are without an overlap
    seed: int
    classes: int
    channels: int = 1

    def __post_init__(self) -> None:
        most = (len(self.test) - 1) // self.context
        self.test_count = most if self.test_count is None else self.test_count
        self.epoch_length = len(self.train) // (self.batch_size * self.context)
        if not 1 <= self.test_count <= most:
            raise UsageError(
                f"{self.test_count} windows of context={self.context!r} to test: the text has {most}; use fewer"
            )
        if not self.epoch_length:
            raise UsageError(
                f"batch_size={self.batch_size!r} windows of context={self.context!r} are longer than the text, "
                f"{len(self.train):,} symbols: use less of one"
            )
        self.test_length = -(-self.test_count // self.test_batch_size)

    def whole(self, number: int) -> None:
        """Give nothing: every process that shares the run has whole batches."""

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """Give the batches of an epoch, from 1, without the first ``skip``."""
        generator = epoch_generator(self.seed, epoch)
        for number in range(self.epoch_length):
            drawn = windows(self.train, self.batch_size, self.context + 1, generator)
            if number >= skip:
                yield _shifted(drawn)

    def tests(self) -> Iterator[Batch]:
        """Give the windows to test, in order."""
        assert self.test_count is not None
        starts = torch.arange(self.test_count) * (len(self.test) - 1) // self.test_count
        starts = starts.clamp(max=len(self.test) - self.context - 1)
        index = starts[:, None] + torch.arange(self.context + 1)
        yield from map(_shifted, self.test[index].split(self.test_batch_size))


def _shifted(drawn: Tensor) -> Batch:
    """Give the symbols of windows, and those that follow each."""
    drawn = drawn.long()
    return drawn[:, :-1], drawn[:, 1:]
