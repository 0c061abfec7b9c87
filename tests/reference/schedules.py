"""Rules that follow a schedule: layers that stop one after another."""

from __future__ import annotations

import math


def freeze_out(step: int, total: int, share: float, t0: float = 0.8, power: int = 3, *, rescale: bool = True) -> float:
    """Return the factor at a step, from 0, of a layer at this share of the depth.

    Example:
        >>> [round(freeze_out(500, 1000, i / 4), 6) for i in range(5)]
        [0.002646, 0.134853, 0.307745, 0.432518, 0.5]

    Reference:
        Brock et al.: FreezeOut, 2017, arXiv 1706.04983, with the ½ of its code.
    """
    end = (t0 + (1 - t0) * share) ** power
    if step >= total * end:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * step / (total * end))) / (end if rescale else 1)
