"""Properties of tensors, reading many values in one transfer, and returning freed memory to the system."""

from __future__ import annotations

import copyreg
import ctypes
import sys
import warnings
from collections.abc import Sequence
from itertools import islice
from operator import is_
from typing import Any, cast

import torch
from torch import Tensor

FLOAT8 = frozenset(dtype for name, dtype in vars(torch).items() if name.startswith("float8_"))
"""Types that support conversion only."""
WEIGHTS = FLOAT8 | {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex32, torch.complex64, torch.complex128),
}
"""Types of weights. Integers are codes of quantised weights, which only their layer can read."""


def holds_weights(tensor: Tensor) -> bool:
    """Return whether a tensor holds weights, which have a norm."""
    return tensor.dtype in WEIGHTS


def is_quantised(tensor: Tensor) -> bool:
    """Return whether a tensor's class has its own `dequantize`, as quantised weights of torchao do."""
    return type(tensor).dequantize is not Tensor.dequantize


def has_values(tensor: Tensor) -> bool:
    """Return whether a tensor holds values: it is neither on the meta device nor a fake tensor."""
    fakes = sys.modules.get("torch._subclasses.fake_tensor")
    return tensor.device.type != "meta" and not (fakes and isinstance(local(tensor), fakes.FakeTensor))


def can_be_measured(tensor: Tensor) -> bool:
    """Return whether statistics of a tensor can be computed.

    Fake tensors on an accelerator are measured as real ones, because there no value is read before the end.
    """
    return has_values(tensor) or tensor.device.type not in ("meta", "cpu")


def runs_on_fakes(tensor: Tensor) -> bool:
    """Return whether operations on a tensor on the CPU give fake tensors now."""
    return tensor.device.type == "cpu" and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def warn_without_values(consequence: str, stacklevel: int) -> None:
    """Warn that parameters hold no values, with the consequence; `stacklevel` counts from the caller."""
    warnings.warn(
        f"the optimizer's parameters hold no values (meta device or fake tensors), so {consequence}",
        stacklevel=stacklevel + 1,
    )


def same_objects(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Return whether two sequences hold the very same objects."""
    return first is second or (len(first) == len(second) and all(map(is_, first, second)))


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on a device; only a copy to the CPU waits, so that its values are complete."""
    return tensor if tensor.device == device else tensor.to(device, non_blocking=device.type != "cpu")


def as_dense_real(tensor: Tensor) -> Tensor:
    """Return a tensor's values so that their 2-norm is the tensor's."""
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce().values()
    elif tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def local(tensor: Tensor) -> Tensor:
    """Return the shard of a tensor that this process holds: itself, unless it is sharded (a DTensor)."""
    to_local: Any = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def slots_of(owner: Any) -> dict[str, Any]:
    """Return the attributes that an object keeps in `__slots__`, as `copy` finds them."""
    names: list[str] = vars(copyreg)["_slotnames"](type(owner))
    return {name: getattr(owner, name) for name in names if hasattr(owner, name)}


def several_processes() -> bool:
    """Return whether this process belongs to a process group of several."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def shards_of(lists: Sequence[Sequence[Tensor]]) -> Sequence[Sequence[Tensor]]:
    """Return this process's shards of sharded tensors, if those of each parameter are sharded as it is.

    The kernels are elementwise. A call with DTensors derives their sharding again, which takes 0.1 ms.
    """
    if not any(hasattr(parameter, "placements") for parameter in lists[0]):
        return lists
    for parameter, *others in zip(*filter(None, lists), strict=True):
        shared = getattr(parameter, "placements", None)
        # A count of steps is no shard: each process has all of it.
        if any(other.ndim and getattr(other, "placements", None) != shared for other in others):
            return lists
    return [list(map(local, tensors)) for tensors in lists]


# --- Reading many values ---------------------------------------------------------------------------------------------


def fetched(values: Sequence[Tensor | Sequence[float] | int | None], like: Tensor) -> list[list[float]]:
    """Return tensors as lists of numbers, in one transfer with the device and dtype of `like`.

    Numbers stay as they are; None is one 0.
    """
    flat = [moved(v.detach().reshape(-1), like.device).to(like.dtype) for v in values if isinstance(v, Tensor)]
    numbers = iter(transferred(torch.cat(flat)))
    result: list[list[float]] = []
    for value in values:
        if isinstance(value, Tensor):
            result.append(list(islice(numbers, value.numel())))
        else:
            result.append(list(value) if isinstance(value, Sequence) else [float(value or 0)])
    return result


class NoValuesError(RuntimeError):
    """A tensor's values do not exist."""


def transferred(tensor: Tensor) -> list[float]:
    """Return a tensor's values; this waits for the device. Raises NoValuesError if it has none."""
    if not has_values(tensor):
        raise NoValuesError
    return cast(list[float], tensor.tolist())


# --- Memory ----------------------------------------------------------------------------------------------------------

LARGE = 2**20
"""Bytes from which on a freed tensor is worth returning."""

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def return_freed_memory() -> None:
    """Return freed CPU memory to the system, if the C library is glibc. This takes about a millisecond.

    Without it a gap between tensors stays with the process. It cannot hold a tensor of its size, because of alignment.
    """
    if _trim is not None:
        _trim(0)
