"""The processes that compute one run: this one alone, or several, each with its part of every batch.

The numbers are those of one process up to rounding: parts are equal, so the average of their gradients is the gradient
of the mean over the batch, and batch normalisation takes its statistics over all parts. Only dropout draws other masks.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map

from layerwise.lab.errors import UsageError

LONGEST_WAIT, FAILURE_WAIT = timedelta(days=2), timedelta(seconds=60)
"""How long processes wait for the first one, which may test a large network; and how long a process in which a run
failed waits for the others to fail too."""


class Processes:
    """One process that trains alone on a device, or those of a run that several share, as ``joined`` gives them."""

    def __init__(self, device: str = "cpu", *, shared: bool = False) -> None:
        self.device, self.rank, self.count = device, 0, 1
        self.in_step = True  # the processes are known to wait for the next run
        self._synchronised: list[Any] = []
        if shared:
            self.rank, self.count = dist.get_rank(), dist.get_world_size()
            # The gradients have a group of their own, which may be on cards.
            self._group: Any = dist.new_group(None, LONGEST_WAIT, "gloo")
            self._failures: Any = dist.new_group(None, FAILURE_WAIT, "gloo")
            self._alone, _ = dist.new_subgroups(1)
        self.first = self.rank == 0  # writes the run's files and tests the network

    def check(self, batch_size: int, *, normalised: bool = False) -> None:
        """Refuse a batch that cannot be divided, and on the CPU batch normalisation."""
        if batch_size % self.count:
            fitting = " or ".join(str(divisor) for divisor in range(1, self.count) if batch_size % divisor == 0)
            raise UsageError(
                f"batch_size={batch_size!r} cannot be divided among processes={self.count!r}: use a multiple of "
                f"{self.count}, or start {fitting} of them"
            )
        if normalised and self.count > 1 and self.device == "cpu":
            raise UsageError(
                f"processes={self.count!r} on the CPU cannot share a network with batch normalisation, as PyTorch's "
                "SyncBatchNorm needs GPUs: start one process, or use --device cuda"
            )

    def wrap(self, model: nn.Module) -> nn.Module:
        """Give the network that averages its gradients; the loss must depend on every parameter."""
        if self.count == 1:
            return model
        self.check(0, normalised=any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()))
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self._synchronised = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
        return DistributedDataParallel(model, None if self.device == "cpu" else [torch.device(self.device)])

    def share(self, batch: Any, *, begins: bool, whole: int | None = None) -> Any:
        """Give this process's part of a batch: of its tensors, and of lists of one entry an example.

        If the last batch of an epoch cannot be divided, every process computes all of it: the average of equal
        gradients is that gradient. The first one (``begins``) is refused. ``whole`` is the size of the whole batch,
        where this process has read only its part of it, or, of one that cannot be divided, all of it.
        """
        if self.count == 1:
            return batch
        shapes = [tuple(leaf.shape) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
        if len({shape[0] for shape in shapes}) != 1:
            raise UsageError(
                f"a batch of type {type(batch).__name__} with tensors of shapes {shapes} cannot be divided among "
                "processes: give tensors of one length, or tuples, lists or dicts of them, or start one process"
            )
        size = whole or shapes[0][0]
        if begins:
            self.check(size)
        undivided = size % self.count != 0
        for module in self._synchronised:
            module.process_group = self._alone if undivided else None
        if undivided or whole is not None:
            return batch

        def divided(entry: Any) -> bool:
            if isinstance(entry, Tensor):
                return entry.dim() > 0
            holds_tensors = any(isinstance(leaf, Tensor) for leaf in tree_leaves(entry))
            return isinstance(entry, (list, tuple)) and len(entry) == size and not holds_tensors

        own = slice(self.rank * size // self.count, (self.rank + 1) * size // self.count)
        return tree_map(lambda entry: entry[own] if divided(entry) else entry, batch, is_leaf=divided)

    def gather(self, value: Any) -> list[Any]:
        """Give the values of all processes, in the order of their ranks."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value, self._group)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Average values over the processes, on the CPU; all get the same bits."""
        return torch.stack(self.gather(values.detach().cpu())).mean(dim=0)

    def agree(self, *wishes: bool) -> tuple[bool, ...]:
        """Say of each wish whether any process has it."""
        votes = torch.tensor(wishes, dtype=torch.uint8)
        if self.count > 1:
            dist.all_reduce(votes, dist.ReduceOp.MAX, self._group)
        return tuple(map(bool, votes.tolist()))

    def from_first(self, act: Callable[[], Any]) -> Any:
        """Do something in the first process while the others wait; all get its result or its error."""
        if self.count == 1:
            return act()
        value, failure = None, None
        if self.first:
            try:
                value = act()
            except Exception as error:
                failure = error
        told = [value, _portable(failure)]
        dist.broadcast_object_list(told, 0, self._group)
        if told[1] is not None:
            raise failure or told[1]
        return told[0]

    @contextmanager
    def step(self) -> Iterator[None]:
        """Do here what all processes do; ``in_step`` tells whether an error in it was one that all of them had."""
        self.in_step = False
        try:
            yield
        except Exception:
            with suppress(RuntimeError):  # the others do not come: they wait for a part that this one will never give
                if self.count > 1:
                    dist.barrier(self._failures)
                self.in_step = True
            raise
        self.in_step = True


def joined(device: str = "cpu") -> Processes:
    """Join the processes that ``torchrun`` started; on ``"cuda"`` each process of a machine takes a card of its own."""
    if "RANK" not in os.environ:
        raise UsageError("RANK is not set: start with  torchrun --nproc-per-node 2 -m layerwise run NAME")
    if device not in ("cpu", "cuda"):
        raise UsageError(f"device={device!r}: processes share a run on 'cpu', or on 'cuda' with one card each")
    if device == "cuda":
        local, cards = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= cards:
            raise UsageError(f"nproc-per-node={local + 1!r} or more: this machine has {cards} cards; use at most these")
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    return Processes(device, shared=True)


def _portable(error: Exception | None) -> Exception | None:
    """Give an error as it can be sent: itself, or its words."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
