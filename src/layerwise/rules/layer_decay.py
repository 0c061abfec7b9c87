"""Layer-wise decay of the learning rate by depth, as ELECTRA and BEiT fine-tune."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..arguments import has_type
from ..layers import Layer
from ..statistics import Statistics
from .base import Rule, State, is_number
from .constant import fixed_factors

_BLOCK = re.compile(r"^(?:.*?\.)?\d+(?=\.|$)")


def depths(names: Sequence[str]) -> list[int]:
    """Return the depth of each layer, counted from 0 at the input, from the names alone.

    Layers of one numbered block (`blocks.3`, `encoder.layer.3`, `layer1.0`, `3`) share a depth. Layers named before the
    first block are its embeddings, all of depth 0; those after the last block are the head, all of the last depth;
    those in between belong to the block before them. Without numbered blocks every layer is a depth of its own.

    Args:
        names: Layer names in the model's order.

    Returns:
        One depth a name, from 0 on, without gaps.

    Example:
        >>> depths(["patch_embed", "blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "norm", "head"])
        [0, 1, 1, 2, 3, 3]
    """
    blocks = [match[0] if (match := _BLOCK.match(name)) else None for name in names]
    numbered = [i for i, block in enumerate(blocks) if block is not None]
    if not numbered:
        return list(range(len(names)))
    order: dict[str, int] = {}
    first = 1 if numbered[0] > 0 else 0
    result: list[int] = []
    current = 0
    for block in blocks:
        if block is not None:
            current = order.setdefault(block, first + len(order))
        result.append(current)
    head = first + len(order)
    return [
        head if i > numbered[-1] or names[i].rpartition(".")[2] == "rel_pos_bias" else depth
        for i, depth in enumerate(result)
    ]


@dataclass(frozen=True)
class LayerDecay(Rule):
    """Layer-wise learning-rate decay.

    f_l = d^(D − depth_l), depth 0 for the embeddings, D for the head (BEiT)

    With `style="electra"` one more power lies between the last block and the head: f_l = d^(D + 1 − depth_l) below the
    head and 1 for the head. It scales the rate, so decoupled weight decay with it.

    Args:
        decay: d, in (0, 1]; ELECTRA uses 0.8 (base) and 0.9 (large), BEiT 0.65 to 0.9.
        style: `"beit"` or `"electra"`.
        depth: A function from layer name to depth (0 at the input) for networks whose names do not tell; the default
            is `depths`.

    Raises:
        ValueError: `decay` or `style` is out of its range, or a depth is no whole number of at least 0.

    Example:
        >>> names = ["embeddings", "layer.0", "layer.1", "head"]
        >>> layers = [Layer(name, (torch.zeros(1),)) for name in names]
        >>> LayerDecay(0.5).init(layers, torch.device("cpu"))["_factors"]
        tensor([0.1250, 0.2500, 0.5000, 1.0000], dtype=torch.float64)

    Reference:
        Clark et al.: ELECTRA, ICLR 2020, arXiv 2003.10555; Bao et al.: BEiT, ICLR 2022, arXiv 2106.08254.
    """

    decay: float
    style: Literal["beit", "electra"] = "beit"
    depth: Callable[[str], int] | None = None
    needs = ()
    default_place = "lr"
    own_layer = True
    compares_layers = True

    def __post_init__(self) -> None:
        if not (is_number(self.decay) and 0 < self.decay <= 1):
            raise ValueError(f"decay={self.decay!r} must be a number in (0, 1]; 0.65 to 0.9 are usual")
        if self.style not in ("beit", "electra"):
            raise ValueError(f"style={self.style!r} is unknown; allowed: 'beit', 'electra'")

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return the factors as a tensor."""
        names = [layer.name for layer in layers]
        levels = depths(names) if self.depth is None else [self.depth(name) for name in names]
        for name, level in zip(names, levels, strict=True):
            if isinstance(level, bool) or not has_type(level, int) or level < 0:
                raise ValueError(f"depth({name!r}) returned {level!r}; it must be a whole number of at least 0")
        top = max(levels)
        gap = 1 if self.style == "electra" else 0
        values = [1.0 if level == top else float(self.decay) ** (top + gap - level) for level in levels]
        return fixed_factors(layers, values)

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return the tensor made by `init`."""
        return state["_factors"], state
