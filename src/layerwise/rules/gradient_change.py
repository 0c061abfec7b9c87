"""Rules that compare a gradient with that of the step before: AdaLip, and rates by the gradients' noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .._arguments import check_choice
from ..layers import Layer
from ..statistics import Statistics, common_device
from .base import is_number
from .copies import RemembersGradients
from .roles import roles_of
from .state import State


class _ComparesGradients(RemembersGradients):
    """What the two have in common: which layers have had two gradients."""

    default_layers = "parameter"
    default_place = "lr"
    scales_rates = True

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return gradients of 0 for the step before the first."""
        none = torch.zeros(len(layers), dtype=torch.bool, device=common_device(layers)[0])
        return {**super().init(layers, device), "compared": none}


@dataclass(frozen=True)
class AdaLip(_ComparesGradients):
    """Rates by how much the gradient changes from one step to the next.

    f_l = L_l(t);  L_l(t) = β L_l(t − 1) + (1 − β) ‖g_l(t − 1)‖ / (‖g_l(t) − g_l(t − 1)‖ + c)

    Start: `LayerwiseLR(optimizer, AdaLip(), model)`. Keep the optimizer's own rate, of SGD without momentum: the
    factors begin at 1.

    L begins at 1. At a layer's first gradient the one before is 0, and f_l is 1 up to there. For plain SGD the ratio
    estimates 1 / (lr · Lipschitz constant). A missing gradient counts as 0. Where both gradients are 0, or one is not
    finite, L stays as it is; at a step that a gradient scaler skips, the whole state does.

    When it helps: its authors report faster training on MNIST and CIFAR, and less dependence on the rate. When not: in
    mini-batches the difference is mostly noise, √2 σ. The factor is then a ratio of signal to noise, so compare with
    the plain optimizer at the mean factor. Costs: a copy of the gradients in the state, in float32 or float64, two more
    during each step, and three passes over them.

    Args:
        beta: β, from 0 to below 1.
        eps: c, at least 0.

    Raises:
        ValueError: An argument is out of its range; or, when attached, parameters are sharded.

    Example:
        >>> from layerwise.statistics import Gradients
        >>> rule, layers = AdaLip(), [Layer("", (torch.zeros(1, dtype=torch.float64),))]
        >>> state = rule.init(layers, torch.device("cpu"))
        >>> for g in (2.0, 1.0, 3.0):
        ...     gradients = Gradients([torch.tensor([g], dtype=torch.float64)])
        ...     factors, state = rule.factors(Statistics(gradients=gradients), state)
        ...     print(f"{factors.item():.10f}")
        1.0000000000
        1.0399999960
        0.9319999963

    Reference:
        Ioannou, Tagaris, Stafylopatis: AdaLip: an adaptive learning rate method per layer for stochastic optimization,
        Neural Processing Letters, 2023, doi 10.1007/s11063-022-11140-w; the constants are its code's.
    """

    beta: float = 0.8
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not (is_number(self.beta) and 0 <= self.beta < 1):
            raise ValueError(f"beta={self.beta!r} must be a number from 0 to below 1, such as 0.8")
        if not (is_number(self.eps) and 0 <= self.eps < math.inf):
            raise ValueError(f"eps={self.eps!r} must be a finite number of at least 0")

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return L = 1 and gradients of 0."""
        device, dtype = common_device(layers)
        return {**super().init(layers, device), "average": torch.ones(len(layers), dtype=dtype, device=device)}

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return L with this step's ratio."""
        previous, difference, new = self.compared(statistics, state)
        ratio = previous / (difference + self.eps)
        average = self.beta * state["average"] + (1 - self.beta) * ratio
        usable = torch.nan_to_num(previous + difference, nan=0.0, posinf=0.0) > 0
        new["average"] = torch.where(usable, average, state["average"])
        new["compared"] = state["compared"] | usable
        return torch.where(state["compared"], new["average"], 1.0), new


