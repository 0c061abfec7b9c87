"""Rules made of rules: their product, and a rule between bounds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._arguments import has_type
from .._tensors import moved
from ..layers import Layer
from ..statistics import Statistics
from .base import Rule, Selection, check_rule, finite_or_one, is_number
from .state import State, is_state


class _Combined(Rule):
    """A rule made of others: it needs what they need, and the first with a preference decides.

    Its state holds the rules' states by position.
    """

    def __init__(self, *rules: Any) -> None:
        self.rules = tuple(map(check_rule, rules))
        self.needs = tuple(dict.fromkeys(name for rule in self.rules for name in rule.needs))
        for name in ("default_layers", "default_place", "default_decay", "default_exclude"):
            preferences = (getattr(rule, name) for rule in self.rules)
            setattr(self, name, next((p for p in preferences if p is not None), None))
        self.own_layer = all(rule.needs_own_layer_only() for rule in self.rules)
        self.compares_layers = any(rule.depends_on_other_layers() for rule in self.rules)

    def _each(self, state: State) -> Iterator[tuple[str, Rule, State]]:
        """Yield each rule with its key and its part of the state."""
        for i, rule in enumerate(self.rules):
            yield str(i), rule, state[str(i)]

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        return {str(i): rule.init(layers, device) for i, rule in enumerate(self.rules)}

    def _factors_of_each(self, statistics: Statistics, state: State) -> tuple[list[Tensor], State]:
        results = {key: rule.factors(statistics, own) for key, rule, own in self._each(state)}
        return [factors for factors, _ in results.values()], {key: new for key, (_, new) in results.items()}

    def end_epoch(self, state: State) -> State:
        return {key: rule.end_epoch(own) for key, rule, own in self._each(state)}

    def load(self, saved: Any, state: State) -> State:
        if not is_state(saved) or sorted(saved) != sorted(state):
            raise ValueError(f"the file does not hold a state for each of the {len(self.rules)} rules; attach the same")
        return {key: rule.load(saved[key], own) for key, rule, own in self._each(state)}

    def derived(self, state: State) -> State:
        return {key: rule.derived(own) for key, rule, own in self._each(state)}

    def get_selection(self, state: State) -> list[Selection] | None:
        """Return the last choice of the first rule that chooses layers."""
        found = (rule.get_selection(own) for _, rule, own in self._each(state))
        return next((selection for selection in found if selection is not None), None)

    def remarks(self, layers: Sequence[Layer]) -> list[str]:
        return [remark for rule in self.rules for remark in rule.remarks(layers)]

    def doubts(self, layers: Sequence[Layer]) -> list[str]:
        return [doubt for rule in self.rules for doubt in rule.doubts(layers)]

    def table(self, layers: Sequence[Layer]) -> list[str]:
        return [line for rule in self.rules for line in rule.table(layers)]


class _Chain(_Combined):
    @property
    def rule_kind(self) -> str:
        return f"chain({', '.join(rule.rule_kind for rule in self.rules)})"

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        each, state = self._factors_of_each(statistics, state)
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
        return f"bounds({self.rules[0].rule_kind})"

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        (factors,), state = self._factors_of_each(statistics, state)
        return finite_or_one(factors).clamp(self.low, self.high), state

    def remarks(self, layers: Sequence[Layer]) -> list[str]:
        return super().remarks(layers) if self.high == math.inf else []  # rules warn only of factors without a bound

    def __repr__(self) -> str:
        return f"bounds({self.rules[0]!r}, {self.low:g}, {self.high:g})"


def chain(*rules: Any) -> Rule:
    """Return the rule whose factors are the product of the rules' factors.

    f_l = ∏_r f_l^(r)

    A factor that is not finite counts as 1. For `"auto"`, the first rule that prefers something decides.

    Args:
        *rules: At least one rule.

    Raises:
        TypeError: One is not a `Rule`.
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
        TypeError: `rule` is not a `Rule`, or a bound is no number.
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
    if not has_type(pair, Sequence) or len(pair) != 2 or not all(map(is_number, pair)):
        raise TypeError(f"bounds={pair!r} must be {wanted}")
    low, high = map(float, pair)
    if not 0 <= low <= high or low == math.inf:  # NaN fails every comparison
        raise ValueError(f"bounds={pair!r} must be {wanted}")
    return low, high
