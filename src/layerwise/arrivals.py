"""The hook on parameters that tells when a gradient has arrived."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor
from torch.utils.hooks import RemovableHandle


class Receiver(Protocol):
    """Who is told."""

    def arrived(self, parameter: Tensor) -> None:
        """Take note that the parameter's gradient is complete."""
        ...

    def end(self) -> None:
        """Take note that the backward has ended."""
        ...


class Arrival:
    """The hook on the parameters, and what the engine calls when a backward ends; keeps its receiver not alive."""

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = weakref.ref(receiver)

    def __call__(self, parameter: Tensor) -> None:
        """Tell the receiver that the parameter's gradient is complete."""
        receiver = self.receiver()
        if receiver is not None:
            receiver.arrived(parameter)

    def end(self) -> None:
        """Tell the receiver that the backward has ended."""
        receiver = self.receiver()
        if receiver is not None:
            receiver.end()


def are_received(parameters: Iterable[Tensor]) -> bool:
    """Tell whether any of the parameters has such a hook with a receiver that lives."""
    hooks = [hook for p in parameters for hook in (p._post_accumulate_grad_hooks or {}).values()]
    arrivals = [getattr(hook, "__wrapped__", None) for hook in hooks]  # torch.compiler.disable wraps them
    return any(isinstance(arrival, Arrival) and arrival.receiver() is not None for arrival in arrivals)


def registered(parameter: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Register the hook; on a frozen parameter too, for the day it is trained."""
    hooked: Any = parameter
    if parameter.requires_grad:
        return hooked.register_post_accumulate_grad_hook(hook)
    parameter.requires_grad_(True)
    try:
        return hooked.register_post_accumulate_grad_hook(hook)
    finally:
        parameter.requires_grad_(False)
