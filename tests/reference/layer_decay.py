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
