"""In the manner of back-matching propagation (Zhang, Chen, Liu 2018)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .norms import joint_norm


@dataclass(frozen=True)
class Dense:
    """A linear layer; its weight has shape [outputs, inputs]."""

    weight: np.ndarray


@dataclass(frozen=True)
class Convolution:
    """A convolution; its weight has shape [outputs, inputs / groups, …]."""

    weight: np.ndarray
    stride: tuple[int, ...]
    groups: int = 1


@dataclass(frozen=True)
class TransposedConvolution:
    """A transposed convolution; its weight has shape [inputs, outputs / groups, …]."""

    weight: np.ndarray


@dataclass(frozen=True)
class Normalisation:
    """A normalisation with one γ a channel, and the running variance if it keeps one."""

    gain: np.ndarray
    variance: np.ndarray | None = None
    eps: float = 1e-5


@dataclass(frozen=True)
class Other:
    """A layer that lets the signal back as it is."""


Kind = Dense | Convolution | TransposedConvolution | Normalisation | Other


def back_matching(layers: Sequence[Kind], activation: float = 0.5) -> np.ndarray:
    """Return the layers' factors in a chain.

    f_l = ∏_{j above l} 1/s_j,  f_top = 1

    s_j is the gain of the squared signal on its way back through layer j. With W the matrix from all inputs
    to all outputs and W'W ≈ (‖W‖² / n_in) I it is ‖W‖² / n_in. In a convolution of stride s the kernel stands
    at one output position for every s² input positions, so there it is ‖kernel‖² / (c_in s²); in a transposed
    one it stands at every input position: ‖kernel‖² / c_in. A normalisation is the diagonal matrix γ/σ. An
    activation lies between each weight layer and the weight layer below it. A gain of zero, or one that is
    not finite, counts as 1.

    Args:
        layers: The layers from the input to the output.
        activation: The gain of an activation: 1/2 for ReLU.

    Returns:
        One factor a layer.

    Example:
        >>> back_matching([Dense(np.eye(3)), Dense(3 * np.eye(3))]).round(6)  # 1 / (9 · 1/2), 1
        array([0.222222, 1.      ])

    Reference:
        After Zhang, Chen, Liu: Train feedforward neural network with layer-wise adaptive rate via
        approximating back-matching propagation, 2018, arXiv 1802.09750. The paper's own factors are not
        public.
    """
    gains: list[float] = []
    weight_layer_below = False
    for layer in layers:
        gain = _gain(layer)
        if isinstance(layer, Dense | Convolution | TransposedConvolution):
            if weight_layer_below and gain != 0:
                gain *= activation
            weight_layer_below = True
        gains.append(gain if gain != 0 and math.isfinite(gain) else 1.0)
    factors: list[float] = []
    for position in range(len(layers)):
        factor = 1.0
        for gain in gains[position + 1 :]:
            factor *= 1 / gain
        factors.append(factor)
    return np.array(factors)


def _gain(layer: Kind) -> float:
    if isinstance(layer, Dense):
        return joint_norm([layer.weight]) ** 2 / layer.weight.shape[1]
    if isinstance(layer, Convolution):
        positions = 1
        for step in layer.stride:
            positions *= step
        return joint_norm([layer.weight]) ** 2 / (layer.weight.shape[1] * layer.groups * positions)
    if isinstance(layer, TransposedConvolution):
        return joint_norm([layer.weight]) ** 2 / layer.weight.shape[0]
    if isinstance(layer, Normalisation):
        squares: list[float] = []
        for channel, gamma in enumerate(layer.gain.tolist()):
            variance = 1.0 if layer.variance is None else float(layer.variance[channel]) + layer.eps
            squares.append(gamma**2 / variance)
        return sum(squares) / len(squares)
    return 1.0
