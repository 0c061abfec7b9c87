"""Freezing by gradient fluctuation; the score is ours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .gradient_amplification import directionality


def freezing_score(epoch: Sequence[Sequence[Sequence[np.ndarray]]], measure: str = "G") -> np.ndarray:
    """Return F_l = 1 − G_l of each layer, from the gradients of each step.

    Args:
        epoch: For each step, for each layer, its gradient arrays.
        measure: `"G"` or `"G_prime"`.

    Example:
        >>> freezing_score([[[np.array([1.0])]], [[np.array([-1.0])]]])
        array([1.])
    """
    return 1 - directionality(epoch, measure)
