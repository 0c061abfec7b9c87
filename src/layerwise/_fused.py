"""Fused kernels, called once for each factor, without a parameter group for each.

With a parameter group for each layer an optimizer gathers, sorts and checks the tensors of each group anew. A fused
kernel takes all of them at once, and its rate may be a tensor. Here that tensor is a `DealtRate`, which receives the
kernel's call through PyTorch's `__torch_function__` and makes one call of it for each factor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, optim
from torch.utils._python_dispatch import _disable_current_modes

from ._tensors import shards_of
from ._writes import FUSED
from .apply import Overrides, Split, Step

Deal = Callable[[Sequence[Tensor]], Iterable[tuple[Sequence[int], Mapping[str, Any]]]]
"""The parameters of a kernel's call, to parts of them: their positions, and the options in which their call differs."""


class DealtRate(Tensor):
    """A rate that deals the tensors of a fused kernel's call out to several calls."""

    rate: float
    deal: Deal

    @classmethod
    def of(cls, rate: float, deal: Deal) -> DealtRate:
        """Return a rate that deals the tensors out.

        Args:
            rate: The rate of the parts whose options name no other.
            deal: See `Deal`.
        """
        made = torch.tensor(rate, dtype=torch.float64, device="cpu").as_subclass(cls)
        made.rate, made.deal = rate, deal
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make one call for each part, where the function is a fused kernel; else do what any tensor does."""
        options = kwargs or {}
        dealt = options.get("lr")
        if func not in FUSED or not isinstance(dealt, cls):
            plain: Any = super()
            return plain.__torch_function__(func, types, args, options)
        shards = shards_of(args)
        for positions, own in dealt.deal(args[0]):
            # A list that these options do not use is empty.
            lists = [[tensors[i] for i in positions] if tensors else [] for tensors in shards]
            func(*lists, **{**options, "lr": dealt.rate, **own})
        return None


def can_be_dealt(optimizer: optim.Optimizer) -> bool:
    """Tell whether a fused kernel steps each group of an optimizer, and is given the rate as it stands there."""
    every = all(group.get("fused") and isinstance(group["lr"], int | float) for group in optimizer.param_groups)
    kind: Any = type(optimizer)
    return every and _hands_on_the_rate(kind.step)


@cache
def _hands_on_the_rate(step: Callable[..., Any]) -> bool:
    """Tell whether this is a step of PyTorch's that hands the rate on to the kernel untouched, by trying it once."""
    inner = unwrap(step)  # without hooks, which belong to one optimizer
    kinds: tuple[Any, ...] = (optim.SGD, optim.Adam, optim.AdamW, optim.Adagrad)
    kind = next((kind for kind in kinds if unwrap(kind.step) is inner), None)
    if kind is None:
        return False
    with _disable_current_modes():  # under fake tensors no value could be read, and the answer is kept
        return _hands_on_the_rate_of(kind, inner)


def _hands_on_the_rate_of(kind: Any, inner: Callable[..., Any]) -> bool:
    parameters = [torch.nn.Parameter(torch.zeros(1, device="cpu")) for _ in range(2)]
    for p in parameters:
        p.grad = torch.ones(1, device="cpu")
    try:
        optimizer = kind(parameters, lr=1.0, fused=True)
        optimizer.param_groups[0]["lr"] = DealtRate.of(1.0, lambda _: [((0,), {"lr": 0.5}), ((1,), {})])
        with torch.no_grad():
            inner(optimizer)
    except (RuntimeError, TypeError, ValueError):  # another PyTorch: groups give the same numbers
        return False
    return [round(p.item(), 3) for p in parameters] == [-0.5, -1.0]


class DealtStep(Step):
    """A step by fused kernels, of which each call is dealt out by factor."""

    def divide(self, overrides: Overrides) -> list[Split]:
        """Let parameters of different factors be stepped with different options."""
        self.view.param_groups = [self._dealt(group, overrides) for group in self.view.param_groups]
        return []

    def _dealt(self, group: dict[str, Any], overrides: Overrides) -> dict[str, Any]:
        def deal(parameters: Sequence[Tensor]) -> Iterator[tuple[list[int], dict[str, Any]]]:
            for factor, positions in self.factors.buckets(self.partition.of(parameters).positions):
                yield positions, overrides(group, factor)

        return {**group, "lr": DealtRate.of(group["lr"], deal)}
