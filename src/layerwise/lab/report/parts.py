"""Charts that the reports share, rendered to SVG beforehand so that the page needs no script and no network.

Colours are CSS variables of the page (``var(--plain)`` and so on), so that one drawing serves light and dark.
Charts of a row share their scales, and their legend is part of the page.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from layerwise.lab.records import Cell
from layerwise.lab.report.drawing import svg
from layerwise.lab.verdict import MINIMUM_PAIRS, Comparison

WIDTH, HEIGHT = 300, 190
"""Plotting area in pixels; with its labels a chart fits a telephone held upright."""

LETTER = 6.3
"""Pixels of a letter of an axis, at most on average: the page's own font may be wider than that of the renderer."""

SIGNS = {
    "square": "M13 2H21V10H13Z",
    "circle": "M12.5 6A4.5 4.5 0 1 0 21.5 6A4.5 4.5 0 1 0 12.5 6Z",
    "triangle-up": "M17 1L22 10L12 10Z",
    "triangle-down": "M17 11L22 2L12 2Z",
    "diamond": "M17 0L22.5 6L17 12L11.5 6Z",
}
"""Shape of Vega-Lite -> the same in a legend of 34 x 12 pixels."""


@dataclass(frozen=True)
class Look:
    """How the arms of a demo are told apart: by a colour of the page, and by a second sign for those who do not see it.

    Attributes:
        words: arm -> its name; the colour is the page's ``var(--arm)``.
        dashes: arm -> lengths of line and gap.
        shapes: arm -> shape, a key of ``SIGNS``.
    """

    words: dict[str, str]
    dashes: dict[str, list[int]]
    shapes: dict[str, str]

    def _scaled(self, values: dict[str, Any]) -> dict[str, Any]:
        scale = {"domain": list(self.words), "range": [values[arm] for arm in self.words]}
        return {"field": "arm", "type": "nominal", "scale": scale, "legend": None}

    @property
    def color(self) -> dict[str, Any]:
        """Encoding of the colour."""
        return {"color": self._scaled({arm: colour(arm) for arm in self.words})}

    @property
    def dash(self) -> dict[str, Any]:
        """Encoding of the line."""
        return {"strokeDash": self._scaled(self.dashes)}

    @property
    def shape(self) -> dict[str, Any]:
        """Encoding of the points."""
        return {"shape": self._scaled(self.shapes)}

    def legend(self, arms: Iterable[str] = ()) -> list[dict[str, str]]:
        """Give what the page's legend draws: arm, words, dashes and path of each arm, of all if none is named."""
        return [
            {
                "arm": arm,
                "words": self.words[arm],
                "dash": " ".join(map(str, self.dashes[arm])) if self.dashes[arm][1] else "none",
                "path": SIGNS[self.shapes[arm]],
            }
            for arm in arms or self.words
        ]


def names_axis(names: Iterable[str], least: int = 40) -> dict[str, Any]:
    """Make an axis of names with room for the longest, in pixels at least ``least``."""
    extent = max([least, *(round(LETTER * len(name)) + 8 for name in names)])
    return {"title": None, "domain": False, "ticks": False, "labelPadding": 5, "minExtent": extent}


def colour(arm: str) -> str:
    """Give the page's colour of an arm."""
    return f"var(--{arm})"


def band_rows(arm: str, cells: Iterable[Cell], floor: float) -> list[dict[str, Any]]:
    """Give an arm's points: mean, and mean ± sd no lower than ``floor``."""
    rows = []
    for cell in cells:
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


def line_layers(look: Look, x: dict[str, Any], y: dict[str, Any], *, points: bool) -> list[dict[str, Any]]:
    """Draw lines with bands from rows of ``band_rows``.

    Args:
        look: of the arms.
        x: encoding of the step.
        y: encoding of the value, without its field.
        points: whether the steps are marked.

    Returns:
        Layers of Vega-Lite.
    """
    mean = {"x": x, "y": {"field": "mean", **y}, **look.color}
    layers = [
        {
            "mark": {"type": "area", "opacity": 0.16},
            "encoding": {"x": x, "y": {"field": "low", **y}, "y2": {"field": "high"}, **look.color},
        },
        {"mark": {"type": "line", "strokeWidth": 2}, "encoding": {**mean, **look.dash}},
    ]
    if points:
        mark = {"type": "point", "filled": True, "size": 45, "opacity": 1}
        layers.append({"mark": mark, "encoding": {**mean, **look.shape}})
    return layers


def reach_of(comparisons: Iterable[Comparison]) -> float:
    """Give the distance from 0 that all differences and intervals keep, for their common scale."""
    reach = 0.1
    for comparison in comparisons:
        # The interval of very few pairs says nothing and would hide them: it is cut off at the edge.
        few = len(comparison.seeds) < MINIMUM_PAIRS
        ends = [2.0 * value if few else value for value in comparison.differences]
        ends += [] if few else [comparison.low or 0.0, comparison.high or 0.0]
        reach = max(reach, *(abs(value) for value in ends), 0.0)
    return reach


def difference_chart(
    rows: Sequence[tuple[str, Comparison]], reach: float, title: str, accent: str, prefix: str, room: int = 68
) -> str:
    """Draw paired differences: a tick a seed, the mean and its interval, a line at 0.

    Args:
        rows: label and comparison, from above.
        reach: of the scale, from ``reach_of``.
        title: of the axis.
        accent: colour of mean and interval.
        prefix: unique in the page.
        room: for the labels, in pixels at least, so that charts of a row agree.

    Returns:
        The drawing.
    """
    labels = [label for label, _ in rows]
    dots = [{"row": label, "value": value} for label, item in rows for value in item.differences]
    means = [
        {"row": label, "value": item.mean, "low": item.low, "high": item.high}
        for label, item in rows
        if item.mean is not None
    ]
    x = {
        "field": "value",
        "type": "quantitative",
        "scale": {"domain": [-1.05 * reach, 1.05 * reach], "nice": False, "clamp": True},
        "axis": {"title": title, "tickCount": 5},
    }
    y = {
        "field": "row",
        "type": "nominal",
        "sort": labels,
        "scale": {"domain": labels},
        "axis": names_axis(labels, room),
    }
    layers = [
        {
            "mark": {"type": "rule", "color": "var(--ink)", "strokeDash": [3, 3]},
            "data": {"values": [{"value": 0}]},
            "encoding": {"x": x},
        },
        {
            "mark": {"type": "rule", "strokeWidth": 3, "color": accent},
            "data": {"values": [row for row in means if row["low"] is not None]},
            "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}, "y": y},
        },
        {
            "mark": {"type": "tick", "thickness": 1.5, "size": 12, "yOffset": 14, "color": "var(--muted)"},
            "data": {"values": dots},
            "encoding": {"x": x, "y": y},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 80, "opacity": 1, "color": accent},
            "data": {"values": means},
            "encoding": {"x": x, "y": y},
        },
    ]
    words = "; ".join(f"{item.arm} against {item.against}: {item.statistics}" for _, item in rows)
    return svg(
        {"width": WIDTH - 30, "height": 10 + 50 * len(rows), "layer": layers}, f"{rows[0][1].solver}: {words}", prefix
    )
