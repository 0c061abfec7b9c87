"""You, Gitman, Ginsburg 2017: LARS, and LARC after it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .norms import joint_norm


def lars(
    gradients: Sequence[Sequence[np.ndarray]],
    weights: Sequence[Sequence[np.ndarray]],
    decays: Sequence[Sequence[float]],
    *,
    trust_coefficient: float = 0.001,
    eps: float = 1e-8,
) -> np.ndarray:
    """Return the layers' local rates.

    λ_l = η ‖w_l‖ / (‖g_l‖ + β ‖w_l‖ + ε)

    and 1 where ‖w_l‖ or ‖g_l‖ is zero or not finite. Where the arrays of a layer have different weight decays
    β, β‖w_l‖ is the norm of the decay term (β_1 w_1, β_2 w_2, …).

    Args:
        gradients: The gradient arrays of each layer, without weight decay.
        weights: The weight arrays of each layer.
        decays: The weight decay β of each array.
        trust_coefficient: η.
        eps: ε.

    Returns:
        One factor a layer.

    Example:
        >>> lars([[np.array([2.0])]], [[np.array([4.0])]], [[0.5]])
        array([0.001])

    Reference:
        You, Gitman, Ginsburg: Large batch training of convolutional networks, 2017, arXiv 1708.03888,
        algorithm 1. The published implementations add ε.
    """
    factors: list[float] = []
    for g, w, beta in zip(gradients, weights, decays, strict=True):
        gradient_norm = joint_norm(g)
        weight_norm = joint_norm(w)
        decay_norm = joint_norm([b * array for b, array in zip(beta, w, strict=True)])
        if _unusable(gradient_norm) or _unusable(weight_norm):
            factors.append(1.0)
        else:
            factors.append(trust_coefficient * weight_norm / (gradient_norm + decay_norm + eps))
    return np.array(factors)


def larc(
    gradients: Sequence[Sequence[np.ndarray]],
    weights: Sequence[Sequence[np.ndarray]],
    decays: Sequence[Sequence[float]],
    learning_rates: Sequence[float],
    *,
    trust_coefficient: float = 0.02,
    clip: bool = True,
    eps: float = 1e-8,
) -> np.ndarray:
    """Return the layers' multipliers of the global rate.

    Clipped, the layer's rate is min(λ_l, t), so f_l = min(λ_l / t, 1); else it is t λ_l, so f_l = λ_l. λ_l is
    that of `lars`; f_l is 1 where a norm is zero or not finite.

    Args:
        gradients: The gradient arrays of each layer, without weight decay.
        weights: The weight arrays of each layer.
        decays: The weight decay β of each array.
        learning_rates: The global rate t, for each layer.
        trust_coefficient: η.
        clip: Whether to clip.
        eps: ε.

    Returns:
        One factor a layer.

    Example:
        >>> larc([[np.array([2.0])]], [[np.array([4.0])]], [[0.0]], [0.1]).round(6)
        array([0.4])

    Reference:
        As `lars`; the clipped form is that of NVIDIA's apex (LARC) and of NVIDIA's Caffe.
    """
    ratios = lars(gradients, weights, decays, trust_coefficient=trust_coefficient, eps=eps)
    factors: list[float] = []
    for g, w, ratio, rate in zip(gradients, weights, ratios.tolist(), learning_rates, strict=True):
        if _unusable(joint_norm(g)) or _unusable(joint_norm(w)):
            factors.append(1.0)
        elif not clip:
            factors.append(ratio)
        elif ratio < rate:
            factors.append(ratio / rate)
        else:
            factors.append(1.0)
    return np.array(factors)


def _unusable(norm: float) -> bool:
    return norm == 0 or not math.isfinite(norm)