@dataclass(frozen=True)
class NoiseAdaptive(_ComparesGradients):
    """Smaller rates for layers with noisier gradients, in the manner of LANTON.

    f_l = √(a_l / max_k a_k);  a_l = α / √(α² + H_l);  H_l ← β H_l + (1 − β) ‖g_l(t) − g_l(t − 1)‖²

    Start: `LayerwiseLR(optimizer, NoiseAdaptive(), model)`. Keep the optimizer's own rate: the factors begin at 1, and
    the least noisy layer of each role keeps it.

    H is 0 up to a layer's second gradient. The maximum is over the layers that are compared and have had a difference;
    the others keep 1. The published method's equations were not at hand: this rule is ours, with the Euclidean norm,
    and no result of the paper is its result.

    A missing gradient counts as 0. Where the gradient before is 0, or one is not finite, H stays as it is; at a step
    that a gradient scaler skips, the whole state does.

    When it helps: no comparison shows that it does. When not: no factor is above 1, so compare with the plain optimizer
    at the mean factor. Costs: a copy of the gradients in the state, in float32 or float64, two more during each step,
    and three passes over them.

    Args:
        alpha: α, the size of a difference that counts as noise, above 0. As H grows, the ratio of two layers tends to
            the fourth root of that of their H, whatever α is.
        beta: β, from 0 to below 1.
        within: What is compared: `"role"` (`roles_of`), `"all"`, or a function from a layer's name to its group.

    Raises:
        TypeError: `within` is neither a string nor a function.
        ValueError: An argument is out of its range; or, when attached, parameters are sharded.

    Example:
        >>> rule = NoiseAdaptive(beta=0, within="all")
        >>> layers = [Layer(name, (torch.zeros(1, dtype=torch.float64),)) for name in "abc"]
        >>> state = rule.init(layers, torch.device("cpu"))
        >>> from layerwise.statistics import Gradients
        >>> for scale in (0.0, 1.0):
        ...     gradients = Gradients([torch.tensor([1 + scale * h**0.5], dtype=torch.float64) for h in (0, 3, 8)])
        ...     factors, state = rule.factors(Statistics(gradients=gradients), state)
        >>> factors
        tensor([1.0000, 0.7071, 0.5774], dtype=torch.float64)

    Reference:
        In the manner of Hao, Gong, Xu, Wang, Liu 2025, arXiv 2510.14009 (LANTON).
    """

    alpha: float = 1.0
    beta: float = 0.9
    within: Literal["role", "all"] | Callable[[str], str] = "role"
    compares_layers = True

    def __post_init__(self) -> None:
        if not (is_number(self.alpha) and 0 < self.alpha < math.inf):
            raise ValueError(f"alpha={self.alpha!r} must be a finite number above 0")
        if not (is_number(self.beta) and 0 <= self.beta < 1):
            raise ValueError(f"beta={self.beta!r} must be a number from 0 to below 1, such as 0.9")
        if not callable(self.within):
            check_choice("within", self.within, ("role", "all"))

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return H = 0, gradients of 0, and which layers are compared."""
        device, dtype = common_device(layers)
        if callable(self.within):
            groups = [self.within(layer.name) for layer in layers]
        else:
            groups = roles_of(layers) if self.within == "role" else [""] * len(layers)
        kinds = list(dict.fromkeys(groups))
        return {
            **super().init(layers, device),
            "noise": torch.zeros(len(layers), dtype=dtype, device=device),
            "_group": torch.tensor([kinds.index(one) for one in groups], dtype=torch.long, device=device),
            "_groups": len(kinds),
            "_included": torch.tensor([layer.included for layer in layers], device=device),
        }

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return the factors with this step's difference in H."""
        previous, difference, new = self.compared(statistics, state)
        squares = difference.square()
        noise = self.beta * state["noise"] + (1 - self.beta) * squares
        usable = (previous > 0) & (squares < math.inf)
        new["noise"] = torch.where(usable, noise, state["noise"])
        new["compared"] = state["compared"] | usable
        quiet = self.alpha / (self.alpha**2 + new["noise"]).sqrt()
        compared = quiet * (state["_included"] & new["compared"])
        largest = quiet.new_zeros(state["_groups"]).scatter_reduce_(0, state["_group"], compared, "amax")
        # Without a difference a is its largest value, 1, so such a layer keeps 1.
        return (quiet / largest.index_select(0, state["_group"])).clamp(max=1).sqrt(), new
