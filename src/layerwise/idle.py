"""Detects the step that distributed checkpoints take to create an optimizer's state."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .tensors import has_values, local, several_processes


def makes_state_only(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a step of an optimizer without state is one of rates and gradients that are all zero.

    `torch.distributed.checkpoint` takes such a step before it reads or writes a state: it gives every parameter a
    gradient of zeros and sets the rates to 0.

    Where several processes train, only its caller tells it from a step of a warm-up that starts at 0. A process may
    hold zeros of a gradient that is not zero elsewhere, so its own values decide nothing for the others. Nor can the
    processes ask each other: a checkpoint may take the step in one process alone, where that process has no state. The
    caller is the same in all processes that take part. One process reads values, where all rates are zero.

    Args:
        groups: The parameter groups.
    """
    if several_processes():
        return _called_by_a_checkpoint()
    if any(map(_moves, groups)):
        return False
    gradients = [p.grad for group in groups for p in group["params"] if p.requires_grad]
    if any(g is None or g.layout is not torch.strided or not has_values(g) for g in gradients):
        return False
    return not any(bool(local(gradient).detach().count_nonzero()) for gradient in gradients if gradient is not None)


def _called_by_a_checkpoint() -> bool:
    module: Any = sys.modules.get("torch.distributed.checkpoint.state_dict")
    caller = getattr(getattr(module, "_init_optim_state", None), "__code__", None)
    if caller is None:
        return False
    frame = sys._getframe()
    while frame is not None and frame.f_code is not caller:
        frame = frame.f_back
    return frame is not None


def _moves(group: Mapping[str, Any]) -> bool:
    """Return whether a group's rate is not zero, as far as is known without asking a device."""
    rate = group.get("lr")
    unread = isinstance(rate, Tensor) and (rate.device.type != "cpu" or not has_values(rate))
    return rate is None or unread or bool(rate != 0)
