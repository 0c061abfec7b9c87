"""Rates from the relative gradient norm, and from the signal-to-noise ratio of a gradient."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .norms import joint_norm

Layers = Sequence[Sequence[np.ndarray]]


def relative_gradient(gradients: Layers, weights: Layers, left_out: Sequence[bool]) -> np.ndarray:
    """Return ‖g_l‖ / ‖w_l‖ by its maximum; 1 for a layer that is left out or has zero weights.

    Example:
        >>> gradients = [[np.array([norm])] for norm in (0.1, 0.4, 0.2)]
        >>> relative_gradient(gradients, [[np.array([norm])] for norm in (1.0, 2.0, 4.0)], [False] * 3)
        array([0.5 , 1.  , 0.25])

    Reference:
        Lee et al. 2023, arXiv 2210.11466, Auto-RGN.
    """
    ratios: list[float | None] = []
    for g, w, out in zip(gradients, weights, left_out, strict=True):
        ratios.append(None if out or joint_norm(w) == 0 else joint_norm(g) / joint_norm(w))
    largest = max(ratio for ratio in ratios if ratio is not None)
    return np.array([1.0 if ratio is None else ratio / largest for ratio in ratios])


def signal_to_noise(gradients: Layers) -> np.ndarray:
    """Return the mean over weights of g² / (var(g) + 1e-8), the unbiased variance over the first dimension."""
    values: list[float] = []
    for arrays in gradients:
        total = sum(float((g**2 / (g.var(axis=0, ddof=1, keepdims=True) + 1e-8)).sum()) for g in arrays)
        values.append(total / sum(g.size for g in arrays))
    return np.array(values)
