"""The closure of `step(closure)`, which computes the loss and the gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def evaluate_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], *, weights_may_move: bool = False
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Evaluate the closure of `step`, if there is one, and put its result in its place.

    Hooks run before the closure, which computes the gradients; without this a rule would see those of the step before.

    Args:
        args: Positional arguments of `step`, the optimizer first.
        kwargs: Its named arguments.
        weights_may_move: Whether weights may have changed when `step` evaluates its closure; if not, that raises then.

    Returns:
        The arguments with a closure that returns the loss.
    """
    closure = closure_of(args, kwargs)
    if closure is None:
        return args, kwargs
    with torch.enable_grad():
        loss = closure()
    watched = () if weights_may_move else args[:1]
    parameters = [p for optimizer in watched for group in optimizer.param_groups for p in group["params"]]
    return with_closure(args, kwargs, _once(loss, parameters))


def closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    """Return the closure among the arguments of `step`, the optimizer being the first."""
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    return closure if callable(closure) else None


def with_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], closure: Callable[[], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of `step` with another closure in the place of theirs."""
    if "closure" in kwargs:
        return args, {**kwargs, "closure": closure}
    return (*args[:1], closure, *args[2:]), kwargs


def _once(loss: Any, parameters: Sequence[Tensor]) -> Callable[[], Any]:
    calls = 0
    versions = [p._version for p in parameters]

    def closure() -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise RuntimeError(
                "this optimizer evaluates its closure more than once a step, so the factors of its second evaluation "
                "are not known; detach the LayerwiseLR adapter, or use a first-order optimizer"
            )
        if [p._version for p in parameters] != versions:
            raise RuntimeError(
                "this optimizer moves the weights before it evaluates its closure, so the factors would be those of "
                "other gradients; detach the LayerwiseLR adapter, or call step() without a closure"
            )
        return loss

    return closure
