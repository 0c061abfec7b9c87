"""One second moment a layer, as in NovoGrad (Ginsburg et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layers import Layer
from ..statistics import Statistics, common_device
from .base import Rule, is_number
from .state import State


@dataclass(frozen=True)
class LayerMoment(Rule):
    """A running second moment of each layer's gradient.

    v_l ← β v_l + (1 − β) ‖g_l‖²;  f_l = 1 / (√v_l + ε)

    Start: `LayerwiseLR(optimizer, LayerMoment(), model)` with `optimizer = SGD(model.parameters(), lr=0.01,
    momentum=0.95)`. This is NovoGrad to rounding: `m ← μ m + f g + λ w`, the decay outside of the scale. Public code
    for the speech models Jasper and QuartzNet takes rates of 0.01 to 0.05.

    v begins as ‖g_l‖² of the layer's first gradient. With `bias_correction` it begins at 0, and √(v_l / (1 − βᵗ)) takes
    its place. v stays as it is at steps that do not count (skipped ones, or with a gradient that is not finite), and in
    a layer whose gradient is zero.

    It acts on the gradient, before momentum. `SGD` without momentum takes it at the rate, which is the same there; at
    the rate of an optimizer with momentum, f would scale the momentum instead, and that is another method.

    When it helps: as `NormalizedGradient` does, with less noise, and where Adam's second moment for each weight takes
    too much memory. When not: beside Adam, which has a moment for each weight. Costs: one pass over the gradients, and
    two numbers a layer.

    Args:
        beta: β, from 0 to below 1; 0 is `NormalizedGradient`.
        eps: ε, at least 0.
        bias_correction: Whether v is corrected for its beginning at 0, as Adam's moments are.

    Raises:
        ValueError: An argument is out of its range; or, when attached under `apply="auto"`, the optimizer divides by
            the size of its gradients itself, as Adam does.

    Example:
        >>> rule, layers = LayerMoment(), [Layer("", (torch.zeros(4),))]
        >>> state = rule.init(layers, torch.device("cpu"))
        >>> for norm in (2.0, 1.0):
        ...     norms = torch.tensor([norm], dtype=torch.float64)
        ...     statistics = Statistics(gradient_norm=norms, counts=torch.tensor(True))
        ...     factors, state = rule.factors(statistics, state)
        ...     print(f"{factors.item():.6f}")
        0.500000
        0.503793

    Reference:
        Ginsburg et al.: Stochastic gradient methods with layer-wise adaptive moments for training of deep networks,
        2019, arXiv 1905.11286 (NovoGrad); the start at ‖g_l‖² is that of its code.
    """

    beta: float = 0.98
    eps: float = 1e-8
    bias_correction: bool = False
    needs = ("gradient_norm", "counts")
    default_layers = "parameter"
    default_place = "gradient"
    default_decay = "plain"
    places = ("gradient", "lr")
    needs_scale = True
    compares_layers = False

    def __post_init__(self) -> None:
        if not (is_number(self.beta) and 0 <= self.beta < 1):
            raise ValueError(f"beta={self.beta!r} must be a number from 0 to below 1, such as 0.98")
        if not (is_number(self.eps) and 0 <= self.eps < math.inf):
            raise ValueError(f"eps={self.eps!r} must be a finite number of at least 0")

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return v, and β to the power of the number of gradients that it has seen."""
        device, dtype = common_device(layers)
        return {
            "moment": torch.zeros(len(layers), dtype=dtype, device=device),
            "weight_of_start": torch.ones(len(layers), dtype=dtype, device=device),
        }

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return 1 / (√v + ε) with this step's gradient in v."""
        norm, moment, start = statistics.gradient_norm, state["moment"], state["weight_of_start"]
        squares = norm.square()
        seen = statistics.counts & (norm > 0) & (squares < math.inf)
        first = (start == 1) if not self.bias_correction else torch.zeros_like(seen)
        moved = torch.where(first, squares, self.beta * moment + (1 - self.beta) * squares)
        moment = torch.where(seen, moved, moment)
        start = torch.where(seen, start * self.beta, start)
        corrected = moment / (1 - start) if self.bias_correction else moment
        # Before the first gradient there is nothing to divide by.
        factors = torch.where(moment > 0, 1 / (corrected.sqrt() + self.eps), 1.0)
        return factors, {"moment": moment, "weight_of_start": start}
