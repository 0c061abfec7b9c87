"""Clipping of gradients: of layers or rows by their weights (AGC), of layers by their own history (AdaGC)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._arguments import check_count
from ..layers import Layer
from ..statistics import Statistics, common_device
from .base import Rule, is_number
from .elementwise import ElementwiseRule, Value, minimum, where
from .roles import roles_of
from .state import State


@dataclass(frozen=True)
class AGC(ElementwiseRule):
    """Adaptive gradient clipping, of rows or of whole tensors.

    f_l = min(1, clip · max(‖w_l‖, eps) / ‖g_l‖)

    Start: `LayerwiseLR(optimizer, AGC(), model, layers="unit", exclude=["head*"])`. `exclude` names the classifier,
    which the method leaves out. It stands in place of a clipping of the global norm. Keep the optimizer's own rate: the
    factor is 1 but where gradients are large.

    It acts on the gradient, before decay and momentum. With `layers="unit"`, as in the paper, each row of weights has a
    factor: each output of a linear layer, each channel of a convolution; a bias or a gain is one unit. Without it
    layers are single parameters, which may be sharded, and step in backward.

    When it helps: networks without normalisation, at large batches and rates, for which it was made. When not: too
    small a `clip` holds every layer back at every step, which is a smaller rate. Costs: one pass over gradients and
    weights. With `layers="unit"` one more over the gradients, on the CPU only over tensors with a clipped row; on an
    accelerator three launches for each tensor of two or more dimensions.

    Args:
        clip: The largest ratio of gradient to weights, above 0; the authors' code has 0.01 for batches of 4,096, and
            more for smaller ones.
        eps: The least norm of weights that counts, so that weights that begin at zero move.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> [round(AGC().factor(gradient, 10.0), 6) for gradient in (0.05, 0.4)]
        [1, 0.25]

    Reference:
        Brock, De, Smith, Simonyan: High-performance large-scale image recognition without normalization, 2021, arXiv
        2102.06171, equation 3.
    """

    clip: float = 0.01
    eps: float = 1e-3
    needs = ("gradient_norm", "weight_norm")
    default_layers = "parameter"
    default_place = "gradient"
    default_decay = "plain"
    places = ("gradient",)
    clips = True

    def __post_init__(self) -> None:
        for name, value in (("clip", self.clip), ("eps", self.eps)):
            if not (is_number(value) and 0 < value < math.inf):
                raise ValueError(f"{name}={value!r} must be a finite number above 0")

    def factor(self, gradient_norm: Value, weight_norm: Value) -> Value:
        """Return 1, or what shortens the gradient to the largest ratio."""
        least = weight_norm.clamp(min=self.eps) if isinstance(weight_norm, Tensor) else max(weight_norm, self.eps)
        return where(gradient_norm < math.inf, minimum(self.clip * least / gradient_norm, 1), 1.0)

    def remarks(self, layers: Sequence[Layer]) -> list[str]:
        """Return a remark that names a head that is not excluded."""
        roles = zip(layers, roles_of(layers), strict=True)
        heads = [layer.name for layer, role in roles if role == "head" and layer.included]
        return [f"AGC leaves the classifier out: pass exclude=[{heads[0]!r}, …] if that is one"] if heads else []


@dataclass(frozen=True)
class AdaGC(Rule):
    """Clipping of each layer's gradient by a moving average of its own norm.

    f_l = min(1, relative · γ_l / ‖g_l‖);  γ_l ← β γ_l + (1 − β) f_l ‖g_l‖

    Start: `LayerwiseLR(optimizer, AdaGC(), model)`. It stands in place of a clipping of the global norm. Keep the
    optimizer's own rate: the factor is 1 but at spikes.

    Before step `warmup`, and at a layer's first gradient, the factor is that of a clipping of the global norm, min(1,
    absolute / ‖g‖), and γ_l is the smallest clipped norm of the layer so far. Excluded layers and those with non-finite
    gradients are left out of ‖g‖. It acts on the gradient of any optimizer. Layers are single parameters. Steps with
    zero or non-finite gradients do not count.

    When it helps: against spikes of single layers. When not: γ_l grows by at most 0.1 % a step, so that after a lasting
    rise of its gradients a layer is held back for long. Costs: one pass over the gradients, and one number a layer.

    Args:
        relative: The largest norm relative to γ_l.
        beta: β, from 0 to below 1.
        absolute: The largest global norm in the first steps.
        warmup: The first step, counted from 1, whose gradients are clipped by γ.

    Raises:
        TypeError: `warmup` is no whole number.
        ValueError: An argument is out of its range.

    Example:
        >>> rule, layers = AdaGC(warmup=1, absolute=10), [Layer("", (torch.zeros(4),))]
        >>> state = rule.init(layers, torch.device("cpu"))
        >>> for norm in (2.0, 1.0, 10.0):
        ...     statistics = Statistics(gradient_norm=torch.tensor([norm]), counts=torch.tensor(True))
        ...     factors, state = rule.factors(statistics, state)
        ...     print(f"{factors.item():.4f}")
        1.0000
        1.0000
        0.2079

    Reference:
        AdaGC, 2025, arXiv 2502.11034; the formulas are those of the code of pytorch-optimizer 4.1.
    """

    relative: float = 1.05
    beta: float = 0.98
    absolute: float = 1.0
    warmup: int = 100
    needs = ("gradient_norm", "counts")
    default_layers = "parameter"
    default_place = "gradient"
    default_decay = "plain"
    places = ("gradient",)
    clips = True

    def __post_init__(self) -> None:
        check_count("warmup", self.warmup)
        for name, value in (("relative", self.relative), ("absolute", self.absolute)):
            if not (is_number(value) and 0 < value < math.inf):
                raise ValueError(f"{name}={value!r} must be a finite number above 0")
        if not (is_number(self.beta) and 0 <= self.beta < 1):
            raise ValueError(f"beta={self.beta!r} must be a number from 0 to below 1, such as 0.98")

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return γ, which is infinite before a layer's first gradient, and the number of steps that have counted."""
        device, dtype = common_device(layers)
        return {
            "average": torch.full((len(layers),), math.inf, dtype=dtype, device=device),
            "steps": torch.zeros((), dtype=torch.long, device=device),
            "_included": torch.tensor([layer.included for layer in layers], device=device),
        }

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return the factors, with this step's clipped norms in γ."""
        norm, average, counts = statistics.gradient_norm, state["average"], statistics.counts
        early = (state["steps"] + 1 < self.warmup) | (average == math.inf)
        global_norm = torch.where(state["_included"] & (norm < math.inf), norm, 0.0).square().sum().sqrt()
        clipped_all = (self.absolute / global_norm).clamp(max=1).expand_as(norm)
        factors = torch.where(early, clipped_all, (self.relative * average / norm).clamp(max=1))
        clipped = factors * norm
        moved = torch.where(early, torch.minimum(average, clipped), self.beta * average + (1 - self.beta) * clipped)
        average = torch.where(counts & (norm > 0), moved, average)
        new = {**state, "average": average, "steps": state["steps"] + counts}
        return torch.where(norm < math.inf, factors, 1.0), new
