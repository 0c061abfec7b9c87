"""Singh et al. 2015: a rate for each layer from its current gradient alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .base import is_number
from .elementwise import ElementwiseRule, Value, log1p


@dataclass(frozen=True)
class LayerAdaptive(ElementwiseRule):
    """Layer-specific adaptive learning rates.

    f_l = 1 + log(1 + 1/‖g_l‖)

    Start: `LayerwiseLR(optimizer, LayerAdaptive(), model)` with `optimizer = SGD(model.parameters(), lr=0.006,
    momentum=0.9)`. The paper takes 0.006 on ImageNet, where SGD has 0.01, and keeps 0.01 on MNIST, where the factors
    are 2.5 on average.

    ‖g_l‖ is the 2-norm of the mini-batch gradient of all the layer's parameters together (weight and bias), without
    weight decay. The factor is above 1 always, and large where the gradient is small: in flat regions and low layers.
    It is not scale-free: a loss summed over the batch instead of averaged gives other factors.

    A zero or non-finite norm gives 1.

    Args:
        log_base: Base of the logarithm. The paper writes "log"; its engine's language and its Table I agree with the
            natural one, and do not exclude 10.

    Raises:
        ValueError: `log_base` is not a finite number above 1.

    Example:
        >>> [round(LayerAdaptive().factor(norm), 4) for norm in (0.1, 1.0, 10.0)]
        [3.3979, 1.6931, 1.0953]

    Reference:
        Singh, De, Zhang, Goldstein, Taylor: Layer-specific adaptive learning rates for deep networks, ICMLA 2015,
        arXiv 1510.04609, equations 9, 10 and 12. The second line of equation 10 prints the rate twice; read with
        equation 9 the factor is single.
    """

    log_base: float = math.e
    needs = ("gradient_norm",)
    default_layers = "module"
    default_place = "gradient"
    default_decay = "scaled"

    def __post_init__(self) -> None:
        if not (is_number(self.log_base) and 1 < self.log_base < math.inf):
            raise ValueError(f"log_base={self.log_base!r} must be a finite number above 1, such as math.e or 10")

    def factor(self, gradient_norm: Value) -> Value:
        """Return 1 + log(1 + 1/‖g_l‖); equation 9."""
        logarithm = log1p(1 / gradient_norm)
        if self.log_base != math.e:
            logarithm = logarithm / math.log(self.log_base)
        return 1 + logarithm
