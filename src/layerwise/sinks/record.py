"""The record that a monitor hands to its sinks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

ROOT = "root"
"""The name in charts of the root module's layer, whose own name is `""`."""


@dataclass(frozen=True)
class Record:
    """The numbers of one step: for each quantity one number per layer, in the order of `layers`.

    Norms are 2-norms over all parameters of the layer together. Non-finite values are kept.

    Args:
        step: Number of steps taken, this one included.
        layers: The layers' names; `""` is the root module.
        gradient_norm: ‖g_l‖ as it arrived at `step()`: after clipping and unscaling, before any factor; 0 without one.
        weight_norm: ‖w_l‖ before the step.
        update_norm: ‖w_l after − w_l before‖.
        factor: f_l, the product over all adapters of the factor of the layer's first parameter; 1 without adapters.
        lr: The rate of the parameter group of the layer's first parameter, times f_l; NaN if the group has none.
        update_ratio: `update_norm / weight_norm`; 0 where both are 0.

    Example:
        >>> record = Record(50, ("conv",), [0.5], [2.0], [0.01], [1.5], [0.15], [0.005])
        >>> dict(record.scalars())["layerwise/lr/conv"]
        0.15
        >>> print(record)
        step 50
        layer     gradient norm   weight norm   update norm        factor            lr  update ratio
        conv                0.5             2          0.01           1.5          0.15         0.005
    """

    step: int
    layers: tuple[str, ...]
    gradient_norm: list[float]
    weight_norm: list[float]
    update_norm: list[float]
    factor: list[float]
    lr: list[float]
    update_ratio: list[float]

    def scalars(self, legal: Callable[[str], str] = str) -> Iterator[tuple[str, float]]:
        """Yield every number with the name of its chart, `layerwise/QUANTITY/LAYER`.

        Args:
            legal: Converts a layer's name to one that a service accepts; names that become equal get a number.
        """
        names = distinct(legal(layer or ROOT) for layer in self.layers)
        for quantity in QUANTITIES:
            for name, value in zip(names, getattr(self, quantity), strict=True):
                yield f"layerwise/{quantity}/{name}", value

    def __str__(self) -> str:
        width = max([9, *map(len, self.layers)])
        columns = [getattr(self, quantity) for quantity in QUANTITIES]
        lines = [f"{'layer':<{width}} " + " ".join(f"{quantity.replace('_', ' '):>13}" for quantity in QUANTITIES)]
        for layer, *values in zip(self.layers, *columns, strict=True):
            lines.append(f"{layer or ROOT:<{width}} " + " ".join(f"{value:>13.4g}" for value in values))
        return "\n".join([f"step {self.step}", *lines])


QUANTITIES = tuple(name for name in Record.__annotations__ if name not in ("step", "layers"))
"""The quantities that are recorded for each layer."""


def ratio(update: float, weight: float) -> float:
    """Return update / weight, 0 for 0 / 0 and infinity for other updates of a weight of 0."""
    if weight == 0:
        return 0.0 if update == 0 else update * math.inf
    return update / weight


def distinct(names: Iterable[str]) -> list[str]:
    """Return the names, with a number added to those that came before.

    Example:
        >>> distinct(["a", "b", "a", "a"])
        ['a', 'b', 'a_2', 'a_3']
    """
    result: dict[str, None] = {}
    for name in names:
        candidate, number = name, 1
        while candidate in result:
            number += 1
            candidate = f"{name}_{number}"
        result[candidate] = None
    return list(result)
