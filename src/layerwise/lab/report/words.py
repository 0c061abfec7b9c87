"""Names, numbers and places of a plan in words."""

from __future__ import annotations

import math

from layerwise.lab.experiments.plan import Arm, Plan, Quantity

SMOKE = "This is the smoke scale: it shows that the machinery works and says nothing about the paper."
"""What the page and the terminal say of runs at that scale."""


def capital(sentence: str) -> str:
    """Begin a sentence with a capital letter."""
    return sentence[:1].upper() + sentence[1:]


def item_of(arm: Arm) -> str:
    """Give what tables and figures show an arm as: its group, or itself."""
    return arm.group or arm.name


def item_words(plan: Plan) -> dict[str, str]:
    """Name every item of a plan in words, in the order of its arms."""
    return {item_of(arm): arm.group or arm.words for arm in plan.arms}


def members_of(plan: Plan, subject: str) -> dict[str, list[Arm]]:
    """Give the arms of each item of a subject, in order of their values."""
    found: dict[str, list[Arm]] = {}
    for arm in plan.arms_of(subject):
        found.setdefault(item_of(arm), []).append(arm)
    return {item: sorted(arms, key=lambda arm: arm.value or 0.0) for item, arms in found.items()}


def plain_arm(plan: Plan, subject: str) -> Arm | None:
    """Give the arm of a subject that trains without a method, the first one if there are several."""
    return next((arm for arm in plan.arms_of(subject) if arm.kind == "plain"), None)


def value_words(value: float | None) -> str:
    """Write an arm's place in its group, such as a threshold."""
    return "" if value is None else f"{value:g}"


def in_unit(quantity: Quantity) -> str:
    """Name a quantity with its unit, as an axis does."""
    return f"{quantity.words}, {quantity.unit}" if quantity.unit else quantity.words


def with_unit(quantity: Quantity) -> str:
    """Name a quantity with its unit, as a sentence does."""
    return f"{quantity.words} in {quantity.unit}" if quantity.unit else quantity.words


def number(value: float, quantity: Quantity, sd: float = math.nan) -> str:
    """Write a value or a standard deviation: two decimals of a percentage, else as many as ``sd`` leaves sense in."""
    if not math.isfinite(value):
        return str(value)
    if quantity.take == "first":
        return f"{value:,.0f}"
    if quantity.unit == "%":
        return f"{value:.2f}"
    if math.isfinite(sd) and sd > 0:
        return f"{value:.{min(6, max(0, 1 - math.floor(math.log10(sd))))}f}"
    return f"{value:.4g}"


def last_step(plan: Plan) -> int | None:
    """Give the column by which the plan is judged; None for the end of the runs."""
    return plan.columns[-1] if plan.columns else None


def place_words(plan: Plan) -> str:
    """Say where the numbers that are judged were taken."""
    step = last_step(plan)
    if plan.quantity.name == "seconds":
        return "over the whole run, without the tests"
    return "at the end of the runs" if step is None else f"after {plan.step_unit} {step:,}"
