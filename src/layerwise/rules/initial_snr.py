"""Xu et al. 2024: fixed rates from the first gradient's signal-to-noise ratio (SGD-SaI)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .._arguments import check_choice, check_count
from ..layers import Layer
from ..statistics import Statistics, common_device
from .base import Rule, is_number
from .shapes import sizes_of
from .state import State

LARGEST = 1e6
"""A factor of more than this by √n is of a gradient whose entries are all equal."""


@dataclass(frozen=True)
class InitialSNR(Rule):
    """Fixed rates from the first gradient.

    f_l = ‖g_l‖ / (std(g_l) + ε) of the layer's first gradient, with the unbiased standard deviation of its entries

    Start: `LayerwiseLR(optimizer, InitialSNR(), model)` with `optimizer = SGD(model.parameters(), lr=0.01,
    momentum=0.9, dampening=0.9)`. This is SGD-SaI without weight decay, at the rate of its code. The factors are about
    √n_l, 10 to 3000: divide the rate of any other optimizer by as much.

    A gradient whose entries have the mean μ and the variance σ² gives √n_l · √(1 + μ²/σ²), n_l the number of weights.
    The means are small, so **this is a rule of shapes**: run `kind="sqrt_n"` beside it, f_l = √n_l.

    SGD-SaI takes the weight decay outside of the factor. Layers are single parameters. A layer takes the first gradient
    that is finite and not zero among its first steps, and keeps 1 if there is none. A layer of one weight keeps 1 too,
    and so does one whose entries are all equal. A missing gradient of a layer of several counts as zeros.

    When it helps: it keeps no second moment, so it takes less memory than Adam. No comparison shows that it does more.
    When not: where `kind="sqrt_n"` does as well, the gradients add nothing. Costs: the first `within` steps, also those
    after a layer has come, take norm and standard deviation of the gradients, some operations a layer. Later ones cost
    nothing.

    Args:
        kind: `"snr"`, or the control `"sqrt_n"`.
        eps: ε, at least 0.
        within: How many steps may pass until a layer's first gradient. Gradient scalers skip the first few.

    Raises:
        TypeError: `within` is no whole number, or `kind` no string.
        ValueError: An argument is out of its range.

    Example:
        >>> rule, layers = InitialSNR(eps=0), [Layer("", (torch.zeros(2),))]
        >>> of_3_and_4 = {"gradient_norm": torch.tensor([5.0]), "gradient_std": torch.tensor([0.5]).sqrt()}
        >>> rule.factors(Statistics(**of_3_and_4), rule.init(layers, torch.device("cpu")))[0]
        tensor([7.0711], dtype=torch.float64)

    Reference:
        Xu, Xiang, Cai, Wen: No more Adam: learning rate scaling at initialization is all you need, 2024, arXiv
        2412.11768, as in the code of sgd-sai 1.0.3. That gives a parameter of one weight the factor |g| / ε.
    """

    kind: Literal["snr", "sqrt_n"] = "snr"
    eps: float = 1e-8
    within: int = 20
    needs = ("gradient_norm", "gradient_std")
    default_layers = "parameter"
    default_place = "lr"
    scales_rates = True
    compares_layers = False

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("snr", "sqrt_n"))
        check_count("within", self.within)
        if not (is_number(self.eps) and 0 <= self.eps < math.inf):
            raise ValueError(f"eps={self.eps!r} must be a finite number of at least 0")
        if self.kind == "sqrt_n":
            object.__setattr__(self, "needs", ())

    def needs_own_layer_only(self) -> bool:
        """Return whether the factors never change."""
        return self.kind == "sqrt_n"

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return factors of 1, which layers have had their first gradient, and the numbers of steps so far."""
        if self.kind == "sqrt_n":
            return {"_factors": sizes_of(layers).sqrt()}
        device, dtype = common_device(layers)
        ones = torch.ones(len(layers), dtype=dtype, device=device)
        found = torch.zeros(len(layers), dtype=torch.bool, device=device)
        return {
            "factors": ones,
            "found": found,
            "steps": torch.zeros(len(layers), dtype=torch.long, device=device),
            "step": 0,  # since the last layer came: `asks` cannot read the device
            "_largest": LARGEST * sizes_of(layers).sqrt(),
        }

    def renewed(self, layers: Sequence[Layer], device: torch.device, state: State, old_names: Sequence[str]) -> State:
        """Return the state for new layers, whose first gradients are measured too."""
        result = super().renewed(layers, device, state, old_names)
        has_come = not {layer.name for layer in layers} <= {*old_names}
        return {**result, "step": 0} if has_come and self.kind == "snr" else result

    @property
    def measures_early(self) -> bool:
        """Return whether the first gradients are measured."""
        return self.kind == "snr"

    def asks(self, state: State) -> bool:
        """Return whether a layer's first gradient may be this step's."""
        return self.kind == "snr" and state["step"] < self.within

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return the factors, with those of layers whose first gradient this is."""
        if self.kind == "sqrt_n":
            return state["_factors"], state
        if self.asks(state):
            value = statistics.gradient_norm / (statistics.gradient_std + self.eps)
            waits = state["found"].logical_not() & (state["steps"] < self.within)
            fresh = waits & (value > 0) & (value < state["_largest"])
            state = {
                **state,
                "factors": torch.where(fresh, value, state["factors"]),
                "found": state["found"] | fresh,
                "steps": state["steps"] + 1,
                "step": state["step"] + 1,
            }
        return state["factors"], state
