"""Charts of the report, rendered to SVG beforehand so that the page needs no script and no network.

Colours are CSS variables of the page (``var(--plain)`` and so on), so that one drawing serves light and dark.
Charts of a row share their scales, and their legend is part of the page.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from layerwise.lab.report.drawing import svg
from layerwise.lab.results import Results
from layerwise.lab.training import ARMS
from layerwise.lab.verdict import MINIMUM_PAIRS, Comparison

WIDTH, HEIGHT = 300, 190
"""Plotting area in pixels; with its labels a chart fits a telephone held upright."""

DASHES = {"plain": [2, 2], "layer-adaptive": [1, 0], "control": [7, 3]}
SHAPES = {"plain": "square", "layer-adaptive": "circle", "control": "triangle-up"}
"""A second sign beside the colour, for those who do not see it."""

FEW_DIGITS, MANY_DIGITS = (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)
"""Ticks of a log axis are these times powers of ten: the many where the few give less than four."""


def colour(arm: str) -> str:
    """Give the page's colour of an arm."""
    return f"var(--{arm})"


def _arm_scale(values: dict[str, Any]) -> dict[str, Any]:
    return {"scale": {"domain": list(ARMS), "range": [values[arm] for arm in ARMS]}, "legend": None}


def _arm_encoding() -> dict[str, Any]:
    colours = {arm: colour(arm) for arm in ARMS}
    return {"color": {"field": "arm", "type": "nominal", **_arm_scale(colours)}}


def _curve_rows(results: Results, solver: str, quantity: str, floor: float) -> list[dict[str, Any]]:
    """Give a solver's points: mean, and mean ± sd no lower than ``floor``, as a log axis has no 0."""
    rows = []
    for arm in ARMS:
        for cell in results.cells(solver, arm, quantity):
            sd = cell.sd if cell.count > 1 else 0.0
            rows.append(
                {
                    "arm": arm,
                    "iteration": cell.iteration,
                    "mean": max(cell.mean, floor),
                    "low": max(cell.mean - sd, floor),
                    "high": max(cell.mean + sd, floor),
                }
            )
    return rows


def _log_axis(values: Iterable[float]) -> tuple[list[float], list[float]]:
    """Choose domain and ticks of a log axis that holds the values."""
    values = list(values)
    low, high = min(values) / 1.05, max(values) * 1.05
    ticks: list[float] = []
    for digits in (FEW_DIGITS, MANY_DIGITS):
        if len(ticks) < 4:
            ticks = [digit * 10.0**power for power in range(-6, 5) for digit in digits]
            ticks = [tick for tick in ticks if low <= tick <= high]
    return [low, high], ticks


def curves(results: Results, quantity: str, title: str, floor: float) -> dict[str, str]:
    """Draw learning curves with bands of ± one standard deviation.

    Args:
        results: the finished runs.
        quantity: ``"test_error"`` or ``"training_loss"``.
        title: of the vertical axis.
        floor: least value drawn, as the axis is logarithmic; also the resolution of the quantity.

    Returns:
        Solver -> drawing; solvers without a finished run are left out.
    """
    data = {solver: _curve_rows(results, solver, quantity, floor) for solver in results.solvers}
    drawn = [row for rows in data.values() for row in rows]
    if not drawn:
        return {}
    domain, ticks = _log_axis([row["low"] for row in drawn] + [row["high"] for row in drawn])
    last = max(row["iteration"] for row in drawn)
    x = {
        "field": "iteration",
        "type": "quantitative",
        "title": "iteration",
        "scale": {"domain": [0, last], "nice": False},
        "axis": {"grid": False, "tickCount": 6},
    }
    y_scale = {
        "type": "quantitative",
        "scale": {"type": "log", "domain": domain, "nice": False, "clamp": True},
        "axis": {"values": ticks, "title": title, "format": "~g"},
    }
    dashes = {"strokeDash": {"field": "arm", "type": "nominal", **_arm_scale(DASHES)}}
    shapes = {"shape": {"field": "arm", "type": "nominal", **_arm_scale(SHAPES)}}
    layers = [
        {
            "mark": {"type": "area", "opacity": 0.16},
            "encoding": {
                "x": x,
                "y": {"field": "low", **y_scale},
                "y2": {"field": "high"},
                **_arm_encoding(),
            },
        },
        {
            "mark": {"type": "line", "strokeWidth": 2},
            "encoding": {"x": x, "y": {"field": "mean", **y_scale}, **_arm_encoding(), **dashes},
        },
    ]
    if quantity == "test_error":
        layers.append(
            {
                "mark": {"type": "point", "filled": True, "size": 45, "opacity": 1},
                "encoding": {"x": x, "y": {"field": "mean", **y_scale}, **_arm_encoding(), **shapes},
            }
        )
    return {
        solver: svg(
            {"width": WIDTH, "height": HEIGHT, "data": {"values": rows}, "layer": layers},
            f"{title} by iteration, {solver}: plain, layer-adaptive, plain at the mean factor",
            f"{quantity}-{solver}",
        )
        for solver, rows in data.items()
        if rows
    }


