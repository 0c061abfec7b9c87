"""What a rule is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..layers import Exclusion, Layer, LayerSpecification
from ..statistics import Statistics

State = dict[str, Any]
"""A rule's memory: a dictionary of tensors and plain numbers, so that `torch.load(weights_only=True)` reads it.

An entry whose name begins with an underscore follows from the rule's arguments; it is neither saved nor loaded.
"""


class Rule(ABC):
    """A map from the layers' statistics to one factor a layer.

    A rule is pure: it keeps nothing but what it returns as state, reads no tensor's value and works on tensors of shape
    `[n_layers]` on the parameters' device. A factor that is not finite acts as 1, so that a layer with a zero or broken
    gradient does what the optimizer alone would do. A negative one is not refused: that layer goes up its gradient.

    The class attributes say what `"auto"` means for the rule in `LayerwiseLR`; None leaves it to the others of a
    `chain`.

    * `needs`: names of the statistics it reads (fields of `layerwise.statistics.Statistics`).
    * `default_layers`: `"module"` or `"parameter"`.
    * `default_place`: `"gradient"` when the method multiplies the gradient (inside momentum), `"lr"` when the rate.
    * `default_decay`: whether the method's factor multiplies coupled weight decay too: `"scaled"` or `"plain"`.
    * `default_exclude`: layers that the method leaves out: None, patterns or a callable `(name, parameter) -> bool`.
    * `own_layer`: whether a layer's factor needs the statistics of no other layer, and the state stays as it is but at
      the ends of epochs. Then it can be computed before the other layers' gradients exist, by `step_in_backward`.
    * `compares_layers`: whether a layer's factor depends on what other layers there are, so that it must see those of
      all processes; None for the opposite of `own_layer`.

    Example:
        >>> class InverseNorm(Rule):
        ...     '''f_l = 1 / ‖g_l‖.'''
        ...     def factors(self, statistics, state):
        ...         return 1 / statistics.gradient_norm, state
        >>> factors, _ = InverseNorm().factors(Statistics(gradient_norm=torch.tensor([0.5, 2.0])), {})
        >>> factors
        tensor([2.0000, 0.5000])
    """

    needs: Collection[str] = ("gradient_norm",)
    default_layers: ClassVar[LayerSpecification | None] = None
    default_place: ClassVar[Literal["gradient", "lr"] | None] = None
    default_decay: ClassVar[Literal["scaled", "plain"] | None] = None
    default_exclude: ClassVar[Exclusion] = None
    own_layer: bool = False
    compares_layers: bool | None = None

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return the state before the first step, with every entry that it is to have: files are loaded into these.

        Args:
            layers: The layers, in order.
            device: Where the factors are used.
        """
        return {}

    @abstractmethod
    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return this step's factors, shape `[n_layers]`, and the new state.

        Returning the same tensor object again says that the factors have not changed: they are then read only once.
        """

    def end_epoch(self, state: State) -> State:
        """Return the state for the next epoch."""
        return state


def finite_or_one(factors: Tensor) -> Tensor:
    """Return the factors with 1 for each that is not finite."""
    return torch.nan_to_num(factors, nan=1.0, posinf=1.0, neginf=1.0)


def is_number(value: object) -> bool:
    """Tell whether an argument is an int or a float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)
