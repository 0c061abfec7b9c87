"""What is asked of a rule, of our class or only alike, and what holds where it has no answer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, TypeGuard, cast

import torch

from ..layers import Layer
from .base import State
from .elementwise import is_elementwise
from .selection import Selection
from .state import carried_over, loaded


def default(rule: Any, name: str) -> Any:
    """Return what a rule, of our class or only alike, prefers for `"layers"`, `"place"`, `"decay"` or `"exclude"`."""
    return getattr(rule, f"default_{name}", None)


def needs_of(rule: Any) -> Collection[str]:
    """Return the names of the statistics that a rule reads."""
    return getattr(rule, "needs", ("gradient_norm",))


def check_rule(rule: Any) -> Any:
    """Return the rule.

    Raises:
        TypeError: It has no method `factors`, or is a class.
    """
    if isinstance(rule, type):
        raise TypeError(f"rule={rule.__name__} is a class; call it: {rule.__name__}(…)")
    if not callable(getattr(rule, "factors", None)):
        raise TypeError(
            f"rule={rule!r} ({type(rule).__name__}) has no method factors(statistics, state); pass one of "
            "layerwise.rules or an object with it"
        )
    return rule


def own_layer(rule: Any) -> bool:
    """Tell whether a layer's factor needs the statistics of no other layer; elementwise rules need not say so."""
    if is_elementwise(rule):
        return not {"counts", "gradients"} & set(rule.needs)
    return bool(getattr(rule, "own_layer", False))


def compares_layers(rule: Any) -> bool:
    """Return whether a layer's factor depends on what other layers there are, or on their statistics."""
    declared = getattr(rule, "compares_layers", None)
    return not own_layer(rule) if declared is None else bool(declared)


def is_pair(result: object) -> TypeGuard[tuple[Any, Any]]:
    """Tell whether a rule's `factors` returned two things, as it must."""
    return isinstance(result, tuple) and len(cast("tuple[object, ...]", result)) == 2


def initial_state(rule: Any, layers: Sequence[Layer], device: torch.device) -> State:
    """Return `rule.init(layers, device)`, or an empty state for a rule without it."""
    return rule.init(layers, device) if hasattr(rule, "init") else {}


def ended_state(rule: Any, state: State) -> State:
    """Return a rule's state for the next epoch; the same for a rule that counts none."""
    return rule.end_epoch(state) if hasattr(rule, "end_epoch") else state


def load_state(rule: Any, saved: Any, state: State) -> State:
    """Return a rule's state with what was saved, by its own `load` if it has one."""
    return rule.load(saved, state) if hasattr(rule, "load") else loaded(saved, state, "state")


def derived_state(rule: Any, state: State) -> State:
    """Return a rule's state with what follows from the rest of it, after layers have come or gone."""
    return rule.derived(state) if hasattr(rule, "derived") else state


def renewed_state(
    rule: Any, layers: Sequence[Layer], device: torch.device, old: State, old_names: Sequence[str]
) -> State:
    """Return a rule's state for these layers, with what is still true of the one so far.

    Args:
        rule: The rule.
        layers: The layers.
        device: Where the factors are used.
        old: The state so far; may be empty.
        old_names: The names of its layers.
    """
    fresh = initial_state(rule, layers, device)
    return derived_state(rule, carried_over(fresh, old, [layer.name for layer in layers], old_names))


def remarks_of(rule: Any, layers: Sequence[Layer]) -> list[str]:
    """Return what a person who attaches a rule to these layers should know."""
    return rule.remarks(layers) if hasattr(rule, "remarks") else []


def doubts_of(rule: Any, layers: Sequence[Layer]) -> list[str]:
    """Return in what a rule that goes by the layers' names may be wrong about them."""
    return rule.doubts(layers) if hasattr(rule, "doubts") else []


def table_of(rule: Any, layers: Sequence[Layer]) -> list[str]:
    """Return the lines of a table of what a rule takes the layers for, of rules that have one."""
    return rule.table(layers) if hasattr(rule, "table") else []


def get_selection(rule: Any, state: State) -> list[Selection] | None:
    """Return the last choice of a rule that chooses layers, None for others."""
    return rule.get_selection(state) if hasattr(rule, "get_selection") else None
