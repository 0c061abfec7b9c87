"""In the manner of back-matching propagation (Zhang, Chen, Liu 2018): undo the gain of the layers above."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers import Layer, is_one_layer
from ..statistics import Statistics, common_device
from .base import Rule, is_number
from .state import State


@dataclass(frozen=True)
class BackMatching(Rule):
    """Layer-wise rates in the manner of back-matching.

    f_l = ∏_{j above l} 1/s_j,  f_top = 1

    Start: `LayerwiseLR(optimizer, BackMatching(), model, bounds=(0.1, 10))`. Begin at a tenth of the optimizer's own
    rate: the factors of low layers reach the upper bound. No source gives a rate.

    s_j is the factor by which layer j multiplies the squared signal that goes back through it: ‖W_j‖² / n_in for a
    linear layer, ‖W_j‖² / (c_in stride²) for a convolution, the mean over channels of γ²/σ² for a batch normalisation
    (σ² its running variance) and of γ² for a normalisation without running statistics. Each weight layer but the lowest
    carries the activation under it, `activation`, as a further factor. A layer whose gain is zero or not finite, or of
    no such kind, has s = 1.

    The factors grow exponentially with depth: at PyTorch's default initialisation each linear layer above multiplies
    the factor by about 6 n_in / n_out, which for nine layers of one width is 10⁷. Bound them (`bounds=` of
    `LayerwiseLR`); attached without an upper bound to more than two weight layers, the logger `layerwise` warns.

    The paper's exact factors are not public; this derivation from its abstract (least-squares matching of the backward
    signals, W'W ≈ ‖W‖²/n_in I) is ours. Layers count as a chain in the model's order: the sum over the branches of a
    residual block is not followed.

    Args:
        activation: Share of the squared signal that an activation lets back: 1/2 for ReLU, 1 to leave it out.

    Raises:
        ValueError: `activation` is not in (0, 1].

    Example:
        >>> first, second = nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)
        >>> layers = [Layer("a", (first.weight,), module=first), Layer("b", (second.weight,), module=second)]
        >>> rule = BackMatching(activation=0.5)
        >>> statistics = Statistics(matrix_norm=torch.tensor([2.0, 3.0]), normalisation_gain=torch.ones(2))
        >>> rule.factors(statistics, rule.init(layers, torch.device("cpu")))[0]  # 1 / (3² / 3 · 1/2), 1
        tensor([0.6667, 1.0000], dtype=torch.float64)

    Reference:
        After Zhang, Chen, Liu: Train feedforward neural network with layer-wise adaptive rate via approximating
        back-matching propagation, 2018, arXiv 1802.09750.
    """

    activation: float = 0.5
    needs = ("matrix_norm", "normalisation_gain")
    default_layers = "module"
    default_place = "lr"
    default_decay = "scaled"

    def __post_init__(self) -> None:
        if not (is_number(self.activation) and 0 < self.activation <= 1):
            raise ValueError(f"activation={self.activation!r} must be in (0, 1]; 0.5 for ReLU, 1 to leave it out")

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return the constant part of s_j: 1 / (inputs of the weight), times the activation below it."""
        constants: list[float] = []
        weight_below = False
        for layer in layers:
            inputs = summed_inputs(layer)
            constants.append(1.0 if inputs is None else (self.activation if weight_below else 1.0) / inputs)
            weight_below = weight_below or inputs is not None
        return {"_constants": torch.tensor(constants, dtype=common_device(layers)[1], device=device)}

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return the products of 1/s_j over the layers above each one."""
        norm = statistics.matrix_norm
        gain = torch.where(norm > 0, norm.square() * state["_constants"], statistics.normalisation_gain)
        logarithms = torch.where((gain > 0) & (gain < torch.inf), gain, 1.0).log()
        # Over the layers above: the sum from the top down, moved by one.
        from_top = logarithms.flip(0).cumsum(0)
        above = torch.cat([torch.zeros_like(from_top[:1]), from_top[:-1]]).flip(0)
        return above.neg().exp(), state

    def remarks(self, layers: Sequence[Layer]) -> list[str]:
        """Warn of factors without an upper bound on more than two weight layers."""
        count = sum(summed_inputs(layer) is not None for layer in layers)
        if count <= 2:
            return []
        return [
            f"{self!r} on {count} weight layers without an upper bound: its factors are products over the layers above "
            "and grow exponentially with depth, by about 6 n_in / n_out for each linear layer at PyTorch's default "
            "initialisation; pass bounds=(low, high), such as (0.1, 10)"
        ]


def summed_inputs(layer: Layer) -> float | None:
    """Return the n_in of a linear layer, the c_in · stride² of a convolution, None for a layer without a matrix."""
    module = layer.module
    if isinstance(module, nn.modules.conv._ConvNd):
        # A transposed kernel stands at every position of its input, so its stride divides nothing.
        return float(module.in_channels * (1 if module.transposed else math.prod(module.stride)))
    matrices = [p for p in layer.whole() if p.ndim > 1]
    if module is not None and is_one_layer(module):  # the vectors of a graph attention come before its matrix
        matrices.sort(key=lambda p: -p.numel())
    return float(matrices[0].shape[1]) if matrices else None
