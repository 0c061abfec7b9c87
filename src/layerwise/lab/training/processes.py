"""The processes that share one run: one by default, several under ``torchrun``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")


class Processes:
    """One process that trains alone; ``distributed.DistributedProcesses`` is the kind of several."""

    rank = 0
    count = 1

    @property
    def first(self) -> bool:
        """This process writes the run's files and tests the network."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """Give what the loss is computed with."""
        return model

    def share(self, batch: Any, *, begins: bool, whole: int | None = None) -> Any:
        """Give this process's part of a batch; see ``distributed.DistributedProcesses``."""
        return batch

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Average values over the processes."""
        return values

    def gather(self, value: Any) -> list[Any]:
        """Give the values of all processes, in the order of their ranks."""
        return [value]

    def agree(self, *wishes: bool) -> tuple[bool, ...]:
        """Say of each wish whether any process has it."""
        return wishes

    def from_first(self, act: Callable[[], T]) -> T:
        """Do something in the first process while the others wait, and give all what came of it, an error too."""
        return act()

    def together(self, act: Callable[[], T]) -> T:
        """Do something in every process; what fails in one fails in all."""
        return act()
