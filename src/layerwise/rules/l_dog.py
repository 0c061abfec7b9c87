"""Ivgi et al. 2023: a layer's rate from how far it has come, without a rate to tune (L-DoG)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layers import Layer
from ..statistics import Statistics, common_device
from .base import is_number
from .copies import RemembersWeights
from .state import State


@dataclass(frozen=True)
class LDoG(RemembersWeights):
    """Distance over gradients, for each layer, on `SGD(lr=1)`.

    f_l = r_l / √G_l;  r_l = max of reps_rel (1 + ‖w_l(0)‖) and ‖w_l(i) − w_l(0)‖ up to now;  G_l = ε + Σ ‖g_l(i)‖²

    Start: `LayerwiseLR(optimizer, LDoG(), model)` with `optimizer = SGD(model.parameters(), lr=1)`. The factor is the
    rate itself: add no momentum, weight decay or scheduler. Average the weights over the steps
    (`torch.optim.swa_utils.AveragedModel`), as the method does.

    w_l(0) are the weights at the first step with this rule. Adam and other optimizers that set the size of a step do
    not go with it. Layers are single parameters. A layer keeps 1 until its first gradient that is finite and not zero.
    Steps that do not count (skipped ones, or with a gradient that is not finite) are left out of G.

    When it helps: where no rate can be tuned. When not: without the average of the weights the method falls short, and
    with too small a `reps_rel` hundreds of steps pass before the rates have grown. Costs: a copy of the parameters in
    the state, and another during each step.

    Args:
        reps_rel: The first distance by 1 + ‖w_l(0)‖, above 0; 1e-4 for networks with batch normalisation, 1e-8 for T5.
            Where it is too small, hundreds of steps pass before the rates have grown.
        eps: ε, at least 0.

    Raises:
        ValueError: An argument is out of its range; or, when attached, parameters are sharded.

    Example:
        >>> rule, layers = LDoG(reps_rel=0.1), [Layer("", (torch.zeros(1),))]
        >>> state = rule.init(layers, torch.device("cpu"))
        >>> norms = {"gradient_norm": torch.tensor([2.0]), "weight_norm": torch.tensor([0.0])}
        >>> rule.factors(Statistics(**norms, counts=torch.tensor(True)), state)[0]
        tensor([0.0500], dtype=torch.float64)

    Reference:
        Ivgi, Hinder, Carmon: DoG is SGD's best friend: a parameter-free dynamic step size schedule, ICML 2023, arXiv
        2302.12022. The values of `reps_rel`, and ε, which is added once, are its code's. The code adds an L2 decay to
        the gradient before it sums G; here G is of the gradient alone.
    """

    reps_rel: float = 1e-6
    eps: float = 1e-8
    needs = ("gradient_norm", "weight_norm", "counts")
    default_layers = "parameter"
    default_place = "lr"
    scales_rates = True

    def __post_init__(self) -> None:
        if not (is_number(self.reps_rel) and 0 < self.reps_rel < math.inf):
            raise ValueError(f"reps_rel={self.reps_rel!r} must be a finite number above 0, such as 1e-6")
        if not (is_number(self.eps) and 0 <= self.eps < math.inf):
            raise ValueError(f"eps={self.eps!r} must be a finite number of at least 0")

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return a copy of the weights, r and G; the copy is made again at the first step."""
        device, dtype = common_device(layers)
        zeros = torch.zeros(len(layers), dtype=dtype, device=device)
        return {**super().init(layers, device), "distance": zeros, "squares": zeros.clone()}

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return r / √G with this step's distance and gradient."""
        distance = first = self.reps_rel * (1 + statistics.weight_norm)
        if state["started"]:
            far, before = self.distance(state), state["distance"]
            # A layer that has come later has no distance yet.
            distance = torch.where(before > 0, torch.fmax(before, torch.where(far < math.inf, far, 0.0)), first)
        state = self.begun(state)
        added = statistics.gradient_norm.square()
        squares = state["squares"] + torch.where(statistics.counts & (added < math.inf), added, 0.0)
        factors = torch.where(squares > 0, distance / (squares + self.eps).sqrt(), 1.0)
        return factors, {**state, "distance": distance, "squares": squares}
