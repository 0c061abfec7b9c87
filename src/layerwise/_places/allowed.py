"""Where a factor may act on an optimizer: what `"auto"` stands for, and what is refused."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

from torch import optim

from .._writes import writes_can_be_scaled
from ..optimizers import (
    LATE_RATE,
    SCALE_INVARIANT,
    PlaceName,
    _momentum,
    decay_is_coupled,
    has_decay,
    is_on_accelerator,
)
from ..rules.base import Rule
from ..rules.state import described
from .trial import divides_by_gradients, in_own_groups, reason_against, verdict_of


def automatic_place(optimizer: Any, preferred: str, decay: str) -> PlaceName:
    """Return where a factor acts when `apply="auto"`.

    Args:
        optimizer: The optimizer.
        preferred: `"gradient"` for a rule whose method multiplies the gradient, `"lr"` for one that scales the rate.
        decay: `"scaled"` or `"plain"`.

    Returns:
        `"update"` for optimizers whose rate cannot carry a factor (`why_not_rate`), such as ASGD and Rprop, or whose
        groups must stay whole; `"gradient"` for SGD when the method asks for it and the rate would not give the same
        numbers; else `"lr"`, which is exact for every other optimizer and never the silent no-op that `"gradient"` is
        under Adam.
    """
    if preferred == "gradient" and type(optimizer) is optim.SGD and any(map(_momentum, optimizer.param_groups)):
        return "gradient"  # the commonest case first: this is asked at each step
    if why_not_rate(optimizer) is not None or (
        # Whole groups are safe for any layers; where both would fail, the error names the way out through the rate.
        reason_against(optimizer, "groups") is not None and reason_against(optimizer, "update") is None
    ):
        return "update"
    if preferred != "gradient" or not isinstance(optimizer, optim.SGD):
        return "lr"
    other_numbers = any(map(_momentum, optimizer.param_groups)) or (decay == "plain" and has_decay(optimizer))
    return "gradient" if other_numbers else "lr"


def why_not_rate(optimizer: optim.Optimizer) -> str | None:
    """Return why a step's rate cannot carry a factor, as a phrase that follows the optimizer's name; None if it can."""
    if isinstance(optimizer, LATE_RATE):
        if isinstance(optimizer, optim.ASGD):
            return "computes its step size one step ahead, so a factor would arrive one step late"
        return "reads its rate only when it creates its step sizes, so later factors would be lost"
    if any(group.get("lr") is None for group in optimizer.param_groups):
        return "has no 'lr' in its parameter groups"
    if isinstance(inspect.getattr_static(type(optimizer), "param_groups", None), property):
        return "computes its param_groups (a property), which a step therefore cannot be given others in place of"
    return reason_against(optimizer, "lr")


def check_place(optimizer: optim.Optimizer, place: str, decay: str, *, decay_given: bool) -> None:
    """Raise where a factor cannot act at this place of this optimizer.

    Args:
        optimizer: The optimizer.
        place: `"gradient"`, `"lr"` or `"update"`.
        decay: `"scaled"` or `"plain"`.
        decay_given: Whether the user chose it.

    Raises:
        ValueError: The combination would give wrong numbers; the message says why and what to use.
    """
    name = type(optimizer).__name__
    if place != "lr" and any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError(
            f"apply={place!r} changes tensors in place, which cuts the graph of {name}(differentiable=True); use "
            "apply='lr' (the factors themselves count as constants), or differentiable=False"
        )
    if place != "gradient":
        rate = why_not_rate(optimizer)
        reason = rate if place == "lr" else reason_against(optimizer, "update")
        if reason is not None:
            too = "" if rate in (None, reason) else f", and apply='lr' does not either: it {rate}"
            raise ValueError(f"apply={place!r} does not work with {name}: it {reason}{too}; {_remedy(optimizer)}")
    if place == "gradient" and decay == "scaled" and not decay_given:
        unknown = [
            g for g in optimizer.param_groups if g.get("weight_decay") and decay_is_coupled(optimizer, g) is None
        ]
        if unknown:
            raise ValueError(
                f"apply='gradient': whether the weight decay of {name} is part of the gradient is not known; pass "
                "decay='scaled' if it is and the factor shall multiply it, else decay='plain'"
            )


def _remedy(optimizer: Any) -> str:
    """Return what to do where a factor cannot act on the rate, or on the update."""
    if reason_against(optimizer, "update") is None:
        return "use apply='update'"
    if why_not_rate(optimizer) is None:
        whole = reason_against(optimizer, "groups") is not None
        return "use apply='lr'" + (f" with a group for each layer, {in_own_groups(optimizer)}" if whole else "")
    if divides_by_gradients(optimizer):
        remedy = "use another optimizer (apply='gradient' changes next to nothing, since it divides by its gradients)"
    else:
        remedy = "use apply='gradient'"
    verdict = verdict_of(optimizer)
    if (verdict is None or verdict.permanent) and all(group.get("lr") is not None for group in optimizer.param_groups):
        own = in_own_groups(optimizer)
        remedy += f", or for factors that never change permanent groups with rates of their own, {own}"
    return remedy


def check_method(optimizer: optim.Optimizer, rule: Rule, place: PlaceName, *, automatic: bool) -> None:
    """Raise where a rule's method cannot act at this place, or means nothing on this optimizer.

    Args:
        optimizer: The optimizer.
        rule: The rule.
        place: `"gradient"`, `"lr"` or `"update"`.
        automatic: Whether the user left the choice to the rule.

    Raises:
        ValueError: The message says why and what to use.
    """
    if place not in rule.places:
        words = " or ".join(f"apply={name!r}" for name in rule.places)
        known = " It follows from the finished step." if rule.places == ("update",) else ""
        raise ValueError(f"apply={place!r} does not work with {described(rule)}: use {words}.{known}")
    reason = no_effect(optimizer, place, rule)
    if rule.places == ("gradient",) and reason is not None:
        without_remedy = reason.partition(";")[0]  # the remedy is a place that this rule does not have
        raise ValueError(
            f"{described(rule)} acts on the gradient, and {without_remedy}. Attach each of its rules by itself"
        )
    if rule.scales_rates and reason is not None:
        raise ValueError(f"{described(rule)} scales rates, and apply='gradient' would lose its factors: {reason}")
    if (
        (automatic or place == "lr")
        and rule.needs_scale
        and (isinstance(optimizer, SCALE_INVARIANT) or divides_by_gradients(optimizer))
    ):
        raise ValueError(
            f"{described(rule)} gives each layer's gradient a size, which {type(optimizer).__name__} divides out "
            "again; use SGD, or a rule that scales the rate, or pass apply='gradient' to try what is left of it"
        )


def check_rows(
    optimizer: optim.Optimizer,
    holder: Any,
    rule: Rule,
    place: PlaceName | Literal["auto"],
    automatic: PlaceName,
    *,
    units: bool,
) -> PlaceName:
    """Return what `"auto"` stands for where parts of parameters have factors: they cannot be in groups of their own.

    Args:
        optimizer: The optimizer.
        holder: The optimizer whose groups have all parameters.
        rule: The rule.
        place: `"gradient"`, `"lr"`, `"update"` or `"auto"`.
        automatic: What `"auto"` stands for without parts.
        units: Whether the parts are those of `layers="unit"`, not of `split`.

    Raises:
        ValueError: The factors would act on the rate, each process steps only some of the parameters, or the rule takes
            the layers for a chain.
    """
    given, instead = ("layers='unit'", "use layers='parameter'") if units else ("split=", "leave split out")
    if "normalisation_gain" in rule.needs:
        raise ValueError(
            f"{described(rule)} takes the layers for a chain, in which each feeds the next, and parts of a parameter "
            "lie beside each other; use another rule, or leave split out"
        )
    if optimizer is not holder:
        raise ValueError(
            f"{given} does not work with {type(holder).__name__}, of which each process steps only some of the "
            f"parameters; {instead}, or use the optimizer itself"
        )
    if automatic == "lr" and (place == "lr" or "update" in rule.places):
        automatic = "update"
    if place == "lr" or (place == "auto" and automatic == "lr" and "lr" in rule.places):
        others = " or ".join(f"apply={name!r}" for name in rule.places if name != "lr")
        raise ValueError(
            "apply='lr' does not act on parts of a parameter, since a parameter has one rate; "
            f"{f'use {others}' if others else f'{described(rule)} acts nowhere else: use another rule'}, or {instead}"
        )
    return automatic


def check_groups(optimizer: Any, place: str, decay: str, layer_of: Mapping[int, int]) -> None:
    """Raise where parameter groups would be divided by layer that must stay whole.

    Args:
        optimizer: The optimizer.
        place: `"gradient"`, `"lr"` or `"update"`.
        decay: `"scaled"` or `"plain"`.
        layer_of: The `id` of each parameter that belongs to a layer, to the layer's number.

    Raises:
        ValueError: A group holds several layers, and the optimizer is known to need it whole.
    """
    reason = reason_against(optimizer, "groups")
    if reason is None or not (place == "lr" or (place == "gradient" and decay == "scaled" and has_decay(optimizer))):
        return
    for group in optimizer.param_groups:
        if len({layer_of.get(id(p)) for p in group["params"]}) > 1:
            plain = ", or pass decay='plain'" if place == "gradient" else ""
            update = ", or use apply='update'" if reason_against(optimizer, "update") is None else ""
            raise ValueError(
                f"apply={place!r} divides the parameter groups by layer, and {type(optimizer).__name__} {reason}; "
                f"build it with a group for each layer, {in_own_groups(optimizer)}{plain or update}"
            )


def scales_writes(optimizer: Any, place: str) -> bool:
    """Tell whether factors act by scaling what a step writes, unless it is compiled.

    For `"lr"` that is so on accelerators, where a group for each factor costs launches; for `"update"` wherever writes
    are seen. The compiler cannot trace that. An optimizer of another package must have passed its trial.
    """
    verdict = verdict_of(optimizer)
    if place == "gradient" or any(group.get("differentiable") for group in optimizer.param_groups):
        return False
    if place == "update":
        scaled = verdict is None or verdict.scales_update
    else:  # Adafactor takes the smaller one of its rate and another
        seen = not isinstance(optimizer, optim.Adafactor) if verdict is None else verdict.scales_rate
        scaled = seen and is_on_accelerator(optimizer)
    return scaled and writes_can_be_scaled()


def no_effect(optimizer: optim.Optimizer, place: str, rule: Rule) -> str | None:
    """Return a sentence when a rule's factors at this place change next to nothing, else None."""
    if (
        place != "gradient"
        or rule.clips
        or not (isinstance(optimizer, SCALE_INVARIANT) or divides_by_gradients(optimizer))
    ):
        return None
    after = " after its first five steps" if isinstance(optimizer, optim.RAdam) else ""
    place = automatic_place(optimizer, "lr", "plain")
    refused = place == "update" and reason_against(optimizer, "update") is not None
    remedy = "use another optimizer" if refused else f"apply={place!r} scales its step"
    return (
        f"{type(optimizer).__name__} divides by the size of the gradients it has seen, so multiplying the gradient "
        f"changes next to nothing{after}; {remedy}"
    )


def unfit_for_adam(optimizer: optim.Optimizer, rule: Rule) -> str | None:
    """Return a sentence when a rule was made for optimizers that do not divide by the size of gradients, else None."""
    if not rule.for_sgd or not (isinstance(optimizer, SCALE_INVARIANT) or divides_by_gradients(optimizer)):
        return None
    return (
        f"{described(rule)} is made for SGD; {type(optimizer).__name__} divides by the size of its gradients, so the "
        "factor multiplies steps that are normalised already. Trust is the rule for such steps (LAMB)"
    )
