"""Rates from the tails of spectra."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def hill_alpha(eigenvalues: Sequence[float]) -> float:
    """Return the Hill estimate over the upper half of a spectrum.

    Example:
        >>> [round(hill_alpha(one), 12) for one in ([1, 2, 4, 8], [math.exp(i) for i in range(6)])]
        [3.885390081778, 2.0]

    Reference:
        Zhou et al. 2023, arXiv 2312.00359, with the median as the least eigenvalue.
    """
    ordered = sorted(eigenvalues)
    upper = ordered[len(ordered) // 2 :]
    return 1 + len(upper) / (sum(map(math.log, upper)) - len(upper) * math.log(upper[0]))


def spectrum(weight: np.ndarray) -> list[float]:
    """Return the squared singular values of a matrix, or of those at all positions of a kernel."""
    matrices = weight.reshape(*weight.shape[:2], -1)
    each = [np.linalg.svd(matrices[:, :, k], compute_uv=False) ** 2 for k in range(matrices.shape[2])]
    return [float(value) for values in each for value in values]


def stable_rank(eigenvalues: Sequence[float]) -> float:
    """Return Σ λ / max λ of the squared singular values.

    Example:
        >>> stable_rank([9.0, 16.0])
        1.5625
    """
    return math.fsum(eigenvalues) / max(eigenvalues)


def spectral_norm(eigenvalues: Sequence[float]) -> float:
    """Return √max λ of the squared singular values.

    Example:
        >>> spectral_norm([9.0, 16.0])
        4.0
    """
    return math.sqrt(max(eigenvalues))


def heavy_tail(alphas: Sequence[float | None], low: float, high: float) -> list[float]:
    """Return the linear map of the exponents to factors; 1 for None.

    Example:
        >>> heavy_tail([None, 2, 3, 4], 0.5, 1.5), heavy_tail([2, 2.5, 4], 1, 5)
        ([1.0, 0.5, 1.0, 1.5], [1.0, 2.0, 5.0])
    """
    known = [alpha for alpha in alphas if alpha is not None]
    points, values = [min(known), max(known)], [low, high]
    return [1.0 if alpha is None else float(np.interp(alpha, points, values)) for alpha in alphas]
