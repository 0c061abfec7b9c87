"""The fixed weights that stand for a layer where not all of them are summed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .buffers import number_count


@dataclass(frozen=True)
class Sample:
    """The weights that stand for one parameter: number k · step mod n of its n weights, for k from 0.

    Args:
        count: How many weights are taken.
        step: Near n/φ (φ the golden ratio) and without a common divisor with n: no weight twice, none of the channels
            or positions in a kernel left out.
    """

    count: int
    step: int

    def of(self, gradient: Tensor, parameter: Tensor) -> Tensor:
        """Return the gradient of these weights; the positions are those in the parameter's memory."""
        if gradient.shape == parameter.shape and gradient.stride() != parameter.stride():
            gradient = torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)
        # The positions are computed anew: kept, they would take as much memory as the sums.
        positions = torch.arange(self.count, device=gradient.device).mul_(self.step).remainder_(gradient.numel())
        dense = gradient if _fills_its_memory(gradient) else gradient.contiguous()
        return dense.as_strided((gradient.numel(),), (1,)).index_select(0, positions)


def samples_of(layer: Sequence[Tensor], most: int | None) -> list[Sample | None]:
    """Return for each parameter of a layer the weights that stand for it; None for all.

    Args:
        layer: Tensors of the parameters' whole shapes.
        most: How many weights stand for the layer, about; None for all.
    """
    total = sum(map(number_count, layer))
    if most is None or total <= most:
        return [None] * len(layer)
    samples: list[Sample | None] = []
    for numbers in map(number_count, layer):
        step = max(1, round(numbers * (math.sqrt(5) - 1) / 2))
        while math.gcd(step, numbers) > 1:
            step += 1
        samples.append(Sample(min(numbers, max(1, round(most * numbers / total))), step))
    return samples


def _fills_its_memory(tensor: Tensor) -> bool:
    """Tell whether a tensor has no gaps."""
    return tensor.is_contiguous() or (
        sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        == tensor.numel()
    )
