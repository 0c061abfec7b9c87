"""What a rule is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeGuard, cast

import torch
from torch import Tensor

from ..layers import Exclusion, Layer, LayerSpecification
from ..optimizers import PLACES, PlaceName
from ..statistics import Statistics
from .state import State, carried_over, loaded


class Selection(NamedTuple):
    """What is known of one layer: its measured value, how many σ that is from the mean, and whether it was chosen.

    `value` and `z` are NaN where nothing has been measured.
    """

    value: float
    z: float
    selected: bool


class Rule(ABC):
    """A map from the layers' statistics to one factor a layer.

    A rule is pure: it keeps nothing but what it returns as state, reads no tensor's value and works on tensors of shape
    `[n_layers]` on the parameters' device. A factor that is not finite acts as 1, so that a layer whose gradient is
    zero or non-finite does what the optimizer alone would do. A negative one is not refused: that layer goes up its
    gradient.

    The class attributes say what `"auto"` means for the rule in `LayerwiseLR`; None leaves it to the others of a
    `chain`.

    * `needs`: names of the statistics it reads (fields of `layerwise.statistics.Statistics`).
    * `default_layers`: `"module"`, `"parameter"` or `"unit"`.
    * `default_place`: `"gradient"` when the method multiplies the gradient (inside momentum), `"lr"` when the rate.
    * `default_decay`: whether the method's factor multiplies coupled weight decay too: `"scaled"` or `"plain"`.
    * `default_exclude`: layers that the method leaves out: None, patterns or a callable `(name, parameter) -> bool`.
    * `places`: where the factors may act; others are refused.
    * `clips`: whether the factor is 1 but at single steps, so that on the gradient it acts under any optimizer.
    * `needs_scale`: whether the method means nothing on an optimizer that divides by the size of its gradients, as Adam
      does; `"auto"` then refuses it there.
    * `scales_rates`: whether the method scales rates, so that on the gradient of such an optimizer, which would divide
      its factors out again, it is refused.
    * `for_sgd`: whether the method was made for optimizers that do not divide so; elsewhere the log says it.
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
    places: Sequence[PlaceName] = PLACES
    clips: bool = False
    needs_scale: bool = False
    scales_rates: bool = False
    for_sgd: bool = False
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

    # --- What few rules override ----------------------------------------------------------------------------------

    def asks(self, state: State) -> bool:
        """Return whether `factors` reads statistics at this step."""
        return True

    def load(self, saved: Any, state: State) -> State:
        """Return the state with the saved one in place of its entries, after a check of its form."""
        return loaded(saved, state, "state")

    def derived(self, state: State) -> State:
        """Return the state with the entries that follow from the others computed again."""
        return state

    def counts_epochs(self) -> bool:
        """Return whether the rule does something at the ends of epochs."""
        return type(self).end_epoch is not Rule.end_epoch

    @property
    def measures_early(self) -> bool:
        """Whether it measures a layer for the first time in the first steps only, in which it must have a gradient."""
        return False

    def trained(self, state: State) -> Sequence[bool] | None:
        """Return which layers are trained, for a rule that also sets `requires_grad`; None for other rules."""
        return None

    def get_selection(self, state: State) -> list[Selection] | None:
        """Return the last choice of a rule that chooses layers, one entry a layer; None for other rules."""
        return None

    def remarks(self, layers: Sequence[Layer]) -> list[str]:
        """Return warnings for the log when the rule is attached to these layers."""
        return []

    def doubts(self, layers: Sequence[Layer]) -> list[str]:
        """Return reasons why the rule may read the layers' names wrongly."""
        return []

    def table(self, layers: Sequence[Layer]) -> list[str]:
        """Return the lines of a table that `diagnose` prints."""
        return []

    # --- What follows ---------------------------------------------------------------------------------------------

    @property
    def rule_kind(self) -> str:
        """The name of the rule without its arguments; a state loads only into a rule of the same kind."""
        return type(self).__name__

    def needs_own_layer_only(self) -> bool:
        """Return whether a layer's factor needs the statistics of no other layer."""
        return self.own_layer

    def takes_units(self) -> bool:
        """Return whether a factor may be that of one row of a parameter, for `layers="unit"`."""
        return False

    def depends_on_other_layers(self) -> bool:
        """Return whether a layer's factor depends on which other layers there are, or on their statistics."""
        return not self.needs_own_layer_only() if self.compares_layers is None else self.compares_layers

    def renewed(self, layers: Sequence[Layer], device: torch.device, state: State, old_names: Sequence[str]) -> State:
        """Return the state for new layers, which keeps the values of layers of the old names that are still there."""
        names = [layer.name for layer in layers]
        return self.derived(carried_over(self.init(layers, device), state, names, old_names))


def check_rule(rule: Any) -> Rule:
    """Return the rule; raise a TypeError if it is a class, or its class does not derive from `Rule`."""
    if isinstance(rule, type):
        raise TypeError(f"rule={rule.__name__} is a class; call it: {rule.__name__}(…)")
    if not isinstance(rule, Rule):
        by_name = f"attach a name with layerwise.attach(optimizer, {rule!r}, model), " if isinstance(rule, str) else ""
        raise TypeError(
            f"rule={rule!r} ({type(rule).__name__}) is not a layerwise.rules.Rule; {by_name}pass one of "
            "layerwise.rules, or an object of a class that derives from layerwise.rules.Rule and has a method "
            "factors(statistics, state)"
        )
    return rule


def is_pair(result: object) -> TypeGuard[tuple[Any, Any]]:
    """Return whether a rule's `factors` returned two values, as it must."""
    return isinstance(result, tuple) and len(cast("tuple[object, ...]", result)) == 2


def finite_or_one(factors: Tensor) -> Tensor:
    """Return the factors with 1 for each that is not finite."""
    return torch.nan_to_num(factors, nan=1.0, posinf=1.0, neginf=1.0)


def shown(names: Sequence[str]) -> str:
    """Return names for a table's line: of more than two, the first, the last and how many there are.

    Example:
        >>> shown(["a", "b", "c"])
        'a, … c (3)'
    """
    return ", ".join(names) if len(names) < 3 else f"{names[0]}, … {names[-1]} ({len(names)})"


def is_number(value: object) -> bool:
    """Return whether an argument is an int or a float, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)
