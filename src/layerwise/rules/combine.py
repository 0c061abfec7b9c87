"""Rules made of rules: their product, and a rule between bounds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .._arguments import check_choice, check_count, has_type
from .._tensors import moved
from ..layers import Layer
from ..optimizers import PLACES
from ..statistics import MOMENTS, Statistics
from .base import Rule, Selection, check_rule, finite_or_one, is_number
from .refreshing import RefreshingRule
from .shapes import sizes_of
from .state import State, carried_over, described, is_state, saved_names


class _Combined(Rule):
    """A rule made of others: it needs what they need, and the first with a preference decides.

    Its state holds the rules' states by position.
    """

    def __init__(self, *rules: Any) -> None:
        self.rules = tuple(map(check_rule, rules))
        self.needs = tuple(dict.fromkeys(name for rule in self.rules for name in rule.needs))
        self.places = tuple(place for place in PLACES if all(place in rule.places for rule in self.rules))
        self.clips = all(rule.clips for rule in self.rules)
        self.needs_scale = any(rule.needs_scale for rule in self.rules)
        self.scales_rates = any(rule.scales_rates for rule in self.rules)
        self.for_sgd = any(rule.for_sgd for rule in self.rules)
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

    def asks(self, state: State) -> bool:
        return any(rule.asks(own) for _, rule, own in self._each(state))

    def _factors_of_each(self, statistics: Statistics, state: State) -> tuple[list[Tensor], State]:
        results = {key: rule.factors(statistics, own) for key, rule, own in self._each(state)}
        return [factors for factors, _ in results.values()], {key: new for key, (_, new) in results.items()}

    def _has_step(self, statistics: Statistics, factors: Tensor) -> Tensor:
        """Return which layers have a finite factor and, as far as is measured, a gradient and a step."""
        result = torch.isfinite(factors)
        for name in {"gradient_norm", "direction_norm"}.intersection(vars(statistics)):
            size = getattr(statistics, name)
            result = result & (size > 0) & (size < math.inf)
        return result

    def end_epoch(self, state: State) -> State:
        return {**state, **{key: rule.end_epoch(own) for key, rule, own in self._each(state)}}

    def load(self, saved: Any, state: State) -> State:
        if not is_state(saved) or sorted(saved) != sorted(saved_names(state)):
            raise ValueError(f"the file does not hold a state for each of the {len(self.rules)} rules; attach the same")
        inner = {key: rule.load(saved[key], own) for key, rule, own in self._each(state)}
        rest = {name: value for name, value in saved.items() if name not in inner}
        own = {name: value for name, value in state.items() if name not in inner}
        return {**Rule.load(self, rest, own), **inner}

    def derived(self, state: State) -> State:
        return {**state, **{key: rule.derived(own) for key, rule, own in self._each(state)}}

    def renewed(self, layers: Sequence[Layer], device: torch.device, state: State, old_names: Sequence[str]) -> State:
        inner = {
            str(i): rule.renewed(layers, device, state.get(str(i), {}), old_names) for i, rule in enumerate(self.rules)
        }
        rest = {name: value for name, value in state.items() if name not in inner}
        own = {name: value for name, value in self.init(layers, device).items() if name not in inner}
        return {**carried_over(own, rest, [layer.name for layer in layers], old_names), **inner}

    def counts_epochs(self) -> bool:
        return any(rule.counts_epochs() for rule in self.rules)

    @property
    def measures_early(self) -> bool:
        return any(rule.measures_early for rule in self.rules)

    def trained(self, state: State) -> Sequence[bool] | None:
        found = [own for own in (rule.trained(part) for _, rule, part in self._each(state)) if own is not None]
        return list(map(all, zip(*found, strict=True))) if found else None

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
    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        state = super().init(layers, device)
        if self.measures_early and self.trained(state) is not None:
            raise ValueError(
                f"{self!r}: a rule here measures layers in the first steps, in which those with requires_grad=False "
                "have no gradient; leave requires_grad=True out: the factor 0 freezes layers as well"
            )
        return state

    def takes_units(self) -> bool:
        return all(rule.takes_units() for rule in self.rules)

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
    def takes_units(self) -> bool:
        return self.rules[0].takes_units()

    def __init__(self, rule: Any, low: float, high: float) -> None:
        super().__init__(rule)
        self.low, self.high = check_bounds((low, high))

    @property
    def rule_kind(self) -> str:
        return f"bounds({self.rules[0].rule_kind})"

    def trained(self, state: State) -> Sequence[bool] | None:
        return super().trained(state) if self.low <= 0 else None  # else no layer rests

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        (factors,), state = self._factors_of_each(statistics, state)
        return finite_or_one(factors).clamp(self.low, self.high), state

    def remarks(self, layers: Sequence[Layer]) -> list[str]:
        return super().remarks(layers) if self.high == math.inf else []  # rules warn only of factors without a bound

    def __repr__(self) -> str:
        return f"bounds({self.rules[0]!r}, {self.low:g}, {self.high:g})"


Normalization = Literal["mean", "weighted", "max", "harmonic"]
NORMALIZATIONS: tuple[Normalization, ...] = ("mean", "weighted", "max", "harmonic")


class _Normalized(_Combined):
    def __init__(self, rule: Any, by: Normalization) -> None:
        super().__init__(rule)
        self.by = by
        self.own_layer = False
        self.compares_layers = True
        if {"counts", "gradients", *MOMENTS} & set(self.needs):  # which read the gradients in any case
            self.needs = tuple(dict.fromkeys([*self.needs, "gradient_norm"]))

    @property
    def rule_kind(self) -> str:
        return f"normalized({self.rules[0].rule_kind})"

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        trained = [layer.included and any(p.requires_grad for p in layer.parameters) for layer in layers]
        included = torch.tensor(trained, device=device)
        sizes = sizes_of(layers)
        weights = sizes * included if self.by == "weighted" else included.to(sizes.dtype)
        return {**super().init(layers, device), "_weights": weights}

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        (factors,), inner = self._factors_of_each(statistics, state)
        counted = self._has_step(statistics, factors)  # a layer without a step has no part in the mean
        if self.by == "harmonic":
            counted = counted & (factors > 0)
        weights = torch.where(counted, state["_weights"], 0.0)
        factors = finite_or_one(factors)
        if self.by == "max":
            scale = torch.where(weights > 0, factors, 0.0).amax()
        elif self.by == "harmonic":
            scale = weights.sum() / torch.where(weights > 0, weights / factors, 0.0).sum()
        else:
            scale = (weights * factors).sum() / weights.sum()
        usable = (scale > 0) & (scale < math.inf)
        return torch.where(counted & usable, factors / scale, factors), {**state, **inner}

    def __repr__(self) -> str:
        return f"normalized({self.rules[0]!r}, {self.by!r})"


def normalized(rule: Any, by: Normalization) -> Rule:
    """Return the rule with its factors divided by their mean, so that they are no larger rate.

    f_l = f_l / mean(f)

    The argument `normalize` of `LayerwiseLR` is this. Layers that are excluded, frozen or without a gradient in this
    step do not count, and with `"harmonic"` those whose factor is zero.

    Args:
        rule: A rule.
        by: `"mean"`, the arithmetic mean over layers; `"weighted"`, over weights; `"harmonic"`, the harmonic mean over
            layers; `"max"`, the largest factor.

    Raises:
        TypeError: `rule` is not a `Rule`.
        ValueError: `by` is unknown.

    Example:
        >>> from layerwise.rules import Constant
        >>> layers = [Layer(name, (torch.zeros(size, requires_grad=True),)) for name, size in (("a", 3), ("b", 1))]
        >>> for by in ("mean", "weighted", "max"):
        ...     rule = normalized(Constant({"a": 3.0}), by)
        ...     print(rule.factors(Statistics(), rule.init(layers, torch.device("cpu")))[0].tolist())
        [1.5, 0.5]
        [1.2, 0.4]
        [1.0, 0.3333333333333333]
    """
    check_choice("normalize", by, NORMALIZATIONS)
    return _Normalized(rule, by)


class _Refreshed(_Combined, RefreshingRule):
    def __init__(self, rule: Any, every: int, ramp: int, smooth: float) -> None:
        super().__init__(rule)
        self.every, self.ramp, self.smooth = every, ramp, smooth
        self.own_layer = False
        self.compares_layers = self.rules[0].depends_on_other_layers()

    @property
    def measures_early(self) -> bool:
        return True

    @property
    def rule_kind(self) -> str:
        return f"refresh({self.rules[0].rule_kind})"

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        return {**super().init(layers, device), **RefreshingRule.init(self, layers, device)}

    def asks(self, state: State) -> bool:
        return RefreshingRule.asks(self, state)

    def answer(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        (factors,), inner = self._factors_of_each(statistics, state)
        return torch.where(self._has_step(statistics, factors), factors, math.nan), {**state, **inner}

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        return RefreshingRule.factors(self, statistics, state)

    def __repr__(self) -> str:
        return f"refresh({self.rules[0]!r}, every={self.every}, ramp={self.ramp}, smooth={self.smooth:g})"


def refresh(rule: Any, every: int, ramp: int = 0, smooth: float = 0.0) -> Rule:
    """Return the rule, asked every few steps only; its factors hold in between.

    f_l = f_l^(k), asked at steps 1, 1 + every, …

    A layer for which the rule has no finite answer keeps its factor. In the first period the rule is asked at steps 2,
    3, 5, 9, … too, for layers without an answer, such as those of a skipped step.

    Args:
        rule: A rule.
        every: Steps from one question to the next.
        ramp: Steps in which the factors move linearly from the old ones to the new ones; 0 for at once.
        smooth: β of a moving average of the answers, corrected for its beginning; 0 for none.

    Raises:
        TypeError: `rule` is not a `Rule`, or a number of steps is no whole number.
        ValueError: A number is out of its range.

    Example:
        >>> from layerwise.rules import LayerAdaptive
        >>> refresh(LayerAdaptive(), every=100, ramp=50)
        refresh(LayerAdaptive(log_base=2.718281828459045), every=100, ramp=50, smooth=0)
    """
    check_count("every", every)
    if not has_type(ramp, int) or isinstance(ramp, bool) or not 0 <= ramp < every:
        raise ValueError(f"ramp={ramp!r} must be a whole number from 0 to below every={every}")
    if not (is_number(smooth) and 0 <= smooth < 1):
        raise ValueError(f"smooth={smooth!r} must be a number from 0 to below 1, such as 0.9")
    return _Refreshed(rule, every, ramp, float(smooth))


def chain(*rules: Any) -> Rule:
    """Return the rule whose factors are the product of the rules' factors.

    f_l = ∏_r f_l^(r)

    A factor that is not finite counts as 1. For `"auto"`, the first rule that prefers something decides.

    Args:
        *rules: At least one rule.

    Raises:
        TypeError: One is not a `Rule`.
        ValueError: There is none, or there is no place where all of them may act.

    Example:
        >>> from layerwise.rules import Constant, LayerAdaptive
        >>> chain(LayerAdaptive(), Constant({"head": 10.0}))
        chain(LayerAdaptive(log_base=2.718281828459045), Constant(factors_by_pattern={'head': 10.0}))
    """
    if not rules:
        raise ValueError("chain() takes at least one rule, such as chain(LayerAdaptive(), Constant({'head': 10}))")
    result = _Chain(*rules)
    if not result.places:
        words = "; ".join(f"{described(rule)} acts on {' or '.join(rule.places)}" for rule in rules)
        raise ValueError(f"these rules act at different places, so they cannot be one: {words}. Attach each by itself")
    return result


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


def check_bounds(pair: Any, argument: str = "bounds") -> tuple[float, float]:
    """Return bounds as two numbers, 0 ≤ low ≤ high, else raise a TypeError or ValueError."""
    wanted = "two numbers (low, high) with 0 <= low <= high, such as (0.1, 10)"
    if not has_type(pair, Sequence) or len(pair) != 2 or not all(map(is_number, pair)):
        raise TypeError(f"{argument}={pair!r} must be {wanted}")
    low, high = map(float, pair)
    if not 0 <= low <= high or low == math.inf:  # NaN fails every comparison
        raise ValueError(f"{argument}={pair!r} must be {wanted}")
    return low, high
