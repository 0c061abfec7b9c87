"""Charts over the values of groups of arms, such as thresholds."""

from __future__ import annotations

import statistics
from typing import Any

from layerwise.lab.experiments.results import Results
from layerwise.lab.report.charts import HEIGHT, WIDTH, band, value_axis
from layerwise.lab.report.drawing import Drawing, slugs, vega
from layerwise.lab.report.looks import Look, encodings
from layerwise.lab.report.words import item_of, plain_arm


def thresholds(results: Results, shown: dict[str, Look]) -> dict[str, Drawing]:
    """Draw the quantity over the values of each group; arms without a value are lines, the plain one with a band.

    Args:
        results: the finished runs.
        shown: how arms and groups are drawn.

    Returns:
        Subject -> drawing, each on a scale of its own: networks differ by more than thresholds do.
    """
    plan, quantity = results.plan, results.plan.quantity
    cells = {
        (subject.name, arm.name): cell
        for subject in plan.subjects
        for arm in plan.arms_of(subject.name)
        if (cell := results.cell(subject.name, arm.name)) is not None and cell.count
    }
    values = sorted({arm.value for arm in plan.arms if arm.group and arm.value is not None})
    if not cells or not values:
        return {}
    title = f"{quantity.words}, {quantity.unit}".rstrip(", ")
    names = slugs(subject.name for subject in plan.subjects)
    found = {}
    for subject in plan.subjects:
        own = [cell for (name, _), cell in cells.items() if name == subject.name]
        if not own:
            continue
        y, rows, flat = value_axis(own, title, falling=False), [], []
        for arm in plan.arms_of(subject.name):
            cell = cells.get((subject.name, arm.name))
            if cell is not None:
                (row,) = band(shown[item_of(arm)], [cell], y["scale"])
                (rows if arm.group and arm.value is not None else flat).append({**row, "x": arm.value})
        used = [look for look in shown.values() if look.key in {row["item"] for row in rows + flat}]
        plain = plain_arm(plan, subject.name)
        key = shown[item_of(plain)].key if plain is not None else ""
        body = {"width": WIDTH, "height": HEIGHT, "layer": _threshold_layers(used, rows, flat, values, y, key)}
        label = f"{title} over the threshold, {subject.words}; plain: mean ± sd as a band"
        found[subject.name] = vega(f"thresholds-{names[subject.name]}", label, body, used)
    return found


def _threshold_layers(
    used: list[Look],
    rows: list[dict[str, Any]],
    flat: list[dict[str, Any]],
    values: list[float],
    y: dict[str, Any],
    plain: str,
) -> list[dict[str, Any]]:
    """Give the layers of a chart over thresholds."""
    color, dash, shape = encodings(used)
    margin = 0.05 * (values[-1] - values[0]) or 0.5
    ends = [values[0] - margin, values[-1] + margin]
    x = {
        "field": "x",
        "type": "quantitative",
        "title": "threshold",
        "scale": {"domain": ends, "nice": False},
        "axis": {"grid": False, "values": values if len(values) <= 9 else values[::3], "format": ".6~g"},
    }
    mean = {"x": x, "y": {"field": "mean", **y}, **color}
    low_high = {"y": {"field": "low", **y}, "y2": {"field": "high"}}
    return [
        {
            "mark": {"type": "rect", "opacity": 1, "fillOpacity": 0.2},
            "data": {"values": [row for row in flat if row["item"] == plain]},
            "encoding": {**low_high, **color},
        },
        {
            "mark": {"type": "rule", "strokeWidth": 1.6},
            "data": {"values": flat},
            "encoding": {"y": {"field": "mean", **y}, **color, **dash},
        },
        {
            "mark": {"type": "rule", "strokeWidth": 1.2, "opacity": 1, "strokeOpacity": 0.6},
            "data": {"values": rows},
            "encoding": {"x": x, **low_high, **color},
        },
        {
            "mark": {"type": "line", "strokeWidth": 1.8},
            "data": {"values": rows},
            "encoding": {**mean, **dash},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 48, "opacity": 1},
            "data": {"values": rows},
            "encoding": {**mean, **shape},
        },
    ]


def counts(results: Results, shown: dict[str, Look]) -> dict[str, Drawing]:
    """Draw how many layers were chosen at each threshold, mean over phases and seeds: subject -> drawing."""
    plan = results.plan
    names = slugs(subject.name for subject in plan.subjects)
    found = {}
    for subject in plan.subjects:
        rows = [
            {"item": shown[arm.group].key, "x": arm.value, "mean": statistics.fmean(chosen)}
            for arm in plan.arms_of(subject.name)
            if arm.group and arm.value is not None and (chosen := chosen_counts(results, subject.name, arm.name))
        ]
        if not rows:
            continue
        used = [look for look in shown.values() if look.key in {row["item"] for row in rows}]
        top = max(row["mean"] for row in rows) or 1.0
        y = {
            "type": "quantitative",
            "scale": {"domain": [0, 1.05 * top], "nice": False},
            "axis": {"title": "layers chosen", "tickCount": 5, "format": ".6~g"},
        }
        values = sorted({row["x"] for row in rows})
        layers = _threshold_layers(
            used, [{**row, "low": row["mean"], "high": row["mean"]} for row in rows], [], values, y, ""
        )
        label = f"Number of layers chosen by threshold, {subject.words}, mean over phases and seeds"
        body = {"width": WIDTH, "height": 120, "layer": layers}
        found[subject.name] = vega(f"chosen-{names[subject.name]}", label, body, used)
    return found


def chosen_counts(results: Results, subject: str, arm: str) -> list[int]:
    """Give the number of layers of each choice that an arm's runs made, over phases and seeds."""
    return [
        sum(bool(row[2]) for row in choice["layers"].values())
        for record in results.of(subject, arm).values()
        for choice in record.summary.get("selections", ())
    ]
