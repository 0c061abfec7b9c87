"""Rules whose factors follow from the finished step: LAMB's trust ratio, aligned and bounded updates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .norms import joint_norm

Layers = Sequence[Sequence[np.ndarray]]


def trust(directions: Layers, weights: Layers) -> np.ndarray:
    """Return ‖w_l‖ / ‖u_l‖, and 1 where a norm is zero.

    Args:
        directions: The change of each layer's arrays by the rate.
        weights: The weight arrays of each layer, before the step.

    Example:
        >>> trust([[np.array([0.6, 0.8])], [np.zeros(1)]], [[np.array([3.0, 4.0])], [np.ones(1)]])
        array([5., 1.])

    Reference:
        You et al.: LAMB, ICLR 2020, arXiv 1904.00962, algorithm 2, φ(x) = x.
    """
    factors: list[float] = []
    for u, w in zip(directions, weights, strict=True):
        direction, weight = joint_norm(u), joint_norm(w)
        factors.append(weight / direction if direction > 0 and weight > 0 else 1.0)
    return np.array(factors)


def align_updates(directions: Layers, weights: Layers, groups: Sequence[str]) -> np.ndarray:
    """Return the harmonic mean of r = ‖u‖ / ‖w‖ over each layer's group, divided by the layer's own r.

    Args:
        directions: The change of each layer's arrays by the rate.
        weights: The weight arrays of each layer, before the step.
        groups: What each layer is compared with.

    Example:
        >>> ratios = [[np.array([0.1])], [np.array([0.2])], [np.array([0.4])]]
        >>> align_updates(ratios, [[np.ones(1)]] * 3, "aaa").round(4)
        array([1.7143, 0.8571, 0.4286])
    """
    ratios = [joint_norm(u) / joint_norm(w) for u, w in zip(directions, weights, strict=True)]
    factors: list[float] = []
    for own, group in zip(ratios, groups, strict=True):
        alike = [ratio for ratio, other in zip(ratios, groups, strict=True) if other == group]
        factors.append(len(alike) / sum(1 / ratio for ratio in alike) / own)
    return np.array(factors)


def update_floor(directions: Layers, weights: Layers, ratio: float = 0.35) -> np.ndarray:
    """Return max(1, ratio ‖w_l‖ / ‖u_l‖)."""
    pairs = zip(directions, weights, strict=True)
    return np.array([max(1.0, ratio * joint_norm(w) / joint_norm(u)) for u, w in pairs])


def update_clip(directions: Layers, limit: float = 1.0) -> np.ndarray:
    """Return 1 / max(1, RMS(u_l) / limit).

    Example:
        >>> update_clip([[np.array([3.0, 4.0])]]).round(6)
        array([0.282843])

    Reference:
        Shazeer, Stern: Adafactor, 2018, arXiv 1804.04235, section 6.
    """
    sizes = [sum(array.size for array in u) for u in directions]
    return np.array(
        [1 / max(1.0, joint_norm(u) / math.sqrt(n) / limit) for u, n in zip(directions, sizes, strict=True)]
    )
