"""Rates from shapes: muP and the shape factors of orthogonalised updates."""

from __future__ import annotations

import math
from collections.abc import Sequence

Shape = Sequence[int]


def mup(shape: Shape, base: Shape, kind: str) -> float:
    """Return muP's factor of a weight of out × in (× kernel) beside that of the base network.

    Example:
        >>> mup((512, 512), (128, 128), "adam"), mup((512,), (128,), "sgd")
        (0.25, 4.0)

    Reference:
        microsoft/mup, optim.py.
    """
    grown = [own / other for own, other in zip(shape, base, strict=True) if own != other]
    if len(grown) == 2:
        return 1 / grown[1] if kind == "adam" else grown[0] / grown[1]
    return 1.0 if kind == "adam" or not grown else grown[0]


def of_shape(shape: Shape, kind: str) -> float:
    """Return the factor of a weight of out × in × kernel for an update of spectral norm 1; 1 below two dimensions.

    Example:
        >>> of_shape((8, 2), "rms_to_rms"), of_shape((8, 2), "muon"), of_shape((16, 25), "match_rms_adamw")
        (2.0, 2.0, 1.0)
    """
    if len(shape) < 2:
        return 1.0
    kernel = math.prod(shape[2:])
    if kind == "rms_to_rms":
        return math.sqrt(shape[0] / shape[1]) / kernel
    rows, columns = shape[0], shape[1] * kernel
    return math.sqrt(max(1, rows / columns)) if kind == "muon" else 0.2 * math.sqrt(max(rows, columns))
