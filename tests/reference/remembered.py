"""Rules that remember: distance over gradients, changes of gradients, the first gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Layers = Sequence[Sequence[np.ndarray]]


def joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([array.ravel() for array in arrays])


def change(before: Sequence[np.ndarray], now: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Return ‖x‖, ‖y − x‖ and ⟨x, y⟩ of a layer's arrays at two steps.

    Example:
        >>> change([np.array([3.0, 4.0])], [np.array([3.0, 6.0])])
        (5.0, 2.0, 33.0)
    """
    x, y = joined(before), joined(now)
    apart = math.fsum((b - a) ** 2 for a, b in zip(x, y, strict=True))
    return math.sqrt(math.fsum(a * a for a in x)), math.sqrt(apart), math.fsum(a * b for a, b in zip(x, y, strict=True))


def rotation(first: Sequence[np.ndarray], now: Sequence[np.ndarray]) -> float:
    """Return 1 − cos of the angle between a layer's arrays at two steps.

    Example:
        >>> rotation([np.array([3.0, 4.0])], [np.array([-8.0, 6.0])])
        1.0
    """
    inner = change(first, now)[2]
    return 1 - inner / (change(first, now)[0] * change(now, now)[0])


def l_dog(
    weights: Sequence[np.ndarray], gradients: Sequence[np.ndarray], reps_rel: float = 1e-6, eps: float = 1e-8
) -> list[float]:
    """Return one layer's factors at successive steps, from its weights before each one and its gradients.

    Example:
        >>> l_dog([np.zeros(1), np.full(1, 3.0)], [np.full(1, 3.0), np.full(1, 4.0)], eps=0)[1]
        0.6

    Reference:
        Ivgi et al. 2023, arXiv 2302.12022, with the ε of its code.
    """
    distance, squares, factors = reps_rel * (1 + float(np.linalg.norm(weights[0]))), eps, []
    for w, g in zip(weights, gradients, strict=True):
        distance = max(distance, float(np.linalg.norm(w - weights[0])))
        squares += float((g**2).sum())
        factors.append(distance / math.sqrt(squares))
    return factors


def ada_lip(gradients: Sequence[np.ndarray], beta: float = 0.8, eps: float = 1e-8) -> list[float]:
    """Return one layer's factors at successive steps.

    Example:
        >>> [round(f, 10) for f in ada_lip([np.full(1, g) for g in (2.0, 1.0, 3.0)])]
        [1.0, 1.039999996, 0.9319999963]

    Reference:
        Ioannou et al.: AdaLip, 2023, doi 10.1007/s11063-022-11140-w.
    """
    before, average, factors = np.zeros_like(gradients[0]), 1.0, []
    for step, g in enumerate(gradients):
        ratio = float(np.linalg.norm(before)) / (float(np.linalg.norm(g - before)) + eps)
        average = beta * average + (1 - beta) * ratio
        factors.append(average if step else 1.0)
        before = g
    return factors


def noise_adaptive(noise: Sequence[float], alpha: float, groups: Sequence[str]) -> list[float]:
    """Return √(a / max a) over each layer's group, a = α / √(α² + H).

    Example:
        >>> [round(f, 6) for f in noise_adaptive([0, 3, 8], 1, "aaa")]
        [1.0, 0.707107, 0.57735]
    """
    quiet = [alpha / math.sqrt(alpha**2 + h) for h in noise]
    largest = {group: max(a for a, other in zip(quiet, groups, strict=True) if other == group) for group in groups}
    return [math.sqrt(a / largest[group]) for a, group in zip(quiet, groups, strict=True)]


def initial_snr(gradients: Layers, eps: float = 1e-8) -> np.ndarray:
    """Return ‖g‖ / (std(g) + ε) of each layer, the unbiased standard deviation of its entries.

    Reference:
        Xu et al. 2024, arXiv 2412.11768.
    """
    values = [joined(arrays) for arrays in gradients]
    return np.array([float(np.linalg.norm(g) / (g.std(ddof=1) + eps)) for g in values])
