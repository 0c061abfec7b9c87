"""Functions for φ of an `ElementwiseRule`: they take numbers of one layer and tensors of all layers."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

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
