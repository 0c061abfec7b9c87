"""Layer-wise learning-rate decay, as published with ELECTRA and with BEiT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np


def layer_decay(
    layers: Sequence[int | Literal["embeddings", "head"]],
    blocks: int,
    decay: float,
    style: Literal["beit", "electra"],
) -> np.ndarray:
    """Return the layers' factors in a network of N blocks.

    BEiT: f = d^(N + 1 − i), where i is 0 for the embeddings, b + 1 for block b and N + 1 for everything else.

    ELECTRA: f = d^(N + 2 − i), where i is 0 for the embeddings, b + 1 for block b and N + 2 for the task's
    head, so that the last block has d² and the head 1.

    Args:
        layers: What each layer is: `"embeddings"`, the number of its block (from 0), or `"head"`.
        blocks: N.
        decay: d.
        style: Whose formula.

    Returns:
        One factor a layer.

    Example:
        >>> layer_decay(["embeddings", 0, 1, "head"], 2, 0.5, "beit")
        array([0.125, 0.25 , 0.5  , 1.   ])
        >>> layer_decay(["embeddings", 0, 1, "head"], 2, 0.5, "electra")
        array([0.0625, 0.125 , 0.25  , 1.    ])

    Reference:
        Clark, Luong, Le, Manning: ELECTRA, ICLR 2020, arXiv 2003.10555, with its published code; Bao, Dong,
        Piao, Wei: BEiT, ICLR 2022, arXiv 2106.08254, with its published code.
    """
    last = blocks + 1 if style == "beit" else blocks + 2
    factors: list[float] = []
    for layer in layers:
        if layer == "embeddings":
            depth = 0
        elif layer == "head":
            depth = last
        else:
            depth = int(layer) + 1
        factors.append(decay ** (last - depth))
    return np.array(factors)


def layer_decay_by_depth(
    depths: Sequence[int],
    decay: float,
    least: float = 0.0,
    frozen_below: int = 0,
    factors: Sequence[float] | None = None,
) -> np.ndarray:
    """Return timm's scales, max(least, d^(D − depth)), 0 below a depth, times a factor of each layer's own.

    Args:
        depths: Of each layer, D the largest.
        decay: d.
        least: The least scale (timm's `min_scale`).
        frozen_below: The depth below which layers are not trained.
        factors: Of each layer; None for 1.

    Example:
        >>> layer_decay_by_depth([0, 1, 2], 0.5, least=0.3, factors=[1, 1, 4])
        array([0.3, 0.5, 4. ])
    """
    result: list[float] = []
    for i, depth in enumerate(depths):
        scale = decay ** (max(depths) - depth)
        if scale < least:
            scale = least
        if depth < frozen_below:
            scale = 0.0
        result.append(scale * (1.0 if factors is None else factors[i]))
    return np.array(result)
