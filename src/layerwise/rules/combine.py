"""Rules made of rules: their product, and a rule between bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._arguments import has_type
from .._tensors import moved
from ..layers import Layer
from ..statistics import Statistics
from .base import Rule, State, finite_or_one
from .questions import (
    check_rule,
    compares_layers,
    default,
    derived_state,
    doubts_of,
    ended_state,
    get_selection,
    initial_state,
    load_state,
    needs_of,
    own_layer,
    remarks_of,
    table_of,
)
from .selection import Selection
from .state import is_state, kind_of


class _Combined(Rule):
    """A rule made of others: it needs what they need, and prefers what the first of them with a preference prefers."""

    def __init__(self, *rules: Any) -> None:
        self.rules = tuple(check_rule(rule) for rule in rules)
        self.needs = tuple(dict.fromkeys(name for rule in rules for name in needs_of(rule)))
        for name in ("layers", "place", "decay", "exclude"):
            preferences = (default(rule, name) for rule in rules)
            setattr(self, f"default_{name}", next((p for p in preferences if p is not None), None))
        self.own_layer = all(map(own_layer, rules))
        self.compares_layers = any(map(compares_layers, rules))

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return the rules' states, by position."""
        return {str(i): initial_state(rule, layers, device) for i, rule in enumerate(self.rules)}

    def _each(self, statistics: Statistics, state: State) -> tuple[list[Tensor], State]:
        results = [rule.factors(statistics, state[str(i)]) for i, rule in enumerate(self.rules)]
        return [factors for factors, _ in results], {str(i): new for i, (_, new) in enumerate(results)}

    def end_epoch(self, state: State) -> State:
        """Return the rules' states for the next epoch."""
        return {str(i): ended_state(rule, state[str(i)]) for i, rule in enumerate(self.rules)}

    def load(self, saved: State, state: State) -> State:
        """Return the rules' states with what was saved."""
        if not is_state(saved) or sorted(saved) != sorted(state):
            raise ValueError(f"the file does not hold a state for each of the {len(self.rules)} rules; attach the same")
        return {str(i): load_state(rule, saved[str(i)], state[str(i)]) for i, rule in enumerate(self.rules)}

    def derived(self, state: State) -> State:
        """Return the rules' states with what follows from the rest of each."""
        return {str(i): derived_state(rule, state[str(i)]) for i, rule in enumerate(self.rules)}

    def remarks(self, layers: Sequence[Layer]) -> list[str]:
        """Return what a person should know of each rule."""
        return [remark for rule in self.rules for remark in remarks_of(rule, layers)]

    def doubts(self, layers: Sequence[Layer]) -> list[str]:
        """Return in what each rule may be wrong about the layers."""
        return [doubt for rule in self.rules for doubt in doubts_of(rule, layers)]

    def table(self, layers: Sequence[Layer]) -> list[str]:
        """Return the rules' tables, one below the other."""
        return [line for rule in self.rules for line in table_of(rule, layers)]

    def get_selection(self, state: State) -> list[Selection] | None:
        """Return the last choice of the first rule that chooses layers."""
        found = (get_selection(rule, state[str(i)]) for i, rule in enumerate(self.rules))
        return next((selection for selection in found if selection is not None), None)


class _Chain(_Combined):
    @property
    def rule_kind(self) -> str:
        """What it is, but for the arguments of its rules."""
        return f"chain({', '.join(map(kind_of, self.rules))})"

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return the product of the rules' factors."""
        each, state = self._each(statistics, state)
        # Some rules know their factors on the host; copying so few to the device waits for nothing.
        device = next((factors.device for factors in each if factors.device.type != "cpu"), each[0].device)
        return torch.stack([finite_or_one(moved(factors, device)) for factors in each]).prod(0), state

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.rules))})"


class _Bounds(_Combined):
    def __init__(self, rule: Any, low: float, high: float) -> None:
        super().__init__(rule)
        self.low, self.high = check_bounds((low, high))

    @property
    def rule_kind(self) -> str:
        """What it is, but for the bounds and the arguments of its rule."""
        return f"bounds({kind_of(self.rules[0])})"

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return the rule's factors, clamped."""
        (factors,), state = self._each(statistics, state)
        return finite_or_one(factors).clamp(self.low, self.high), state

    def remarks(self, layers: Sequence[Layer]) -> list[str]:
        """Return nothing if there is an upper bound, which is what a rule would ask for."""
        return super().remarks(layers) if self.high == math.inf else []

    def __repr__(self) -> str:
        return f"bounds({self.rules[0]!r}, {self.low:g}, {self.high:g})"


def chain(*rules: Any) -> Rule:
    """Return the rule whose factors are the product of the rules' factors.

    f_l = ∏_r f_l^(r)

    A factor that is not finite counts as 1. For `"auto"`, the first rule that prefers something decides.

    Args:
        *rules: At least one rule.

    Raises:
        TypeError: One is no rule.
        ValueError: There is none.

    Example:
        >>> from layerwise.rules import Constant, LayerAdaptive
        >>> chain(LayerAdaptive(), Constant({"head": 10.0}))
        chain(LayerAdaptive(log_base=2.718281828459045), Constant(factors_by_pattern={'head': 10.0}))
    """
    if not rules:
        raise ValueError("chain() takes at least one rule, such as chain(LayerAdaptive(), Constant({'head': 10}))")
    return _Chain(*rules)


def bounds(rule: Any, low: float, high: float) -> Rule:
    """Return the rule with its factors clamped.

    f_l = min(max(f_l, low), high)

    The argument `bounds` of `LayerwiseLR` is this. A factor that is not finite counts as 1 before it is clamped.

    Args:
        rule: A rule.
        low: Smallest factor, at least 0.
        high: Largest factor, at least `low`; `math.inf` for none.

    Raises:
        TypeError: It is no rule, or a bound is no number.
        ValueError: The bounds are negative, NaN or in the wrong order.

    Example:
        >>> from layerwise.rules import LayerAdaptive
        >>> bounds(LayerAdaptive(), 0, 2).factors(Statistics(gradient_norm=torch.tensor([0.1, 1.0])), {"0": {}})[0]
        tensor([2.0000, 1.6931])
    """
    return _Bounds(rule, low, high)


def check_bounds(pair: Any) -> tuple[float, float]:
    """Return bounds as two numbers, 0 ≤ low ≤ high, else raise a TypeError or ValueError."""
    wanted = "two numbers (low, high) with 0 <= low <= high, such as (0.1, 10)"
    if not has_type(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
        raise TypeError(f"bounds={pair!r} must be {wanted}")
    if any(isinstance(bound, bool) or not isinstance(bound, int | float) for bound in pair):
        raise TypeError(f"bounds={pair!r} must be {wanted}")
    low, high = map(float, pair)
    if not 0 <= low <= high or low == math.inf:  # NaN fails every comparison
        raise ValueError(f"bounds={pair!r} must be {wanted}")
    return low, high
