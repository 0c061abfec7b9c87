"""Rules of gradient and weight norms: normalised gradients, NovoGrad's moment, clipping, weights' size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .norms import joint_norm

Layers = Sequence[Sequence[np.ndarray]]


def normalized_gradient(gradients: Layers, norm: str = "l2") -> np.ndarray:
    """Return 1 / ‖g_l‖, or √n_l / ‖g_l‖ for "rms"."""
    sizes = [sum(array.size for array in g) if norm == "rms" else 1 for g in gradients]
    return np.array([math.sqrt(n) / joint_norm(g) for g, n in zip(gradients, sizes, strict=True)])


def layer_moment(
    norms: Sequence[float], beta: float = 0.98, eps: float = 1e-8, *, corrected: bool = False
) -> list[float]:
    """Return one layer's factors 1 / (√v + ε) of successive gradient norms.

    Example:
        >>> layer_moment([2.0, 1.0])[1].__round__(10)
        0.5037927193

    Reference:
        Ginsburg et al.: NovoGrad, 2019, arXiv 1905.11286, algorithm 1; with `corrected`, v begins at 0 and is divided
        by 1 − βᵗ.
    """
    moment, factors = 0.0 if corrected else norms[0] ** 2, []
    for step, norm in enumerate(norms, start=1):
        if corrected or step > 1:
            moment = beta * moment + (1 - beta) * norm**2
        shown = moment / (1 - beta**step) if corrected else moment
        factors.append(1 / (math.sqrt(shown) + eps))
    return factors


def agc(gradients: Layers, weights: Layers, clip: float = 0.01, eps: float = 1e-3) -> np.ndarray:
    """Return min(1, clip max(‖w_l‖, eps) / ‖g_l‖).

    Reference:
        Brock et al. 2021, arXiv 2102.06171, equation 3, with whole tensors as units.
    """
    pairs = zip(gradients, weights, strict=True)
    return np.array([min(1.0, clip * max(joint_norm(w), eps) / joint_norm(g)) for g, w in pairs])


def ada_gc(
    norms: Sequence[Sequence[float]], relative: float, beta: float, absolute: float, warmup: int
) -> list[list[float]]:
    """Return the factors of successive steps, from each layer's gradient norms at each step.

    Example:
        >>> [[round(f, 4) for f in step] for step in ada_gc([[2.0], [1.0], [10.0]], 1.05, 0.98, 10, 1)]
        [[1], [1.0], [0.2079]]
    """
    averages: list[float] = []
    result: list[list[float]] = []
    for step, own in enumerate(norms):
        if step + 1 < warmup or not averages:
            factor = min(1, absolute / math.sqrt(sum(norm**2 for norm in own)))
            factors = [factor] * len(own)
            clipped = [factor * norm for norm in own]
            averages = [min(a, c) for a, c in zip(averages, clipped, strict=True)] if averages else clipped
        else:
            factors = [min(1.0, relative * a / norm) for a, norm in zip(averages, own, strict=True)]
            averages = [beta * a + (1 - beta) * f * norm for a, f, norm in zip(averages, factors, own, strict=True)]
        result.append(factors)
    return result


def weight_scaled(weights: Layers, smallest: float = 1e-3, largest: float = math.inf) -> np.ndarray:
    """Return the root mean square of each layer's weights, between limits."""
    sizes = [sum(array.size for array in w) for w in weights]
    return np.array(
        [min(max(joint_norm(w) / math.sqrt(n), smallest), largest) for w, n in zip(weights, sizes, strict=True)]
    )
