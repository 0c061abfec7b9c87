"""Charts of the LeNet report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from layerwise.lab.report.drawing import svg
from layerwise.lab.report.parts import (
    HEIGHT,
    WIDTH,
    Look,
    band_rows,
    colour,
    difference_chart,
    line_layers,
    names_axis,
    reach_of,
)
from layerwise.lab.results import Results
from layerwise.lab.training import ARMS
from layerwise.lab.verdict import Comparison

LOOK = Look(
    ARMS,
    {"plain": [2, 2], "layer-adaptive": [1, 0], "control": [7, 3]},
    {"plain": "square", "layer-adaptive": "circle", "control": "triangle-up"},
)
"""How the arms are told apart."""

FEW_DIGITS, MANY_DIGITS = (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)
"""Ticks of a log axis are these times powers of ten: the many where the few give less than four."""


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
    data = {
        solver: [row for arm in ARMS for row in band_rows(arm, results.cells(solver, arm, quantity=quantity), floor)]
        for solver in results.solvers
    }
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
    layers = line_layers(LOOK, x, y_scale, points=quantity == "test_error")
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
    reach = reach_of(item for pair in pairs for item in pair)
    title = "percentage points (left of 0: lower error)"
    return [
        difference_chart(
            [("vs plain", plain), ("vs control", control)], reach, title, colour("layer-adaptive"), f"d{number}"
        )
        for number, (plain, control) in enumerate(pairs)
    ]


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
                "axis": names_axis(layers),
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
