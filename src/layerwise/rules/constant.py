"""Fixed factors, as permanent parameter groups would have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from .._arguments import has_type
from ..layers import Layer, check_patterns, matches
from ..statistics import Statistics, common_device
from .base import Rule, is_number
from .state import State


def check_factor(factor: object, where: str) -> float:
    """Return a factor that is a finite number of at least 0, else raise a ValueError."""
    if not (is_number(factor) and 0 <= cast(float, factor) < math.inf):
        raise ValueError(f"{where}: factor {factor!r} must be a finite number of at least 0")
    return float(cast(float, factor))


@dataclass(frozen=True)
class Constant(Rule):
    """The same factors at every step.

    f_l = the factor of the first pattern that matches the layer's name, 1 where none does.

    Start: `LayerwiseLR(optimizer, Constant({"head*": 10}), model)`. Keep the optimizer's own rate, which is that of
    layers of factor 1.

    0 freezes a layer under `"lr"` and `"update"`; under `"gradient"` its momentum and decay go on. `adapter.detach()`
    ends it. The factors do what a parameter group for each layer does, whose rate is f · lr.

    When it helps: a larger rate for a new head on a pretrained body, a smaller one for embeddings, freezing for a
    while, and as a control: a method's mean factor for each layer, held fixed. When not: to freeze layers for good
    `requires_grad_(False)` is better, since gradients of frozen layers are still computed here. Costs: nothing but the
    groups.

    Args:
        factors_by_pattern: fnmatch pattern of layer names to factor, at least 0. 0 freezes a layer under
            `"lr"` and `"update"`; under `"gradient"` its momentum and decay go on.

    Raises:
        TypeError: It is no mapping.
        ValueError: It is empty, a factor is out of its range, or (when attached) a pattern matches no layer.

    Example:
        >>> from layerwise import LayerwiseLR
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> adapter = LayerwiseLR(optimizer, Constant({"0": 0, "2": 10}), model)
        >>> before = model[0].weight.detach().clone()
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> adapter.get_last_factors()
        {'0': 0.0, '1': 1.0, '2': 10.0}
        >>> torch.equal(model[0].weight, before)  # it is frozen
        True
    """

    factors_by_pattern: Mapping[str, float]
    needs = ()
    default_place = "lr"
    own_layer = True

    def __post_init__(self) -> None:
        if not has_type(self.factors_by_pattern, Mapping):
            raise TypeError(f"Constant takes a mapping of pattern to factor, not {self.factors_by_pattern!r}")
        if not self.factors_by_pattern:
            raise ValueError("Constant({}) changes no layer; give at least one pattern, such as {'conv*': 0.1}")
        for pattern, factor in self.factors_by_pattern.items():
            check_factor(factor, f"Constant pattern {pattern!r}")

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return the factors as a tensor."""
        names = [layer.name for layer in layers]
        check_patterns(self.factors_by_pattern, names, "Constant")
        values = [next((f for p, f in self.factors_by_pattern.items() if matches(name, p)), 1.0) for name in names]
        return fixed_factors(layers, values)

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return the tensor made by `init`."""
        return state["_factors"], state


def fixed_factors(layers: Sequence[Layer], values: Sequence[float]) -> State:
    """Return the state of a rule whose factors never change."""
    device, dtype = common_device(layers)
    return {"_factors": torch.tensor(values, dtype=dtype, device=device)}
