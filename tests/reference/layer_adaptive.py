"""Singh et al. 2015, equation 9."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .norms import joint_norm


def layer_adaptive(gradients: Sequence[Sequence[np.ndarray]], log_base: float = math.e) -> np.ndarray:
    """Return the layers' factors.

    t_l = t · (1 + log(1 + 1/‖g_l‖)), so f_l = 1 + log(1 + 1/‖g_l‖)

    and 1 where ‖g_l‖ is zero or not finite, where the equation has no value.

    Args:
        gradients: The gradient arrays of each layer (weight and bias), without weight decay.
        log_base: Base of the logarithm.

    Returns:
        One factor a layer.

    Example:
        >>> layer_adaptive([[np.array([0.6, 0.8])]]).round(6)
        array([1.693147])

    Reference:
        Singh, De, Zhang, Goldstein, Taylor: Layer-specific adaptive learning rates for deep networks, ICMLA
        2015, arXiv 1510.04609, equation 9.
    """
    factors: list[float] = []
    for layer in gradients:
        n = joint_norm(layer)
        if n == 0 or not math.isfinite(n):
            factors.append(1.0)
        else:
            factors.append(1 + math.log(1 + 1 / n, log_base))
    return np.array(factors)
