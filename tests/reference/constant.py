"""Fixed factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np


def constant(names: Sequence[str], factors_by_pattern: Mapping[str, float]) -> np.ndarray:
    """Return the layers' factors.

    f_l = the factor of the first pattern that matches the layer's name, 1 where none does

    Args:
        names: The layers' names.
        factors_by_pattern: fnmatch pattern to factor, in order.

    Returns:
        One factor a layer.

    Example:
        >>> constant(["conv1", "fc"], {"conv*": 0.1})
        array([0.1, 1. ])
    """
    factors: list[float] = []
    for name in names:
        found = 1.0
        for pattern, factor in factors_by_pattern.items():
            if fnmatchcase(name, pattern):
                found = factor
                break
        factors.append(found)
    return np.array(factors)
