"""Basodi et al. 2020 and 2023: measures, choice and schedule, from the stored gradients of an epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def directionality(epoch: Sequence[Sequence[Sequence[np.ndarray]]], measure: str = "G") -> np.ndarray:
    """Return G or G′ of each layer.

    S_li = Σ_j g_lij,  A_li = Σ_j |g_lij|
    G_l = Σ_i |S_li| / Σ_i A_li  (0 where the denominator is 0)
    G′_l = (1/n) Σ_i |S_li| / A_li  (the term is 0 where A_li is 0)

    Args:
        epoch: For each step, for each layer, its gradient arrays (weight and bias).
        measure: `"G"` or `"G_prime"`.

    Returns:
        One number a layer, from 0 to 1.

    Example:
        >>> steps = [[[np.array([1.0, 1.0])]], [[np.array([1.0, -1.0])]]]
        >>> directionality(steps), directionality(steps, "G_prime")
        (array([0.5]), array([0.5]))

    Reference:
        Basodi, Pusuluri, Xiao, Pan 2023, arXiv 2305.18445, equations 4, 5, 7 and 8.
    """
    values: list[float] = []
    for layer in range(len(epoch[0])):
        arrays = [[np.asarray(g, dtype=np.float64).ravel() for g in step[layer]] for step in epoch]
        steps = np.array([np.concatenate([np.zeros(0), *step]) for step in arrays])
        signed, absolute = steps.sum(0), abs(steps).sum(0)
        if measure == "G":
            total = math.fsum(absolute)
            values.append(math.fsum(abs(signed)) / total if total else 0.0)
        else:
            terms = [abs(s) / a if a else 0.0 for s, a in zip(signed, absolute, strict=True)]
            values.append(math.fsum(terms) / len(terms) if terms else 0.0)
    return np.array(values)


def z_scores(values: Sequence[float], ddof: int = 0) -> np.ndarray:
    """Return ẑ_l = (v_l − mean) / σ, and 0 where σ = 0 or there are fewer than two layers; equation 6.

    Args:
        values: One a layer.
        ddof: 0 for the population's σ, 1 for the sample's.

    Example:
        >>> z_scores([1.0, 3.0])
        array([-1.,  1.])
    """
    array = np.array(values, dtype=np.float64)
    if len(array) < 2 or array.std(ddof=ddof) == 0:
        return np.zeros(len(array))
    return (array - array.mean()) / array.std(ddof=ddof)


def chosen(z: Sequence[float], threshold: float, sides: str = "upper") -> np.ndarray:
    """Return which layers are chosen: ẑ > threshold (case 1), or |ẑ| > threshold (case 2); section 3.6.

    Example:
        >>> chosen([2.0, -2.0, 1.0], 1.0), chosen([2.0, -2.0, 1.0], 1.0, "both")
        (array([ True, False, False]), array([ True,  True, False]))
    """
    array = np.array(z)
    return (abs(array) if sides == "both" else array) > threshold


def schedule(phases: Sequence[tuple[int, bool, float]], epochs: int) -> list[tuple[str, float]]:
    """Return what happens in each epoch: `"plain"`, `"analysis"` or `"amplified"`, and the factor; section 4.

    Args:
        phases: (last epoch, whether amplified, factor), one after another.
        epochs: How many epochs.

    Example:
        >>> schedule([(1, False, 2.0), (3, True, 2.0)], 4)
        [('plain', 1.0), ('analysis', 1.0), ('amplified', 2.0), ('plain', 1.0)]
    """
    result: list[tuple[str, float]] = []
    for epoch in range(1, epochs + 1):
        first = 1
        what: tuple[str, float] = ("plain", 1.0)
        for until, amplify, factor in phases:
            if first <= epoch <= until and amplify:
                what = ("analysis", 1.0) if epoch == first else ("amplified", float(factor))
            first = until + 1
        result.append(what)
    return result
