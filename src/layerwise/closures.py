"""Finds and wraps the closure of `step(closure)`, and watches whether a step reads its groups before it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial, update_wrapper
from typing import Any, cast

import torch
from torch import Tensor

from .tensors import local


def closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
    """Return the closure among the arguments of `step`, of which the first is the optimizer; None if there is none."""
    if len(args) == 1 and not kwargs:
        return None
    name, position = _place_of_closure(cast(Any, type(args[0])))
    closure = kwargs.get(name, args[position] if len(args) > position else None)
    return closure if callable(closure) else None


def with_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], closure: Callable[..., Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of `step` with their closure replaced."""
    name, position = _place_of_closure(cast(Any, type(args[0])))
    if name in kwargs:
        return args, {**kwargs, name: closure}
    return (*args[:position], closure, *args[position + 1 :]), kwargs


@cache
def _place_of_closure(kind: Any) -> tuple[str, int]:
    """Return the name and the position of the closure in the signature of a class's `step`."""
    names = list(inspect.signature(kind.step).parameters)
    name = next((name for name in names if "closure" in name), "closure")
    return name, names.index(name) if name in names else 1


def followed(closure: Callable[..., Any], evaluate: Callable[..., Any], *given: Any) -> Callable[..., Any]:
    """Return a closure that calls `evaluate(*given, closure, args, kwargs)` outside of compiled graphs.

    Args:
        closure: The closure.
        evaluate: A function of a module: it is wrapped once, since `torch.compiler.disable` is slow.
        *given: Its first arguments.
    """
    return update_wrapper(partial(_followed, _outside_graph(evaluate), given, closure), closure)


def _followed(evaluate: Callable[..., Any], given: tuple[Any, ...], closure: Any, *args: Any, **kwargs: Any) -> Any:
    return evaluate(*given, closure, args, kwargs)


@cache
def _outside_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    return cast(Callable[..., Any], torch.compiler.disable(function))


class WatchedGroups(list[dict[str, Any]]):
    """A list of parameter groups that calls a function before each access.

    Args:
        read: The function.
    """

    def __init__(self, read: Callable[[], None]) -> None:
        super().__init__()
        self._read = read

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._read()
        return super().__iter__()

    def __reversed__(self) -> Iterator[dict[str, Any]]:
        self._read()
        return super().__reversed__()

    def __len__(self) -> int:
        self._read()
        return super().__len__()

    def __getitem__(self, index: Any) -> Any:
        self._read()
        return cast(Any, super().__getitem__(index))

    def __add__(self, other: list[Any]) -> list[Any]:
        self._read()
        return super().__add__(other)

    def __reduce__(self) -> Any:
        return list, ([*self],)


class WatchedGroup(dict[str, Any]):
    """A parameter group that `step` reads before it evaluates its closure.

    Args:
        group: The group.
        note: Called when a value is read that may differ between layers.
        stale: The error message for an access after `end`.
    """

    def __init__(self, group: dict[str, Any], note: Callable[[], None], stale: str) -> None:
        super().__init__(group)
        self._note, self._stale, self._ended = note, stale, False

    def end(self) -> None:
        """Make each later access raise, because other groups have replaced this one."""
        self._ended = True

    def refresh(self, group: dict[str, Any]) -> None:
        """Take over values that the closure has changed in the optimizer's group."""
        super().update(group)

    def _read(self, name: str | None = None) -> None:
        if self._ended:
            raise RuntimeError(self._stale)
        if name in (None, "lr", "weight_decay", "dampening"):
            self._note()

    def __getitem__(self, name: str) -> Any:
        self._read(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value."""
        self._read(name)
        return super().get(name, default)

    def __iter__(self) -> Iterator[str]:
        self._read()
        return super().__iter__()

    def items(self) -> Any:
        """Return names and values."""
        self._read()
        return super().items()

    def values(self) -> Any:
        """Return the values."""
        self._read()
        return super().values()


class Kept:
    """Copies of weights and optimizer state, which are restored if a step is refused after it has begun.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: Any) -> None:
        parameters = _parameters_of(optimizer)
        self._weights = [(p, local(p).detach().clone()) for p in parameters]
        self._state = {key: _copied(value) for key, value in optimizer.state.items()}

    @torch.no_grad()
    def put_back(self, optimizer: Any) -> None:
        """Restore weights and optimizer state."""
        for p, value in self._weights:
            local(p).copy_(value)
        optimizer.state.clear()
        optimizer.state.update(self._state)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in cast(dict[Any, Any], value).items()}
    if isinstance(value, list):
        return [_copied(one) for one in cast(list[Any], value)]
    return value


def versions_of(optimizer: Any) -> Sequence[int]:
    """Return the version counters of the parameters, which change with each write in place."""
    return [p._version for p in _parameters_of(optimizer)]


def _parameters_of(optimizer: Any) -> Iterable[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
