"""Mean and standard deviation of a layer's gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def gradient_moments(arrays: Sequence[np.ndarray], count: int) -> tuple[float, float]:
    """Return the mean and the unbiased standard deviation over a layer's gradient; what no array holds is 0.

    Args:
        arrays: The gradients of a layer's parameters, of those that have one.
        count: How many numbers the layer has.

    Returns:
        Both; the deviation is NaN for a layer of one number.

    Example:
        >>> gradient_moments([np.array([1.0, 2.0, 3.0])], 3)
        (2.0, 1.0)
        >>> gradient_moments([np.array([3.0])], 3)
        (1.0, 1.7320508075688772)
    """
    numbers = [x for array in arrays for x in np.asarray(array, dtype=np.float64).ravel().tolist()]
    numbers += [0.0] * (count - len(numbers))
    if not all(map(math.isfinite, numbers)):
        return math.nan, math.nan
    mean = math.fsum(numbers) / max(count, 1)
    squares = math.fsum((x - mean) ** 2 for x in numbers)
    return mean, math.sqrt(squares / (count - 1)) if count > 1 else math.nan
