"""The 2-norm that the rules share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def joint_norm(arrays: Sequence[np.ndarray]) -> float:
    """Return the 2-norm of all entries of some arrays together.

    ‖x‖ = sqrt(Σ_i x_i²)

    Args:
        arrays: The arrays of one layer, of any shapes.

    Returns:
        The norm; 0 where there is no array.

    Example:
        >>> joint_norm([np.array([[3.0]]), np.array([4.0])])
        5.0
    """
    total = 0.0
    for array in arrays:
        for entry in np.asarray(array, dtype=np.float64).ravel().tolist():
            total += entry * entry
    return math.sqrt(total)
