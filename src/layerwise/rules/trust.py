"""Trust ratios of the finished step: LAMB (You et al. 2020), OrScale (Lou, You 2026)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..layers import Layer
from ..statistics import Statistics
from .base import Rule, is_number
from .combine import check_bounds
from .lars import one_dimensional
from .shapes import sizes_of
from .state import State


@dataclass(frozen=True)
class Trust(Rule):
    """The trust ratio between a layer's weights and its step.

    r_l = (‖w_l‖ / ‖u_l‖)^exponent;  f_l = clip(r_l), or clip(r_l / c_l) with `calibrate`

    Start: `LayerwiseLR(optimizer, Trust(), model)` with `optimizer = AdamW(model.parameters(), lr=0.006, eps=1e-6)`.
    This is LAMB, to rounding. The rate is the share of its weights that a step moves a layer by. NVIDIA's code trains
    BERT at 0.006, after a warm-up, with batches of 65,536. `Trust(calibrate=True)` begins at the optimizer's own rate
    instead: its first factors are 1.

    u_l = Δw_l / lr is the direction of the optimizer's own step, decoupled weight decay included, and c_l is r_l at the
    layer's first step. Where ‖w_l‖ or ‖u_l‖ is zero or not finite the factor is 1. Layers are single parameters, and
    one-dimensional ones (biases, gains of normalisations) are left out; give those a group without weight decay.

    On AdamW `clip=(0, 1)` is LAMBC, and `calibrate=True, clip=(0.1, 5)` on
    `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` is OrScale-LM.

    When it helps: large batches, for which LAMB was made; on Muon the authors of OrScale report 94.05 % against 93.70
    on CIFAR-10, in three seeds. When not: in the same table LAMB is below AdamW at an ordinary batch, 92.40 to 93.12.
    Costs: the factor is known when the step has been taken, so a copy of the parameters during the step, and three
    passes more over them.

    Args:
        calibrate: Whether r_l is divided by its first value.
        clip: `(low, high)`, between which the factor is clamped; None for no clamp.
        numerator: `"norm"`, or `"rms"` for ‖w_l‖ / √n_l, n_l the number of the layer's weights.
        exponent: The power of the ratio, above 0.

    Raises:
        TypeError: `clip` holds no numbers.
        ValueError: An argument is out of its range; or, when attached, `apply` is another place than `"update"`.

    Example:
        >>> rule, layers = Trust(), [Layer("", (torch.zeros(2, 2),))]
        >>> of_step = {"weight_norm": torch.tensor([5.0]), "direction_norm": torch.tensor([1.0])}
        >>> rule.factors(Statistics(**of_step), rule.init(layers, torch.device("cpu")))[0]
        tensor([5.], dtype=torch.float64)

    Reference:
        You et al.: Large batch optimization for deep learning: training BERT in 76 minutes, ICLR 2020, arXiv
        1904.00962, algorithm 2; Lou, You 2026, arXiv 2605.07815 (`calibrate`, as its code does).
    """

    calibrate: bool = False
    clip: tuple[float, float] | None = None
    numerator: Literal["norm", "rms"] = "norm"
    exponent: float = 1
    needs = ("weight_norm", "direction_norm")
    default_layers = "parameter"
    default_exclude = staticmethod(one_dimensional)
    places = ("update",)
    compares_layers = False

    def __post_init__(self) -> None:
        if self.clip is not None:
            check_bounds(self.clip, "clip")
        if self.numerator not in ("norm", "rms"):
            raise ValueError(f"numerator={self.numerator!r} is unknown; allowed: 'norm', 'rms'")
        if not (is_number(self.exponent) and 0 < self.exponent < math.inf):
            raise ValueError(f"exponent={self.exponent!r} must be a finite number above 0; 1 is LAMB's")

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return √n_l and, to calibrate, c_l, which is 0 until the layer's first step."""
        roots = sizes_of(layers).sqrt()
        state: State = {"_divisors": roots if self.numerator == "rms" else torch.ones_like(roots)}
        return {**state, "first_ratio": torch.zeros_like(roots)} if self.calibrate else state

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return the ratios; 1 where one cannot be formed."""
        weight, direction = statistics.weight_norm, statistics.direction_norm
        usable = (torch.minimum(weight, direction) > 0) & (torch.maximum(weight, direction) < math.inf)
        ratio = (weight / state["_divisors"] / direction) ** self.exponent
        if self.calibrate:
            first = state["first_ratio"]
            first = torch.where(usable & (first == 0), ratio, first)
            state, ratio = {**state, "first_ratio": first}, ratio / first
        clipped = ratio if self.clip is None else ratio.clamp(*self.clip)
        return torch.where(usable, clipped, 1.0), state
