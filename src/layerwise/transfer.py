"""Reading values from the device, many at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import cast

import torch
from torch import Tensor

from .tensors import has_values, moved


def fetched(values: Sequence[Tensor | Sequence[float] | int | None], like: Tensor) -> list[list[float]]:
    """Return tensors as lists of numbers, all of them in one transfer from the device.

    Args:
        values: Tensors; or numbers, which stay what they are. None is one 0.
        like: Of the device and the type in which they travel.
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
    """Return a tensor's values; this waits for the device.

    Raises:
        NoValuesError: The values do not exist.
    """
    if not has_values(tensor):
        raise NoValuesError
    return cast(list[float], tensor.tolist())
