"""Unfreezing by groups: ULMFiT's gradual unfreezing, and chain-thaw's order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def unfreezing(groups: Sequence[int], epoch: int, every: int = 1, order: str = "top-down") -> np.ndarray:
    """Return 1 for each layer that is trained in an epoch, else 0.

    Args:
        groups: The group of each layer, from 0 at the input.
        epoch: From 1.
        every: Epochs of each stage.
        order: `"top-down"`, where stage e trains the top e groups, or `"chain"`, where the first stage trains the last
            group, stage e the group e − 2, and the last stage all.

    Example:
        >>> unfreezing([0, 1, 2], epoch=2)
        array([0., 1., 1.])
        >>> [unfreezing([0, 1, 2], epoch, order="chain").tolist() for epoch in (1, 2, 3, 4)]
        [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]]
    """
    number = max(groups) + 1
    stage = (epoch + every - 1) // every
    result: list[float] = []
    for group in groups:
        if order == "top-down":
            trained = group > number - 1 - stage
        elif stage > number:
            trained = True
        elif stage == 1:
            trained = group == number - 1
        else:
            trained = group == stage - 2
        result.append(float(trained))
    return np.array(result)
