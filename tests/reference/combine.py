"""The product of rules, and factors between bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def chain(factors: Sequence[np.ndarray]) -> np.ndarray:
    """Return the product of several rules' factors.

    f_l = ∏_r f_l^(r), a factor that is not finite counting as 1

    Args:
        factors: The factors of each rule.

    Returns:
        One factor a layer.

    Example:
        >>> chain([np.array([2.0, 3.0]), np.array([0.5, np.inf])])
        array([1., 3.])
    """
    products: list[float] = []
    for layer in range(len(factors[0])):
        product = 1.0
        for rule in factors:
            if math.isfinite(rule[layer]):
                product *= float(rule[layer])
        products.append(product)
    return np.array(products)


def bounds(factors: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return a rule's factors between bounds.

    f_l = min(max(f_l, low), high), a factor that is not finite counting as 1

    Args:
        factors: The rule's factors.
        low: The smallest factor.
        high: The largest factor.

    Returns:
        One factor a layer.

    Example:
        >>> bounds(np.array([0.1, 1.0, 9.0]), 0.5, 2.0)
        array([0.5, 1. , 2. ])
    """
    clamped: list[float] = []
    for factor in factors.tolist():
        value = factor if math.isfinite(factor) else 1.0
        if value < low:
            value = low
        if value > high:
            value = high
        clamped.append(value)
    return np.array(clamped)
