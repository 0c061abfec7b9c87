"""What processes that share a run do with a batch: they divide it, and normalise with the statistics of all of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from layerwise.lab.errors import UsageError

BATCH_NORM = _BatchNorm
"""The class that all layers of batch normalisation are of."""


def batch_size(batch: Any) -> int:
    """Give the number of examples of a batch: the first dimension of its first tensor.

    Raises:
        UsageError: it holds no tensor.
    """
    for tensor in _tensors(batch):
        if tensor.dim():
            return len(tensor)
    raise UsageError(
        f"a batch of type {type(batch).__name__} cannot be divided among processes: give tensors, or tuples, lists or "
        "dicts of tensors, or start one process"
    )


def _tensors(batch: Any) -> Iterator[torch.Tensor]:
    """Give the tensors of a batch, in order."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, (tuple, list, Mapping)):
        for entry in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(entry)


def cut(entry: Any, part: slice, size: int) -> Any:
    """Give a part of a batch.

    Args:
        entry: the batch, or something in it; numbers and words stay as they are.
        part: which examples.
        size: of the batch.

    Returns:
        The part, in the same form.

    Raises:
        UsageError: a tensor with another first dimension.
    """
    if isinstance(entry, torch.Tensor) and entry.dim():
        if len(entry) != size:
            raise UsageError(
                f"a tensor of shape {tuple(entry.shape)} in a batch of {size} cannot be divided: give all tensors the "
                "same first dimension, or start one process"
            )
        return entry[part]
    if isinstance(entry, Mapping):
        return {name: cut(inner, part, size) for name, inner in entry.items()}
    if isinstance(entry, (tuple, list)):
        if len(entry) == size and next(_tensors(entry), None) is None:
            return entry[part]
        inner = [cut(inner, part, size) for inner in entry]
        return type(entry)(*inner) if hasattr(entry, "_fields") else type(entry)(inner)
    return entry


class _Sum(torch.autograd.Function):
    """The sum of a tensor over the processes; so is its derivative, as each process's loss depends on all."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def batch_norm(module: _BatchNorm, processes: Any, inputs: torch.Tensor) -> torch.Tensor:
    """Normalise with the statistics of the whole batch; torch's ``SyncBatchNorm`` does so on cards only.

    mean = Σ x / n,  var = Σ (x - mean)² / n over all processes,  y = (x - mean) / sqrt(var + eps) · weight + bias

    Args:
        module: in whose place it is called.
        processes: ``distributed.DistributedProcesses``, which have equal parts of the batch.
        inputs: this process's part.

    Returns:
        As the module gives it.
    """
    if not module.training or processes.undivided:
        return type(module).forward(module, inputs)
    module._check_input_dim(inputs)
    dims = [0, *range(2, inputs.dim())]
    shape = [1, -1] + [1] * (inputs.dim() - 2)
    wide = inputs.float() if inputs.dtype in (torch.float16, torch.bfloat16) else inputs
    mean = _Sum.apply(wide.mean(dims)) / processes.count
    centred = wide - mean.view(shape)
    variance = _Sum.apply(centred.square().mean(dims)) / processes.count
    if module.running_mean is not None and module.running_var is not None:
        count = inputs.numel() // inputs.shape[1] * processes.count
        with torch.no_grad():
            module.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            weight = 1.0 / float(module.num_batches_tracked) if module.momentum is None else module.momentum  # type: ignore[arg-type]
            module.running_mean.mul_(1 - weight).add_(mean, alpha=weight)
            module.running_var.mul_(1 - weight).add_(variance, alpha=weight * count / (count - 1))
    normal = centred * torch.rsqrt(variance + module.eps).view(shape)
    if module.affine:
        normal = normal * module.weight.view(shape) + module.bias.view(shape)
    return normal.to(inputs.dtype)