def differences(pairs: Sequence[tuple[Comparison, Comparison]]) -> list[str]:
    """Draw, for each solver, the paired differences: a dot a seed, the mean and its interval, a line at 0.

    Args:
        pairs: the method against plain and against the control, one pair a solver.

    Returns:
        One drawing a pair, all on one scale.
    """
    labels = {0: "vs plain", 1: "vs control"}
    reach = 0.1
    for comparison in (item for pair in pairs for item in pair):
        # The interval of very few pairs says nothing and would hide them: it is cut off at the edge.
        few = len(comparison.seeds) < MINIMUM_PAIRS
        ends = [2.0 * value if few else value for value in comparison.differences]
        ends += [] if few else [comparison.low or 0.0, comparison.high or 0.0]
        reach = max(reach, *(abs(value) for value in ends), 0.0)
    drawings = []
    for number, pair in enumerate(pairs):
        dots = [
            {"row": labels[index], "value": value, "arm": arm}
            for index, (arm, comparison) in enumerate(zip(("plain", "control"), pair, strict=True))
            for value in comparison.differences
        ]
        means = [
            {"row": labels[index], "value": item.mean, "low": item.low, "high": item.high}
            for index, item in enumerate(pair)
            if item.mean is not None
        ]
        intervals = [row for row in means if row["low"] is not None]
        x = {
            "field": "value",
            "type": "quantitative",
            "scale": {"domain": [-1.05 * reach, 1.05 * reach], "nice": False, "clamp": True},
            "axis": {
                "title": "percentage points (left of 0: lower error)",
                "tickCount": 5,
            },
        }
        y = {
            "field": "row",
            "type": "nominal",
            "sort": list(labels.values()),
            "scale": {"domain": list(labels.values())},
            "axis": {"title": None, "domain": False, "ticks": False, "minExtent": 68},
        }
        layers = [
            {
                "mark": {"type": "rule", "color": "var(--ink)", "strokeDash": [3, 3]},
                "data": {"values": [{"value": 0}]},
                "encoding": {"x": x},
            },
            {
                "mark": {"type": "rule", "strokeWidth": 3, "color": "var(--layer-adaptive)"},
                "data": {"values": intervals},
                "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}, "y": y},
            },
            {
                "mark": {
                    "type": "tick",
                    "thickness": 1.5,
                    "size": 12,
                    "yOffset": 14,
                    "color": "var(--muted)",
                },
                "data": {"values": dots},
                "encoding": {"x": x, "y": y},
            },
            {
                "mark": {
                    "type": "point",
                    "filled": True,
                    "size": 80,
                    "opacity": 1,
                    "color": "var(--layer-adaptive)",
                },
                "data": {"values": means},
                "encoding": {"x": x, "y": y},
            },
        ]
        words = "; ".join(f"against {item.against}: {item.statistics}" for item in pair)
        drawings.append(
            svg(
                {"width": WIDTH - 30, "height": 110, "layer": layers},
                f"{pair[0].solver}: {words}",
                f"d{number}",
            )
        )
    return drawings


def heat_maps(results: Results) -> tuple[dict[str, str], float, float]:
    """Draw layer by iteration maps of the effective rate of the layer-adaptive arm, mean over seeds.

    Args:
        results: the finished runs.

    Returns:
        Solver -> drawing (none without a finished run), and the lowest and highest rate of the common colour
        scale.
    """
    data = {solver: _rate_rows(results, solver) for solver in results.solvers}
    values = [row["rate"] for rows in data.values() for row in rows]
    if not values:
        return {}, 0.0, 0.0
    low, high = min(values), max(values)
    drawings = {}
    for solver, rows in data.items():
        if not rows:
            continue
        layers = list(dict.fromkeys(row["layer"] for row in rows))
        scale = {"domain": [0, max(row["end"] for row in rows)], "nice": False}
        axis = {"title": "iteration", "grid": False, "tickCount": 6}
        encoding = {
            "x": {"field": "begin", "type": "quantitative", "scale": scale, "axis": axis},
            "x2": {"field": "end"},
            "y": {
                "field": "layer",
                "type": "nominal",
                "sort": layers,
                "axis": {"title": None, "domain": False, "ticks": False, "minExtent": 40},
            },
            "color": {
                "field": "rate",
                "type": "quantitative",
                "scale": {"scheme": "viridis", "domain": [low, high]},
                "legend": None,
            },
        }
        drawings[solver] = svg(
            {
                "width": WIDTH,
                "height": 120,
                "data": {"values": rows},
                "mark": {"type": "rect", "strokeWidth": 0},
                "encoding": encoding,
            },
            f"Effective learning rate of each layer by iteration, {solver}, layer-adaptive",
            f"heat-{solver}",
        )
    return drawings, low, high


def _rate_rows(results: Results, solver: str) -> list[dict[str, Any]]:
    """Average the recorded rates over seeds; each cell reaches back to the record before."""
    gathered: dict[tuple[str, int], list[float]] = {}
    for record in results.of(solver, "layer-adaptive").values():
        for layer, rates in record["rates"]["rate"].items():
            for iteration, rate in zip(record["rates"]["iterations"], rates, strict=True):
                gathered.setdefault((layer, iteration), []).append(rate)
    ends = sorted({iteration for _, iteration in gathered})
    begin = dict(zip(ends, [0, *ends], strict=False))
    return [
        {"layer": layer, "begin": begin[end], "end": end, "rate": sum(rates) / len(rates)}
        for (layer, end), rates in gathered.items()
    ]
