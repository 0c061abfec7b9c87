"""Small questions to tensors and lists of them."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor


def same_objects(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Tell whether two sequences hold the very same objects."""
    return first is second or (len(first) == len(second) and all(map(is_, first, second)))


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on a device; only a copy to the CPU waits, lest its values be read before they arrive."""
    return tensor if tensor.device == device else tensor.to(device, non_blocking=device.type != "cpu")


def as_dense_real(tensor: Tensor) -> Tensor:
    """Return a tensor's values so that their 2-norm is the tensor's."""
    if tensor.layout is not torch.strided:
        tensor = tensor.coalesce().values()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def local(tensor: Tensor) -> Tensor:
    """Return the piece of a tensor that this process holds: itself, unless it is sharded (a DTensor)."""
    to_local: Any = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
