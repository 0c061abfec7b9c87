"""Charts of differences, learning curves, thresholds and counts; those of a row share their scales."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from layerwise.lab.experiments.plan import Plan
from layerwise.lab.experiments.results import Cell, Results, summarise
from layerwise.lab.report.drawing import Drawing, shortened, slugs, vega
from layerwise.lab.report.looks import Look, encodings
from layerwise.lab.report.verdicts import Verdict
from layerwise.lab.report.words import item_of
from layerwise.lab.stats.comparison import MINIMUM_PAIRS, Comparison

WIDTH, HEIGHT = 300, 190
"""Plotting area in pixels; with its labels a chart fits a telephone held upright."""

POINTS = 300
"""Most points of a curve that are drawn as they are."""

SPANS = 60
"""A longer series, as the training loss of every update, is averaged over as many spans of updates."""

MOST_LINES = 24
"""Curves of one chart; beyond, nobody could tell them apart."""

MOST_SUBJECTS = 24
"""Charts of a row, a subject each."""

MARKED = 25
"""Up to so many points are marked by shapes."""

LONGEST_LABEL = 40
"""Letters of a row's label; longer ones lose their middle, as the plotting area ends there."""

LOG_SPREAD = 5.0
"""A quantity that falls is drawn on a logarithmic scale where its largest value is so many times its smallest."""

FEW_DIGITS, MANY_DIGITS = (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)
"""Ticks of a log axis are these times powers of ten: the many where the few give less than four."""


def reach_of(comparisons: Iterable[Comparison]) -> float:
    """Give the distance from 0 that all differences and intervals keep, for their common scale."""
    reach = 0.0
    for comparison in comparisons:
        # The interval of very few pairs says nothing and would hide them: it is cut off at the edge.
        few = len(comparison.seeds) < MINIMUM_PAIRS
        ends = [2.0 * value if few else value for value in comparison.differences]
        ends += [] if few else [comparison.low or 0.0, comparison.high or 0.0]
        reach = max([reach, *(abs(value) for value in ends)])
    return reach or 0.1


def differences(verdict: Verdict, look: Look, reach: float, name: str) -> Drawing:
    """Draw paired differences: a tick a seed, the mean and its interval, a line at 0.

    Args:
        verdict: whose rows are drawn.
        look: of its arm or group.
        reach: of the scale, from ``reach_of``.
        name: of the drawing.

    Returns:
        The drawing.
    """
    band = 26 if verdict.grouped else 52
    order = [str(place) for place in range(len(verdict.rows))]
    rows = dict(zip(order, verdict.rows, strict=True))
    labels = [{"row": place, "label": shortened(label, LONGEST_LABEL)} for place, (label, _) in rows.items()]
    ticks = [{"row": place, "value": value} for place, (_, each) in rows.items() for value in each.differences]
    means = [
        {"row": place, "value": each.mean, "low": each.low, "high": each.high}
        for place, (_, each) in rows.items()
        if each.mean is not None
    ]
    first = verdict.rows[0][1]
    better = "right" if first.higher_is_better else "left"
    unit = f"{first.unit}, " if first.unit else ""
    x = {
        "field": "value",
        "type": "quantitative",
        "scale": {"domain": [-1.05 * reach, 1.05 * reach], "nice": False, "clamp": True},
        "axis": {"title": f"difference, {unit}better to the {better}", "tickCount": 5, "format": ".6~g"},
    }
    y = {"field": "row", "type": "nominal", "sort": order, "scale": {"domain": order, "padding": 0}, "axis": None}
    text = {"type": "text", "fontSize": 11, "baseline": "middle", "color": "var(--muted)", "clip": False}
    place = {"align": "right", "x": -8} if verdict.grouped else {"align": "left", "x": 0, "dy": -17}
    layers = [
        {
            "mark": {"type": "rule", "color": "var(--muted)", "strokeDash": [3, 3]},
            "data": {"values": [{"value": 0}]},
            "encoding": {"x": x},
        },
        {
            "mark": {**text, **place, "stroke": "var(--card)", "strokeWidth": 4, "strokeJoin": "round"},
            "data": {"values": labels},
            "encoding": {"y": y, "text": {"field": "label"}},
        },
        {"mark": {**text, **place}, "data": {"values": labels}, "encoding": {"y": y, "text": {"field": "label"}}},
        {
            "mark": {"type": "rule", "strokeWidth": 3, "color": look.colour},
            "data": {"values": [row for row in means if row["low"] is not None]},
            "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}, "y": y},
        },
        {
            "mark": {"type": "tick", "thickness": 1.5, "size": 8 if verdict.grouped else 10, "color": "var(--muted)"}
            | {"yOffset": 8 if verdict.grouped else 13, "opacity": 1, "fillOpacity": 0.7},
            "data": {"values": ticks},
            "encoding": {"x": x, "y": y},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 60, "opacity": 1, "color": look.colour},
            "data": {"values": means},
            "encoding": {"x": x, "y": y},
        },
    ]
    words = "; ".join(f"{label}: {each.statistics}" for label, each in verdict.rows[:6])
    label = f"Paired differences in {first.quantity}, {verdict.subject_words}, {verdict.words}: {words}"
    return vega(name, label, {"width": WIDTH, "height": band * len(order), "layer": layers})


