"""You, Gitman, Ginsburg 2017: LARS, and its clipped form LARC."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import is_number
from .elementwise import ElementwiseRule, Value, minimum, where


def one_dimensional(name: str, parameter: Tensor) -> bool:
    """Return whether a parameter is a bias or a gain, which LARS leaves out."""
    return parameter.ndim <= 1


def usable(gradient: Value, weight: Value) -> Any:
    """Return where a trust ratio is used: where ‖g‖ and ‖w‖ are above zero and finite."""
    if isinstance(gradient, Tensor) and isinstance(weight, Tensor):  # NaN stays, and is neither
        return (torch.minimum(gradient, weight) > 0) & (torch.maximum(gradient, weight) < math.inf)
    return 0 < weight < math.inf and 0 < gradient < math.inf


class TrustRatio(ElementwiseRule):
    """What the two have in common: their layers, where they act, and the ranges of η and ε."""

    trust_coefficient: float
    eps: float
    default_layers = "parameter"
    default_place = "gradient"
    default_decay = "scaled"
    default_exclude = staticmethod(one_dimensional)

    def ratio(self, gradient_norm: Value, weight_norm: Value, decay_norm: Value) -> Any:
        """Return η‖w‖ / (‖g‖ + λ‖w‖ + ε)."""
        return self.trust_coefficient * weight_norm / (gradient_norm + decay_norm + self.eps)

    def __post_init__(self) -> None:
        if not (is_number(self.trust_coefficient) and 0 < self.trust_coefficient < math.inf):
            raise ValueError(
                f"trust_coefficient={self.trust_coefficient!r} must be a finite number above 0; the paper's is 0.001"
            )
        if not (is_number(self.eps) and 0 <= self.eps < math.inf):
            raise ValueError(f"eps={self.eps!r} must be a finite number of at least 0")


@dataclass(frozen=True)
class LARS(TrustRatio):
    """Layer-wise adaptive rate scaling.

    f_l = η‖w_l‖ / (‖g_l‖ + λ‖w_l‖ + ε)

    Start: `LayerwiseLR(optimizer, LARS(trust_coefficient=0.1), model)` with `optimizer = SGD(model.parameters(),
    lr=0.05, momentum=0.9)`. A step moves a layer by the share η · lr of its weights: begin at 0.003 to 0.01. With the
    usual η = 0.001 that is an `lr` of 3 to 10, and what is left out needs a group with a rate of its own.

    f_l is 1 where ‖w_l‖ or ‖g_l‖ is zero or not finite. λ is the weight decay of the layer's parameter group. Layers
    are single parameters, and one-dimensional ones (biases, gains of normalisations) are left out; give those a group
    without weight decay, as the method does. The factor acts inside the momentum, on gradient and decay together: `v ←
    μv + f (g + λw)`.

    It was made for SGD with momentum. On Adam and its like it scales steps that are normalised already, and the log
    says so; `Trust` is the rule for those.

    Args:
        trust_coefficient: η, above 0.
        eps: ε, at least 0.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> LARS(trust_coefficient=0.5, eps=0).factor(2.0, 4.0, 0.0)
        1.0

    Reference:
        You, Gitman, Ginsburg: Large batch training of convolutional networks, 2017, arXiv 1708.03888, algorithm 1.
    """

    trust_coefficient: float = 0.001
    eps: float = 1e-8
    needs = ("gradient_norm", "weight_norm", "decay_norm")
    for_sgd = True

    def factor(self, gradient_norm: Value, weight_norm: Value, decay_norm: Value) -> Value:
        """Return the trust ratio."""
        return where(usable(gradient_norm, weight_norm), self.ratio(gradient_norm, weight_norm, decay_norm), 1.0)


@dataclass(frozen=True)
class LARC(TrustRatio):
    """LARS whose layer rate never exceeds the global one.

    λ_l = η‖w_l‖ / (‖g_l‖ + λ‖w_l‖ + ε),  f_l = min(λ_l / lr, 1) if clip else λ_l

    Start: `LayerwiseLR(optimizer, LARC(), model)`. Keep the optimizer's own rate. It is a ceiling: no factor is above
    1.

    λ_l is 1 where a norm is zero (the original then leaves the tensor's decay out too; here the optimizer's own
    behaviour stays). λ is the weight decay of the layer's parameter group. With `clip` the layer's rate is min(λ_l,
    lr), without it lr λ_l. Layers, exclusions and the place are those of `LARS`.

    When it helps: where a rate that suits one layer makes another diverge. A large `lr` leaves the trust ratios as they
    are, a small one makes it plain training. When not: it only lowers rates, so not where plain training is too slow.
    We have not measured it against plain training with intervals; `layerwise compare … --arms larc` does. Costs: one
    pass over gradients and weights. Some factors are 1 and others not, so `torch.compile` of the step makes a graph for
    each way of sharing.

    Args:
        trust_coefficient: η, above 0.
        clip: Whether the layer's rate is min(λ_l, lr) instead of lr λ_l.
        eps: ε, at least 0.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> LARC(trust_coefficient=0.5, eps=0).factor(16.0, 4.0, 0.0, 0.25)
        0.5
        >>> from layerwise import LayerwiseLR
        >>> model = torch.nn.Linear(8, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> adapter = LayerwiseLR(optimizer, LARC(), model)
        >>> with torch.no_grad():
        ...     _, gradient = model.weight.fill_(1), model.bias.fill_(1)
        >>> model(torch.ones(1, 8)).sum().backward()  # both norms of the weight are √8, so λ_l is 0.02
        >>> optimizer.step()
        >>> {name: round(rate, 6) for name, rate in adapter.get_last_lr().items()}
        {'weight': 0.02, 'bias': 0.1}

    Reference:
        You, Gitman, Ginsburg 2017, arXiv 1708.03888 (as `LARS`); the clipped form is that of NVIDIA's apex and Caffe.
    """

    trust_coefficient: float = 0.02
    clip: bool = True
    eps: float = 1e-8
    needs = ("gradient_norm", "weight_norm", "decay_norm", "learning_rate")

    def factor(self, gradient_norm: Value, weight_norm: Value, decay_norm: Value, learning_rate: Value) -> Value:
        """Return the trust ratio, clipped against the rate."""
        ratio = self.ratio(gradient_norm, weight_norm, decay_norm)
        if self.clip:
            ratio = minimum(ratio / learning_rate, 1)
        return where(usable(gradient_norm, weight_norm), ratio, 1.0)
