"""The step that is none: distributed checkpoints make an optimizer's state with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .tensors import local


def makes_state_only(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether a step of an optimizer without state is one of rates and gradients that are all zero.

    `torch.distributed.checkpoint` takes such a step before it reads or writes a state: it gives every parameter a
    gradient of zeros. The answer is each process's own, since a checkpoint may take the step in one process only, where
    that process holds nothing of a sharded model. Reads values, where all rates are zero.

    Args:
        groups: The parameter groups.
    """
    if any(map(_moves, groups)):
        return False
    gradients = [p.grad for group in groups for p in group["params"] if p.requires_grad]
    if any(gradient is None or gradient.layout is not torch.strided for gradient in gradients):
        return False
    return not any(bool(local(gradient).detach().count_nonzero()) for gradient in gradients if gradient is not None)


def _moves(group: Mapping[str, Any]) -> bool:
    """Tell whether a group's rate is not zero, as far as is known without asking a device."""
    rate = group.get("lr")
    return rate is None or (isinstance(rate, Tensor) and rate.device.type != "cpu") or bool(rate != 0)
