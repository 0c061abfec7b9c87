"""Recorded factors once more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def replay(recorded: Sequence[Mapping[str, float]], names: Sequence[str], counts: Sequence[bool]) -> np.ndarray:
    """Return the factors of each step.

    f_l(k) = the factor recorded for layer l at step k; the last ones after the last recorded step

    Args:
        recorded: Layer name to factor, for each recorded step.
        names: The layers, in the order that is wanted.
        counts: For each step of the new run, whether it counts; one that does not leaves k as it is.

    Returns:
        Shape `[len(counts), len(names)]`.

    Example:
        >>> replay([{"fc": 2.0}, {"fc": 3.0}], ["fc"], [True, False, True, True]).ravel()
        array([2., 3., 3., 3.])
    """
    rows: list[list[float]] = []
    k = 0
    for count in counts:
        row = recorded[k] if k < len(recorded) else recorded[-1]
        rows.append([row[name] for name in names])
        if count:
            k += 1
    return np.array(rows)
