"""What the page shows of each layer: heat-maps, choices and factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from layerwise.lab.experiments.plan import Arm
from layerwise.lab.experiments.results import Results, layer_ranges
from layerwise.lab.report.charts import representatives
from layerwise.lab.report.drawing import Drawing, slugs
from layerwise.lab.report.maps import COLUMNS, Grid, Scale, choices, grid, heat_map
from layerwise.lab.report.words import item_of

QUANTITIES = {
    "factor": ("Factor", "What the rule multiplies a layer's step by."),
    "rate": (
        "Rate",
        "Learning rate of a layer: base rate under its policy, times the factor where it acts on the rate.",
    ),
    "gradient_norm": ("Gradient norm", "‖g‖ over all parameters of a layer together, as the optimizer found it."),
    "update_ratio": ("Update to weight", "‖Δw‖ / ‖w‖ of one update, over all parameters of a layer together."),
}
"""Quantity -> its tab, and what it is."""

MOST_MAPS = 24
"""Most heat-maps of a quantity: beyond, the controls are left out, and then the last subjects."""

MOST_CELLS = 120_000
"""Most cells of all heat-maps, some ten bytes each: of many maps of many layers, each has fewer columns."""

FEWEST_COLUMNS = 12


@dataclass(frozen=True)
class Maps:
    """The maps of one quantity and subject.

    Attributes:
        subject: in words.
        low: end of the colour scale in words.
        high: the other end.
        drawings: arm in words, and its map.
    """

    subject: str
    low: str
    high: str
    drawings: list[tuple[str, Drawing]]


@dataclass(frozen=True)
class Pane:
    """The maps of one quantity.

    Attributes:
        key: of the quantity.
        title: of its tab.
        lead: what it is.
        rows: a subject each.
    """

    key: str
    title: str
    lead: str
    rows: list[Maps]


def ruled(results: Results) -> dict[str, list[Arm]]:
    """Give the arms that have maps: those with a rule, of each group the middle one.

    Args:
        results: the finished runs.

    Returns:
        Subject -> arms, at most ``MOST_MAPS`` of them, for the first subjects that are that few together.
    """
    plan = results.plan
    found: dict[str, list[Arm]] = {}
    for subject in plan.subjects:
        chosen = set(representatives(plan, subject.name).values())
        arms = [arm for arm in plan.arms_of(subject.name) if arm.name in chosen and (arm.rule or arm.control)]
        found[subject.name] = [arm for arm in arms if results.of(subject.name, arm.name)]
    if sum(map(len, found.values())) > MOST_MAPS:
        found = {subject: [arm for arm in arms if arm.control is None] for subject, arms in found.items()}
    kept: dict[str, list[Arm]] = {}
    for subject, arms in found.items():
        if sum(map(len, kept.values())) + len(arms) <= MOST_MAPS or not kept:
            kept[subject] = arms[:MOST_MAPS]
    return kept


def columns_for(results: Results, shown: dict[str, list[Arm]]) -> int:
    """Choose how many columns a heat-map has, so that all of them keep within ``MOST_CELLS``."""
    lines = sum(len(results.layer_names(subject, arm.name)) for subject, arms in shown.items() for arm in arms)
    return max(FEWEST_COLUMNS, min(COLUMNS, MOST_CELLS // max(1, len(QUANTITIES) * lines)))


def words_of(arm: Arm) -> str:
    """Name an arm above a map: one of a group by the group and its value."""
    return f"{arm.group}, {arm.value:g}" if arm.group and arm.value is not None else arm.words


def panes(results: Results) -> list[Pane]:
    """Draw the heat-maps of every quantity that was recorded.

    Args:
        results: the finished runs.

    Returns:
        One pane a quantity, in the order of ``QUANTITIES``.
    """
    made = []
    subjects = slugs(subject.name for subject in results.plan.subjects)
    arms = slugs(arm.name for arm in results.plan.arms)
    shown = ruled(results)
    columns = columns_for(results, shown)
    for key, (title, lead) in QUANTITIES.items():
        rows = []
        for subject in results.plan.subjects:
            grids = {
                arm.name: found
                for arm in shown.get(subject.name, ())
                if (found := grid(results, subject.name, arm.name, key, columns)) is not None
            }
            if grids:
                names = {arm: f"{key.replace('_', '-')}-{subjects[subject.name]}-{arms[arm]}" for arm in grids}
                rows.append(_maps(results, subject.words, title, grids, names))
        if rows:
            made.append(Pane(key.replace("_", "-"), title, lead, rows))
    return made


def _maps(results: Results, subject: str, title: str, grids: dict[str, Grid], names: dict[str, str]) -> Maps:
    """Draw the maps of a quantity and subject on one scale."""
    scale = Scale.of(value for found in grids.values() for value in found.finite)
    drawings = []
    for name, found in grids.items():
        words = words_of(results.plan.arm(name))
        label = f"{title} of each layer by update, {subject}, {words}"
        drawings.append((words, heat_map(found, scale, names[name], label)))
    return Maps(subject, *scale.words, drawings)


def chosen_maps(results: Results) -> tuple[list[tuple[str, Drawing]], list[str]]:
    """Draw which layers were chosen.

    Args:
        results: the finished runs.

    Returns:
        Title and drawing of each map, and what is left out of them.
    """
    drawings, left_out = [], []
    several = len(results.plan.subjects) > 1
    subjects = slugs(subject.name for subject in results.plan.subjects)
    arms = slugs(arm.name for arm in results.plan.arms)
    shown = ruled(results)
    for subject in results.plan.subjects:
        for arm in shown.get(subject.name, ()):
            words = f"{subject.words}: {words_of(arm)}" if several else words_of(arm)
            label = f"Layers chosen, by epoch and seed, {subject.words}, {words_of(arm)}"
            name = f"chosen-layers-{subjects[subject.name]}-{arms[arm.name]}"
            drawn, missing = choices(results, subject.name, arm.name, name, label)
            if drawn is not None:
                drawings.append((words, drawn))
            if missing and missing not in left_out:
                left_out.append(missing)
    return drawings, left_out


def factor_tables(results: Results) -> list[dict[str, Any]]:
    """Gather the factors of rules that do not only switch layers on and off, a table for each list of layers.

    Args:
        results: the finished runs.

    Returns:
        Tables: ``layers`` and ``columns``, each with words, layers, mean and spread.
    """
    tables: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    several = len(results.plan.subjects) > 1
    factors = layer_ranges(results, "factor") if results.records else {}
    for subject in results.plan.subjects:
        for arm in results.plan.arms_of(subject.name):
            if arm.rule is None or arm.group or arm.rule.get("name") in ("GradientAmplification", "Constant"):
                continue
            recorded = factors.get((subject.name, arm.name))
            if recorded is None:
                continue
            layers = {
                name: dict(zip(("mean", "low", "high"), recorded[name], strict=True))
                for name in results.layer_names(subject.name, arm.name)
                if name in recorded
            }
            words = f"{subject.words}, {arm.words}" if several else arm.words
            column = {
                "words": words,
                "item": item_of(arm),
                "layers": layers,
                "mean": results.mean_factor(subject.name, arm.name),
                "spread": results.spread(subject.name, arm.name),
            }
            tables.setdefault(tuple(layers), []).append(column)
    return [{"layers": list(layers), "columns": columns} for layers, columns in tables.items()]


def factor_words(value: float) -> str:
    """Write a factor with two decimals, and one so small that they would hide it with three digits."""
    return f"{value:.2f}" if abs(value) >= 0.1 or not value else f"{value:.3g}"
