"""Rules of one formula φ for each layer, and functions for φ: they take numbers of one layer and tensors of all."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor

from ..statistics import OF_ROWS, OF_STEP, Statistics
from .base import Rule
from .state import State

Value = float | Tensor
"""A number of one layer, or a tensor of all layers."""


def log1p(x: Value) -> Value:
    """Return log(1 + x); NaN for x below -1."""
    if isinstance(x, Tensor):
        return torch.log1p(x)
    return math.log1p(x) if x > -1 else (-math.inf if x == -1 else math.nan)


def minimum(x: Value, limit: float) -> Value:
    """Return the smaller of x and a number."""
    return x.clamp(max=limit) if isinstance(x, Tensor) else min(x, limit)


def where(condition: Any, x: Value, otherwise: float) -> Value:
    """Return x where the condition holds, else a number."""
    if isinstance(condition, Tensor):
        return torch.where(condition, cast(Tensor, x), otherwise)
    return x if condition else otherwise


class ElementwiseRule(Rule):
    """A rule without state whose factor for a layer follows from that layer's own statistics: f_l = φ(s_l).

    φ is written once, with operators and the functions of `layerwise.rules.elementwise`, and takes numbers of one layer
    or tensors of all layers. On the CPU a step with few layers then costs a few operations on Python's numbers instead
    of a chain of small tensor operations, each of which finds its code out of the cache.

    Example:
        >>> class InverseNorm(ElementwiseRule):
        ...     '''f_l = 1 / ‖g_l‖.'''
        ...     def factor(self, gradient_norm):
        ...         return 1 / gradient_norm
        >>> InverseNorm().numbers({"gradient_norm": [0.5, 2.0]})
        [2.0, 0.5]
        >>> InverseNorm().factors(Statistics(gradient_norm=torch.tensor([0.5, 2.0])), {})[0]
        tensor([2.0000, 0.5000])
    """

    @abstractmethod
    def factor(self, *statistics: Any, **options: Any) -> Any:
        """Return φ of the statistics in `needs`, in their order."""

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return φ of all layers."""
        return self.factor(*(getattr(statistics, name) for name in self.needs)), state

    def needs_own_layer_only(self) -> bool:
        """Return whether φ is in use and reads statistics of single layers."""
        if is_elementwise(self):
            return not {"counts", "gradients", *OF_STEP} & set(self.needs)
        return self.own_layer

    def takes_units(self) -> bool:
        """Return whether φ is in use and reads what is measured of rows."""
        return is_elementwise(self) and set(self.needs) <= set(OF_ROWS)

    def numbers(self, statistics: Mapping[str, Sequence[float]]) -> list[float]:
        """Return φ layer by layer, from one number a layer for each name in `needs`."""
        numbers: list[float] = []
        for row in zip(*map(statistics.__getitem__, self.needs), strict=True):
            try:
                number: Any = self.factor(*row)
            except ArithmeticError:  # Python's numbers cannot be divided by zero, and do not overflow
                number = None
            if type(number) not in (float, int):  # a root of a negative number is complex
                number = self.factor(*(torch.tensor([x], dtype=torch.float64, device="cpu") for x in row))
            numbers.append(float(number))
        return numbers


def is_elementwise(rule: Rule) -> TypeGuard[ElementwiseRule]:
    """Return whether a rule's factors are its φ; a subclass or an object may replace `factors`."""
    return getattr(rule.factors, "__func__", None) is ElementwiseRule.factors


def check_elementwise(rule: ElementwiseRule) -> None:
    """Raise a TypeError unless φ takes tensors of several layers and numbers of one, and its `needs` have an order."""
    if not isinstance(rule.needs, Sequence):
        raise TypeError(f"{rule!r}: needs={rule.needs!r} must be a tuple, whose order is that of factor's arguments")
    remedy = (
        "write it with operators (x ** 0.5 for a root) and with log1p, minimum and where of "
        "layerwise.rules.elementwise, or make it a Rule, whose factors(statistics, state) gets tensors only"
    )
    layers, result = torch.tensor([1.0, 2.0], dtype=torch.float64, device="cpu"), None
    for words, value in (("the numbers of one layer", 2.0), ("tensors of several layers", layers)):
        try:
            result = rule.factor(*[value] * len(rule.needs))
        except ArithmeticError:  # Python's numbers cannot form what a tensor has as infinity or NaN
            continue
        except Exception as error:
            raise TypeError(f"{rule!r}.factor cannot take {words} ({error}); {remedy}") from error
    if not isinstance(result, Tensor) or result.shape != layers.shape:
        raise TypeError(f"{rule!r}.factor returns {result!r} for tensors of two layers, not one factor each; {remedy}")
