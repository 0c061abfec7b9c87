"""Steps in proportion to the size of the weights, as Adafactor's `scale_parameter`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layers import Layer
from ..statistics import Statistics
from .base import Rule, is_number
from .shapes import sizes_of
from .state import State


@dataclass(frozen=True)
class WeightScaled(Rule):
    """Steps in proportion to the root mean square of a layer's weights.

    f_l = min(max(‖w_l‖ / √n_l, smallest), largest)

    Start: `LayerwiseLR(optimizer, WeightScaled(), model)` with `optimizer = Adam(model.parameters(), lr=0.03)`. The
    rate must be chosen anew: the code of ScaledAdam uses 0.03 to 0.045.

    n_l is the number of the layer's weights. It is for optimizers whose steps have a size of their own, as Adam's.
    Layers are single parameters.

    When it helps: one rate for networks of several sizes, and rates that need not be tuned to how weights begin. When
    not: on `torch.optim.Adafactor`, which has this factor already. Costs: one pass over the weights.

    Args:
        smallest: The least factor, so that weights that begin at zero move; Adafactor's is 0.001, ScaledAdam's 1e-5.
        largest: The greatest factor; ScaledAdam's is 3.

    Raises:
        ValueError: The limits are negative or in the wrong order.

    Example:
        >>> rule, layers = WeightScaled(), [Layer("", (torch.zeros(2, 2),))]
        >>> statistics = Statistics(weight_norm=torch.tensor([1.0], dtype=torch.float64))
        >>> rule.factors(statistics, rule.init(layers, torch.device("cpu")))[0]
        tensor([0.5000], dtype=torch.float64)

    Reference:
        Shazeer, Stern: Adafactor, 2018, arXiv 1804.04235, section 8 (relative step size); Yao et al.: Zipformer, 2024,
        whose ScaledAdam has both limits in its code.
    """

    smallest: float = 1e-3
    largest: float = math.inf
    needs = ("weight_norm",)
    default_layers = "parameter"
    default_place = "lr"
    scales_rates = True
    own_layer = True

    def __post_init__(self) -> None:
        numbers = is_number(self.smallest) and is_number(self.largest)
        if not (numbers and 0 <= self.smallest <= self.largest and self.smallest < math.inf):
            raise ValueError(
                f"smallest={self.smallest!r}, largest={self.largest!r} must be numbers with 0 <= smallest <= largest"
            )

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return √n_l."""
        return {"_roots": sizes_of(layers).sqrt()}

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return the root mean squares between the limits."""
        return (statistics.weight_norm / state["_roots"]).clamp(self.smallest, self.largest), state
