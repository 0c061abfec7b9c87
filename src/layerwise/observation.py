"""What one recorded step began with, and the record that is made of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .calls import Member
from .factors import Factors
from .layer_statistics import LayerStatistics
from .norms import subtract
from .sharding import settled_gradient
from .sinks.record import Record, ratio
from .tensors import local

Values = Tensor | list[float]
"""What may be on the device, or is known without asking it."""


@dataclass
class Observation:
    """What a step that is recorded began with.

    Args:
        statistics: Of the layers.
        squares: Of gradients and weights, as `LayerStatistics.squares` returns them.
        weights: Copies of the parameters.
        acting: Of each adapter its factors, and id of parameter to layer number.
        rates: Of each parameter group; NaN where it has none.
        group_of: id of parameter to group number.
        scale: By how much a gradient scaler left the gradients multiplied, if it did.
    """

    statistics: LayerStatistics
    squares: list[Tensor]
    weights: list[Tensor]
    acting: list[tuple[Factors, dict[int, int]]]
    rates: list[Values]
    group_of: dict[int, int]
    scale: Tensor | None

    @classmethod
    def of(cls, statistics: LayerStatistics, optimizer: Any, measured: Sequence[Member]) -> Observation:
        """Measure gradients and weights, and keep a copy of the weights.

        Args:
            statistics: Of the layers.
            optimizer: The optimizer whose step begins.
            measured: Those whose factors are about to act.
        """
        members, groups = statistics.members, optimizer.param_groups
        gradients = [None if (g := settled_gradient(p)) is None else g.detach() for p in members]
        return cls(
            statistics=statistics,
            squares=[statistics.squares(gradients), statistics.squares(members)],
            weights=[local(p).clone() for p in members],
            acting=[
                (
                    member.factors,
                    {id(p): number for number, layer in enumerate(member.layers) for p in layer.parameters},
                )
                for member in measured
                if member.factors is not None
            ],
            rates=[_rate_of(group.get("lr")) for group in groups],
            group_of={id(p): number for number, group in enumerate(groups) for p in group["params"]},
            scale=getattr(optimizer, "grad_scale", None),
        )

    def values(self) -> list[Tensor | Sequence[float] | None]:
        """Measure the updates, once, and return all that `record` needs: the layers' norms and more."""
        updates = subtract(self.weights, [local(p) for p in self.statistics.members])
        norms = self.statistics.norms([*self.squares, self.statistics.squares(updates)])
        factors = [one.tensor if one.numbers is None else one.numbers for one, _ in self.acting]
        return [norms, self.scale, *self.rates, *factors]

    def record(self, step: int, numbers: Sequence[Sequence[float]]) -> Record:
        """Return the record.

        Args:
            step: Number of steps that have been taken.
            numbers: What `values` returned, read from the device.
        """
        norms, (scale,), *others = numbers
        rates, factors = others[: len(self.rates)], others[len(self.rates) :]
        layers = self.statistics.layers
        first = [id(layer.parameters[0]) for layer in layers]
        count = len(first)
        scaled, weights, updates = (list(norms[i : i + count]) for i in range(0, 3 * count, count))
        products = [1.0] * count
        for one, (_, layer_of) in zip(factors, self.acting, strict=True):
            products = [f * one[layer_of[p]] if p in layer_of else f for f, p in zip(products, first, strict=True)]
        base = [rates[self.group_of[p]][0] if p in self.group_of else math.nan for p in first]
        return Record(
            step=step,
            layers=tuple(layer.name for layer in layers),
            gradient_norm=[norm / (scale or 1.0) for norm in scaled],
            weight_norm=weights,
            update_norm=updates,
            factor=products,
            lr=[rate * factor for rate, factor in zip(base, products, strict=True)],
            update_ratio=list(map(ratio, updates, weights)),
        )


def _rate_of(rate: Any) -> Values:
    return rate if isinstance(rate, Tensor) else [math.nan if rate is None else float(rate)]