def representatives(plan: Plan, subject: str) -> dict[str, str]:
    """Choose an arm for each item of a subject: of a group, that in the middle of its values: item -> arm."""
    members: dict[str, list[tuple[float, str]]] = {}
    for arm in plan.arms_of(subject):
        members.setdefault(item_of(arm), []).append((arm.value or 0.0, arm.name))
    return {item: sorted(arms)[(len(arms) - 1) // 2][1] for item, arms in members.items()}


def curve(results: Results, subject: str, arm: str, quantity: str) -> list[Cell]:
    """Summarise a quantity over seeds; a series of more than ``POINTS`` steps is averaged in ``SPANS`` spans first.

    What was measured before the first update is left out: it is that of guessing, and would take half the scale.
    """
    series = [results.series((subject, arm, seed), quantity) for seed in results.of(subject, arm)]
    last = max((pairs[-1][0] for pairs in series if pairs), default=0)
    longest = max(map(len, series), default=0)
    span = 1 if longest <= POINTS else last / SPANS
    gathered: dict[int, list[float]] = {}
    for pairs in series:
        spans: dict[int, list[float]] = {}
        for step, value in pairs:
            if step > 0 and math.isfinite(value):
                spans.setdefault(round(math.ceil(step / span) * span), []).append(value)
        for step, values in spans.items():
            gathered.setdefault(step, []).append(math.fsum(values) / len(values))
    return [summarise(step, values) for step, values in sorted(gathered.items())]


def curves(results: Results, shown: dict[str, Look], quantity: str, title: str, *, falling: bool) -> dict[str, Drawing]:
    """Draw learning curves with bands of ± one standard deviation.

    Args:
        results: the finished runs.
        shown: how arms and groups are drawn.
        quantity: of the metrics.
        title: of the vertical axis.
        falling: less is better, so that a logarithmic scale may be right.

    Returns:
        Subject -> drawing, all on one scale; subjects without a finished run are left out.
    """
    plan = results.plan
    data = {
        subject.name: {
            item: curve(results, subject.name, arm, quantity)
            for item, arm in list(representatives(plan, subject.name).items())[:MOST_LINES]
        }
        for subject in plan.subjects[:MOST_SUBJECTS]
    }
    cells = [cell for lines in data.values() for line in lines.values() for cell in line]
    if not cells:
        return {}
    y = value_axis(cells, title, falling)
    last = max(cell.step for cell in cells)
    marked = len({cell.step for cell in cells}) <= MARKED
    names, of = slugs(data), re.sub(r"[^A-Za-z0-9_]+", "-", quantity)[:60]  # it may be a path
    return {
        subject: _curves(plan, subject, lines, shown, y, f"{of}-{names[subject]}", last=last, marked=marked)
        for subject, lines in data.items()
        if any(lines.values())
    }


def _curves(
    plan: Plan,
    subject: str,
    lines: dict[str, list[Cell]],
    shown: dict[str, Look],
    y: dict[str, Any],
    name: str,
    *,
    last: int,
    marked: bool,
) -> Drawing:
    """Draw the curves of one subject."""
    used = [shown[item] for item, line in lines.items() if line]
    rows = [row for item, line in lines.items() for row in band(shown[item], line, y["scale"])]
    x = {
        "field": "x",
        "type": "quantitative",
        "title": plan.step_unit,
        "scale": {"domain": [0 if plan.step_unit == "iteration" else 1, max(last, 2)], "nice": False},
        "axis": {
            "grid": False,
            "tickCount": 5,
            "labelFlush": False,
            "labelOverlap": "greedy",
            "labelSeparation": 10,
            "format": "~s" if last >= 10_000 else ",d",
            "tickMinStep": 1,
        },
    }
    title = y["axis"]["title"]
    label = f"{title} by {plan.step_unit}, {plan.subject(subject).words}"
    body = {"width": WIDTH, "height": HEIGHT, "data": {"values": rows}, "layer": _lines(used, x, y, marked=marked)}
    return vega(name, label, body, used)


def band(look: Look, cells: Sequence[Cell], scale: dict[str, Any]) -> list[dict[str, Any]]:
    """Give the points of a line: mean, and mean ± sd within the scale."""
    low, high = scale["domain"]
    rows = []
    for cell in cells:
        sd = cell.sd if cell.count > 1 else 0.0
        ends = {"mean": cell.mean, "low": cell.mean - sd, "high": cell.mean + sd}
        rows.append({"item": look.key, "x": cell.step} | {name: min(max(v, low), high) for name, v in ends.items()})
    return rows


def _lines(used: Sequence[Look], x: dict[str, Any], y: dict[str, Any], *, marked: bool) -> list[dict[str, Any]]:
    """Draw lines with bands from rows of ``band``."""
    color, dash, shape = encodings(list(used))
    mean = {"x": x, "y": {"field": "mean", **y}, **color}
    layers = [
        {
            "mark": {"type": "area", "opacity": 1, "fillOpacity": 0.14},
            "encoding": {"x": x, "y": {"field": "low", **y}, "y2": {"field": "high"}, **color},
        },
        {"mark": {"type": "line", "strokeWidth": 1.8}, "encoding": {**mean, **dash}},
    ]
    if marked:
        mark = {"type": "point", "filled": True, "size": 40, "opacity": 1}
        layers.append({"mark": mark, "encoding": {**mean, **shape}})
    return layers


def value_axis(cells: Sequence[Cell], title: str, falling: bool) -> dict[str, Any]:
    """Choose scale and ticks of a vertical axis: logarithmic for what falls by far and stays above 0."""
    means = [cell.mean for cell in cells]
    spread = [cell.mean + side * (cell.sd if cell.count > 1 else 0.0) for cell in cells for side in (-1, 1)]
    positive = [value for value in means if value > 0]
    if falling and positive and max(means) > LOG_SPREAD * min(positive):
        low, high = min(positive) / 1.25, max(spread) * 1.05
        return {
            "type": "quantitative",
            "scale": {"type": "log", "domain": [low, high], "nice": False, "clamp": True},
            "axis": {"values": _log_ticks(low, high), "title": f"{title} (log)", "format": ".6~g"},
        }
    low, high = min(spread), max(spread)
    room = 0.04 * (high - low) or 0.5 * abs(high) or 1.0
    return {
        "type": "quantitative",
        "scale": {"domain": [low - room, high + room], "nice": False, "zero": False, "clamp": True},
        "axis": {"title": title, "tickCount": 6, "format": ".6~g"},
    }


def _log_ticks(low: float, high: float) -> list[float]:
    """Choose the ticks of a log axis: about four to seven."""
    ticks: list[float] = []
    for digits in ((1,), FEW_DIGITS, MANY_DIGITS):
        if len(ticks) < 4:
            found = [digit * 10.0**power for power in range(-12, 13) for digit in digits]
            ticks = [tick for tick in found if low <= tick <= high]
    return ticks
