"""Processes that compute one run together, each with its part of every batch.

The numbers are those of one process up to rounding. Each process takes an equal part of a batch, so the average of the
gradients is the gradient of the mean over the batch; batch normalisation takes its statistics over all parts; and every
process makes the same update of the same weights. Only dropout draws other masks, as it does with another seed.

``torch.nn.parallel.DistributedDataParallel`` is used as it is, without Lightning Fabric: what is needed is one wrapper
and five collectives, and a layer between would hide the order in which they are called, which is what has to be right.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from layerwise.lab.errors import UsageError
from layerwise.lab.runs.locks import BusyError
from layerwise.lab.training.processes import Processes
from layerwise.lab.training.sharing import BATCH_NORM, batch_norm, batch_size, cut
from layerwise.lab.training.trial import StoppedError

T = TypeVar("T")

LONGEST_WAIT = timedelta(days=2)
"""How long processes wait for the first one, which may be testing a large network or reading a large file."""

FAILURE_WAIT = timedelta(seconds=60)
"""How long a process in which a run failed waits for the others to fail too."""


class DistributedProcesses(Processes):
    """Processes that torch.distributed has joined.

    Besides the group of the gradients there is one for everything else, over gloo and with a long timeout, and one to
    meet in after an error.

    Args:
        device: where this process trains.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.rank, self.count, self.device = dist.get_rank(), dist.get_world_size(), device
        self.undivided = False
        """Whether the current batch is computed whole by every process."""
        self.in_step = True
        """Whether the processes are known to wait for the next order."""
        self._control: Any = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
        self._failures: Any = dist.new_group(backend="gloo", timeout=FAILURE_WAIT)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Give the network that averages its gradients; every parameter must have a part in the loss."""
        for module in model.modules():
            if isinstance(module, BATCH_NORM):
                # On the instance: the names of the modules, and so the layers, stay.
                module.forward = partial(batch_norm, module, self)  # type: ignore[assignment]
        index = torch.device(self.device).index
        return DistributedDataParallel(model, device_ids=None if index is None else [index])

    def share(self, batch: Any, *, begins: bool, whole: int | None = None) -> Any:
        """Give this process's part of a batch.

        The last batch of an epoch may be smaller. If it cannot be divided, every process computes all of it: the
        average of equal gradients is that gradient, and the time of one batch in an epoch matters little.

        Args:
            batch: tensors of one first dimension, or tuples, lists or mappings of them.
            begins: the batch is the first of its epoch.
            whole: examples of the whole batch, where ``batch`` is already the part of this process, or, of one that
                cannot be divided, all of it.

        Returns:
            A part of the same form.

        Raises:
            UsageError: the first batch of an epoch cannot be divided, or it is of another form.
        """
        size = whole or batch_size(batch)
        self.undivided = size % self.count != 0
        if not self.undivided and whole is not None:
            return batch
        if not self.undivided:
            part = size // self.count
            return cut(batch, slice(self.rank * part, (self.rank + 1) * part), size)
        if begins:
            raise indivisible(size, self.count)
        return batch

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Average values over the processes, on the CPU; all get the same bits."""
        own = values.detach().cpu()
        parts = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(parts, own, group=self._control)
        return torch.stack(parts).mean(dim=0)

    def gather(self, value: Any) -> list[Any]:
        """Give the values of all processes, in the order of their ranks."""
        values = [None] * self.count
        dist.all_gather_object(values, value, group=self._control)
        return values

    def agree(self, *wishes: bool) -> tuple[bool, ...]:
        """Say of each wish whether any process has it."""
        votes = torch.tensor(wishes, dtype=torch.uint8)
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._control)
        return tuple(map(bool, votes.tolist()))

    def from_first(self, act: Callable[[], T]) -> T:
        """Do something in the first process while the others wait, and give all what came of it, an error too."""
        value: Any = None
        failure: Exception | None = None
        if self.first:
            try:
                value = act()
            except Exception as error:
                failure = error
        told = [(value, _portable(failure))]
        dist.broadcast_object_list(told, src=0, group=self._control)
        if self.first:
            told = [(value, failure)]
        value, failure = told[0]
        if failure is not None:
            raise failure
        return value

    def together(self, act: Callable[[], T]) -> T:
        """Do something in every process; what fails in one fails in all."""
        value: Any = None
        failure: Exception | None = None
        try:
            value = act()
        except Exception as error:
            failure = error
        failures = [failure, *self.gather(_portable(failure))]
        for error in failures:
            if error is not None:
                raise error
        return value

    @contextmanager
    def step(self) -> Iterator[None]:
        """Do here what all processes do; ``in_step`` tells whether an error in it was one that all of them had."""
        self.in_step = False
        try:
            yield
        except (BusyError, StoppedError):  # decided together
            self.in_step = True
            raise
        except Exception:
            with suppress(RuntimeError):  # the others do not come: they wait for a part that this one will never give
                dist.barrier(group=self._failures)
                self.in_step = True
            raise
        self.in_step = True

    def leave(self) -> None:
        """End the work together."""
        dist.destroy_process_group()


def joined(device: str = "cpu") -> DistributedProcesses | None:
    """Join the processes that ``torchrun`` started.

    Args:
        device: where networks are trained; with ``"cuda"`` each process of a machine takes a card of its own.

    Returns:
        The processes, to be left with ``leave()``; None if this process was started alone.

    Raises:
        UsageError: a device that several processes cannot share, or more processes than cards.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    kind, _, index = device.partition(":")
    if index:
        raise UsageError(f"device={device!r}: processes that share a run take one card each; use {kind!r}")
    if kind == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        cards = torch.cuda.device_count()
        if local >= cards:
            raise UsageError(f"nproc-per-node={local + 1!r} or more: this machine has {cards} cards; use at most these")
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    elif kind != "cpu":
        raise UsageError(f"device={device!r}: processes share a run on 'cpu' or 'cuda'; start one process for others")
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return DistributedProcesses(device)


def indivisible(size: int, count: int) -> UsageError:
    """Say that a batch cannot be divided, and among how many processes it can."""
    fitting = " or ".join(str(divisor) for divisor in range(1, count) if size % divisor == 0)
    return UsageError(
        f"batch_size={size!r} cannot be divided among processes={count!r}: use a multiple of {count}, or start "
        f"{fitting} of them"
    )


def _portable(error: Exception | None) -> Exception | None:
    """Give an error as it can be sent: itself, or its words."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
