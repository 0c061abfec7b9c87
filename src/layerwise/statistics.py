"""The statistics of the layers that a rule gets at a step."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arguments import has_type
from .layers import Layer


@dataclass(frozen=True)
class Gradients:
    """The mini-batch gradients themselves, as they arrived.

    Args:
        tensors: Of each parameter of each layer, in order; None where there is none. Of a parameter that is shared
            among processes, this process's piece.
        scale: The factor by which a gradient scaler left them multiplied, if it did.
        skipped: Above zero when the gradient scaler lets the optimizer skip this step, if it has one.
    """

    tensors: Sequence[Tensor | None]
    scale: Tensor | None = None
    skipped: Tensor | None = None


class Statistics:
    """The statistics of the layers that a rule gets at one step: those in its `needs`, and no others.

    Every tensor but `counts` and the gradients has shape `[n_layers]`, lives on the parameters' device and is float64
    (float32 on devices without float64). Norms are 2-norms over all parameters of the layer together.

    Args:
        gradient_norm: ‖g_l‖ of the mini-batch gradient: after clipping and unscaling, before weight decay and before
            any factor; 0 for a layer without a gradient.
        weight_norm: ‖w_l‖.
        matrix_norm: ‖W_l‖ over the layer's parameters of two or more dimensions: its weight without its bias.
        normalisation_gain: Mean over channels of γ²/σ² for a normalisation layer (σ² its running variance, 1 if it
            keeps none), 1 for every other layer.
        decay_norm: ‖λ w_l‖, the norm of the weight-decay term, with each parameter's own λ.
        learning_rate: The layer's rate in its parameter group (the largest one, where a layer spans several groups).
        counts: Bool scalar: whether this is a step to count. Steps that a gradient scaler skips, steps with a
            gradient that is not finite and steps whose gradients are all zero are not.
        gradients: The gradients, which a rule must not change.

    Raises:
        AttributeError: A statistic is read that was not asked for.
    """

    gradient_norm: Tensor
    weight_norm: Tensor
    matrix_norm: Tensor
    normalisation_gain: Tensor
    decay_norm: Tensor
    learning_rate: Tensor
    counts: Tensor
    gradients: Gradients

    def __init__(self, **statistics: Any) -> None:
        vars(self).update(statistics)

    def __getattr__(self, name: str) -> Any:  # only called for what is not there
        if name in NEEDS:
            raise AttributeError(f"the rule reads statistics.{name} without asking for it; add {name!r} to its needs")
        raise AttributeError(f"there is no statistic {name!r}; there are {', '.join(NEEDS)}")


NEEDS = tuple(Statistics.__annotations__)
NOTHING = Statistics()
"""The statistics for a rule that needs none at this step."""


def check_needs(needs: Collection[str]) -> None:
    """Raise unless `needs` is a collection of names of statistics.

    Raises:
        TypeError: It is one string.
        ValueError: A name is unknown.
    """
    if isinstance(needs, str):
        raise TypeError(f"needs={needs!r} is one string; write needs = ({needs!r},)")
    if not has_type(needs, Collection):
        raise TypeError(f"needs={needs!r} must be a tuple of names, such as ('gradient_norm',)")
    for name in needs:
        if name not in NEEDS:
            raise ValueError(f"needs holds {name!r}; allowed: {', '.join(map(repr, NEEDS))}")


def common_device(layers: Sequence[Layer]) -> tuple[torch.device, torch.dtype]:
    """Return the device of the first parameter and the widest floating type for statistics there."""
    device = layers[0].parameters[0].device
    return device, torch.float32 if device.type == "mps" else torch.float64
