"""Small questions to tensors and lists of them."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

FLOAT8 = frozenset(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
)
"""Types that can be converted, and nothing else."""
WEIGHTS = FLOAT8 | {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex32, torch.complex64, torch.complex128),
}
"""Types whose numbers are weights. Integers are codes of quantised weights, which only their layer can read."""


def holds_weights(tensor: Tensor) -> bool:
    """Return whether a tensor's numbers are weights, which have a norm."""
    return tensor.dtype in WEIGHTS


def is_quantised(tensor: Tensor) -> bool:
    """Return whether a tensor's own class converts it to numbers, as quantised weights of torchao do."""
    return type(tensor).dequantize is not Tensor.dequantize


def same_objects(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Tell whether two sequences hold the very same objects."""
    return first is second or (len(first) == len(second) and all(map(is_, first, second)))


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on a device; only a copy to the CPU waits, lest its values be read before they arrive."""
    return tensor if tensor.device == device else tensor.to(device, non_blocking=device.type != "cpu")


def as_dense_real(tensor: Tensor) -> Tensor:
    """Return a tensor's values so that their 2-norm is the tensor's."""
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce().values()
    elif tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def local(tensor: Tensor) -> Tensor:
    """Return the piece of a tensor that this process holds: itself, unless it is sharded (a DTensor)."""
    to_local: Any = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def slots_of(owner: Any) -> dict[str, Any]:
    """Return the attributes that an object keeps in `__slots__`, outside its `__dict__`."""
    found: dict[str, Any] = {}
    for kind in type(owner).__mro__:
        slots: Any = vars(kind).get("__slots__", ())
        for slot in [slots] if isinstance(slots, str) else slots:
            private = slot.startswith("__") and not slot.endswith("__")
            name = f"_{kind.__name__.lstrip('_')}{slot}" if private else slot
            if slot not in ("__dict__", "__weakref__") and hasattr(owner, name):
                found[name] = getattr(owner, name)
    return found


def several_processes() -> bool:
    """Return whether this process belongs to a process group of several."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
